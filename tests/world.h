// SPDX-License-Identifier: MIT
// Random exchanges: a Shape says what kind, a World holds every rank's inputs and what the oracle expects of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "oracle.h"
#include "ranks.h"

namespace deep_ep::test {

/// A small random generator whose sequence is the same everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x1234567ull) {}
  std::uint64_t next();
  /// 0 .. n-1
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(n)); }
  std::int64_t between(std::int64_t low, std::int64_t high) { return low + below(high - low + 1); }
  bool one_in(int n) { return below(n) == 0; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return *(values.begin() + below(static_cast<std::int64_t>(values.size())));
  }

 private:
  std::uint64_t state_;
};

enum class Homes { kEven, kUneven, kReplicas };

struct Shape {
  int ranks = 4;
  std::vector<int> ranks_per_node;  // as in Config
  std::string network;              // provider between these nodes; empty: they share memory
  std::size_t slot_bytes = 0;       // Config::forward_slot_bytes; 0: its default
  DType dtype = DType::kBf16;
  std::int64_t hidden = 64;
  int topk = 4;
  int experts = 16;
  int tokens = 24;            // the most that a rank brings
  bool uneven_tokens = true;  // each rank brings 0 .. tokens, at least one rank all of them
  int percent_missing = 15;   // of selections that are -1
  bool duplicates = false;    // a token may select one expert more than once
  Homes homes = Homes::kEven;
  Placement::Policy policy = Placement::Policy::kSpread;
  OutputLayout layout = OutputLayout::kByRank;
  int alignment = 1;
  bool weights = true;
  bool idx64 = true;
  bool mask_weights = true;
  std::optional<Fp8Options> fp8;
  ScaleOrder scale_order = ScaleOrder::kRowMajor;
  int caller_scales = 0;  // scales that come with rows that the caller quantised; 0: none
  DType caller_scale_dtype = DType::kFp32;
  bool caller_scales_strided = false;
  std::vector<std::pair<DType, int>> side;
  bool low_latency = false;
  int max_tokens_per_rank = 0;  // 0: `tokens`
  std::uint64_t seed = 1;

  std::string to_string() const;
};

/// A random tensor without zeros, infinities and NaN; what arithmetic makes of it stays finite.
oracle::Array random_array(Random& random, DType dtype, std::vector<std::int64_t> shape);

struct World {
  explicit World(const Shape& wanted);

  Shape shape;
  oracle::Exchange exchange;
  std::shared_ptr<const Placement> placement;
  std::vector<oracle::DispatchRank> ranks;
  std::vector<oracle::Array> strided_scales;  // column-major copies, where the shape wants them
  std::vector<oracle::Dispatched> expected;

  Config config() const;
  int max_tokens() const { return shape.max_tokens_per_rank > 0 ? shape.max_tokens_per_rank : shape.tokens; }
  /// Arguments of one rank's dispatch. Views of this World.
  DispatchInput input(int rank) const;
  /// Works `expected` out again, after a test changed the inputs.
  void expect_again();
  /// The same where these ranks are masked.
  World without(std::vector<bool> masked) const;
  /// The same where a dispatch with mask_silent finds these ranks silent: their tokens do not come, but they had been
  /// sent to.
  World finding_silent(std::vector<bool> silent) const;

 private:
  static Shape over_network(Shape shape);
};

/// Combine input for every rank of a dispatched world: rows of `dtype`, weights and biases as asked.
struct Homeward {
  std::vector<oracle::CombineRank> ranks;
  std::vector<oracle::Array> out;  // memory for out= where wanted
};
struct HomewardShape {
  DType dtype = DType::kBf16;
  std::int64_t hidden = 64;
  bool rows = true;
  bool weights = false;       // factors of a weighted sum
  bool topk_weights = false;  // that travel home
  int biases = 0;
  WireFormat wire = WireFormat::kAsIs;
  bool odd_rows = false;  // with zeros, infinities, NaNs, subnormal and huge values strewn in, and blocks far apart
  std::uint64_t seed = 7;
};
Homeward homeward(const World& world, const HomewardShape& shape);
CombineInput combine_input(const Homeward& homeward, int rank, std::shared_ptr<const Handle> handle,
                           const SumOrder& order);

/// All the orders that a SumOrder can say.
std::vector<SumOrder> all_orders();
std::string to_string(const SumOrder& order);

}  // namespace deep_ep::test
