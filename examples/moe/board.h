// SPDX-License-Identifier: MIT
// Where ranks write what they found and how far they are: memory that the parent shares with the processes it forks.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string_view>

#include "settings.h"

namespace moe {

/// What a rank does, in order.
enum class Stage : int {
  kMeet,
  kRoute,
  kDispatch,
  kExperts,
  kCombine,
  kCheck,
  kDispatchFp8,
  kExpertsFp8,
  kCombineFp8,
  kCompare
};
constexpr int kNumStages = static_cast<int>(Stage::kCompare) + 1;
const char* describe(Stage stage);

/// How widely a routing spreads a rank's tokens. Sums over the tokens.
struct Spread {
  std::int64_t ranks = 0;     // ranks that a token goes to
  std::int64_t nodes = 0;     // nodes that it goes to
  std::int64_t crossing = 0;  // 1 if it leaves its own node
};

/// Values of a combined output that were not those expected, and the first of them.
struct BitCheck {
  std::int64_t values = 0;
  std::int64_t wrong = 0;
  std::int64_t token = -1;
  std::int64_t channel = -1;
  float got = 0;
  float expected = 0;
};

struct Fp8Check {
  double worst_element = 0;  // of received rows: error / what E4M3 rounding may cause; at most 1
  double error_squared = 0;  // of the output, summed over tokens and channels
  double norm_squared = 0;   // of the BF16 output
};

struct ExchangeTimes {
  std::array<double, kMaxRepeat> dispatch_ms{};
  std::array<double, kMaxRepeat> combine_ms{};
};

/// One rank's part. Plain data apart from `stages_done`: the rank stores that with release order after everything that
/// the finished stage wrote, the parent loads it with acquire order.
struct RankRecord {
  std::atomic<int> stages_done{0};
  std::int64_t tokens = 0;
  std::int64_t rows = 0;                            // received (token, expert) pairs, padding left out
  std::array<std::int32_t, kMaxRanks> tokens_to{};  // distinct tokens sent to each rank
  int num_slots = 0;
  std::array<std::int32_t, kMaxExperts> slot_rows{};  // received rows of each hosted expert
  Spread limited, free;                               // with the limit on groups, and if there were none
  ExchangeTimes bf16, fp8;
  bool repeats_agree = true;  // all repetitions gave the same bits
  BitCheck check;
  Fp8Check fp8_check;
  std::uint64_t arena_high_water = 0;
  std::array<char, 512> failure{};  // why the rank ended early

  void finish(Stage stage) { stages_done.store(static_cast<int>(stage) + 1, std::memory_order_release); }
  void set_failure(std::string_view why);
};
static_assert(std::atomic<int>::is_always_lock_free, "a lock would not work between processes");

/// The shared memory. Made before the ranks are forked; unmapped by the parent's destructor.
class Board {
 public:
  explicit Board(int ranks);
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  int num_ranks() const { return num_ranks_; }
  RankRecord& operator[](int rank) { return records_[rank]; }
  const RankRecord& operator[](int rank) const { return records_[rank]; }

 private:
  int num_ranks_;
  RankRecord* records_;
};

}  // namespace moe
