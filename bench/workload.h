// SPDX-License-Identifier: MIT
// What is exchanged: the shape, the routing and the rows, the same for every program of this folder. Everything follows
// from the seed, so each rank knows the routing of all.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "plan/number.h"

namespace deep_ep::bench {

struct Workload {
  int num_ranks = 4;
  int num_tokens = 4096;    // of each rank
  int num_ll_tokens = 128;  // of each rank, in the low-latency calls
  std::int64_t hidden = 7168;
  int num_topk = 8;
  int num_experts = 64;
  int reps = 40;
  int ll_reps = 200;
  int warmup = 3;
  std::uint64_t seed = 2026;
  std::string routing = "uniform";

  int slots() const { return num_experts / num_ranks; }
  int rank_of(std::int64_t expert) const { return static_cast<int>(expert / slots()); }
  std::int64_t row_bytes() const { return hidden * 2; }
  std::int64_t num_scales() const { return (hidden + 127) / 128; }
  std::int64_t fp8_row_bytes() const { return hidden + num_scales() * 4; }
  std::int64_t meta_bytes() const { return num_topk * std::int64_t{8 + 4}; }  // ids and weights of one token
};

inline void add_options(CLI::App& app, Workload& work) {
  app.add_option("--ranks", work.num_ranks, "ranks, each a process")->check(CLI::Range(1, 32))->capture_default_str();
  app.add_option("--tokens", work.num_tokens, "tokens of each rank")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--ll-tokens", work.num_ll_tokens, "tokens of each rank in low-latency calls")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--hidden", work.hidden, "channels of a token, a multiple of 128")
      ->check(CLI::Range(128, 65536))
      ->capture_default_str();
  app.add_option("--topk", work.num_topk, "experts of each token")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--experts", work.num_experts, "experts in all, a multiple of the ranks")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--reps", work.reps, "measured repetitions of the large calls")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--ll-reps", work.ll_reps, "measured repetitions of the low-latency calls")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--warmup", work.warmup, "repetitions before the measured ones")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  app.add_option("--seed", work.seed, "of routing and rows")->capture_default_str();
  app.add_option("--routing", work.routing, "uniform, zipf, or groups: from 4 of 8 groups of experts")
      ->check(CLI::IsMember({"uniform", "zipf", "groups"}))
      ->capture_default_str();
}

/// What is wrong with these values together; empty if nothing is.
inline std::string complaint(const Workload& work) {
  if (work.num_experts % work.num_ranks != 0) return "--experts must be a multiple of --ranks";
  if (work.num_topk > work.num_experts) return "--topk must not exceed --experts";
  if (work.hidden % 128 != 0) return "--hidden must be a multiple of 128";
  return "";
}

inline nlohmann::json to_json(const Workload& work) {
  return {{"ranks", work.num_ranks},
          {"tokens", work.num_tokens},
          {"ll_tokens", work.num_ll_tokens},
          {"hidden", work.hidden},
          {"topk", work.num_topk},
          {"experts", work.num_experts},
          {"reps", work.reps},
          {"ll_reps", work.ll_reps},
          {"warmup", work.warmup},
          {"seed", work.seed},
          {"routing", work.routing + ", distinct experts"}};
}

/// SplitMix64: small, and the same on every machine, which std's distributions are not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>((next() >> 32) * static_cast<std::uint64_t>(n) >> 32); }
  float unit() { return static_cast<float>(next() >> 40) * 0x1p-24f; }

 private:
  std::uint64_t state_;
};

inline constexpr int kGroups = 8, kGroupsOfToken = 4;

/// Draws one token's experts after another, distinct ones:
///   uniform  every expert alike
///   zipf     expert e with weight 1 / (e + 1): a few take most, as in a badly balanced layer
///   groups   from 4 of 8 groups of experts, as DeepSeek-V3's gating limits them
class Router {
 public:
  Router(const Workload& work, Random& random) : work_(work), random_(random), experts_(work.num_experts) {
    for (int e = 0; e < work.num_experts; ++e) experts_[e] = e;
    for (int e = 0; e < work.num_experts; ++e) below_.push_back((e > 0 ? below_.back() : 0.0) + 1.0 / (e + 1));
  }

  void next(std::vector<std::int64_t>& topk_idx) {
    if (work_.routing == "zipf") return zipf(topk_idx);
    const bool groups = work_.routing == "groups";
    if (groups) choose(kGroups, kGroupsOfToken, group_order_);
    const int candidates = groups ? work_.num_experts / kGroups * kGroupsOfToken : work_.num_experts;
    choose(candidates, work_.num_topk, experts_);
    const int of_group = work_.num_experts / kGroups;
    for (int k = 0; k < work_.num_topk; ++k)
      topk_idx.push_back(groups ? group_order_[experts_[k] / of_group] * of_group + experts_[k] % of_group
                                : experts_[k]);
  }

 private:
  // The first `count` of `order` become distinct random numbers below n.
  void choose(int n, int count, std::vector<int>& order) {
    order.resize(std::max<std::size_t>(order.size(), n));
    for (int i = 0; i < n; ++i) order[i] = i;
    for (int i = 0; i < count; ++i) std::swap(order[i], order[i + random_.below(n - i)]);
  }

  void zipf(std::vector<std::int64_t>& topk_idx) {
    const std::size_t first = topk_idx.size();
    while (topk_idx.size() < first + work_.num_topk) {
      const double at = static_cast<double>(random_.unit()) * below_.back();
      const auto expert = std::min<std::int64_t>(std::upper_bound(below_.begin(), below_.end(), at) - below_.begin(),
                                                 work_.num_experts - 1);
      if (std::find(topk_idx.begin() + static_cast<std::ptrdiff_t>(first), topk_idx.end(), expert) == topk_idx.end())
        topk_idx.push_back(expert);
    }
  }

  const Workload& work_;
  Random& random_;
  std::vector<int> experts_, group_order_;
  std::vector<double> below_;  // sums of the weights of experts 0..e
};

/// One rank's routing: for each token `num_topk` distinct experts.
struct Routing {
  std::vector<std::int64_t> topk_idx;  // [num_tokens, num_topk]
  std::vector<float> topk_weights;     // likewise, each token's sum to about 1
};

inline Routing make_routing(const Workload& work, int rank, int num_tokens) {
  Random random(work.seed * 1000003 + static_cast<std::uint64_t>(rank));
  Router router(work, random);
  Routing routing;
  for (int token = 0; token < num_tokens; ++token) {
    router.next(routing.topk_idx);
    for (int k = 0; k < work.num_topk; ++k)
      routing.topk_weights.push_back((0.5f + random.unit()) / static_cast<float>(work.num_topk));
  }
  return routing;
}

/// rows[i][j]: distinct tokens from rank i to rank j; selections of all.
struct Traffic {
  std::vector<std::vector<std::int64_t>> rows;
  std::int64_t num_selections = 0;
  std::int64_t own_selections = 0;  // of experts on the token's rank

  std::int64_t sent(int rank) const {
    std::int64_t sum = 0;
    for (const std::int64_t n : rows[rank]) sum += n;
    return sum;
  }
  std::int64_t received(int rank) const {
    std::int64_t sum = 0;
    for (const auto& from : rows) sum += from[rank];
    return sum;
  }
  std::int64_t all() const {
    std::int64_t sum = 0;
    for (std::size_t rank = 0; rank < rows.size(); ++rank) sum += sent(static_cast<int>(rank));
    return sum;
  }
  /// Tokens that go to their own rank.
  std::int64_t own() const {
    std::int64_t sum = 0;
    for (std::size_t rank = 0; rank < rows.size(); ++rank) sum += rows[rank][rank];
    return sum;
  }
  std::int64_t most_received() const {
    std::int64_t most = 0;
    for (std::size_t rank = 0; rank < rows.size(); ++rank) most = std::max(most, received(static_cast<int>(rank)));
    return most;
  }
};

inline Traffic traffic_of(const Workload& work, int num_tokens) {
  Traffic traffic;
  for (int rank = 0; rank < work.num_ranks; ++rank) {
    const Routing routing = make_routing(work, rank, num_tokens);
    std::vector<std::int64_t> rows(work.num_ranks, 0);
    for (int token = 0; token < num_tokens; ++token) {
      std::vector<char> there(work.num_ranks, 0);
      for (int k = 0; k < work.num_topk; ++k) {
        char& seen = there[work.rank_of(routing.topk_idx[std::size_t(token) * work.num_topk + k])];
        rows[work.rank_of(routing.topk_idx[std::size_t(token) * work.num_topk + k])] += seen == 0;
        seen = 1;
      }
    }
    traffic.num_selections += static_cast<std::int64_t>(routing.topk_idx.size());
    for (const std::int64_t expert : routing.topk_idx) traffic.own_selections += work.rank_of(expert) == rank;
    traffic.rows.push_back(std::move(rows));
  }
  return traffic;
}

/// Where the row of a selection lies, if rows of a rank lie in order (source rank, selection).
struct PlaceOfSelection {
  int rank = 0;
  std::int64_t row = 0;
};

/// Of one rank's low-latency tokens, [num_ll_tokens, num_topk].
inline std::vector<PlaceOfSelection> places_of_selections(const Workload& work, int rank) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(work.num_ranks), 0);
  std::vector<PlaceOfSelection> places;
  for (int src = 0; src <= rank; ++src) {
    places.clear();
    for (const std::int64_t expert : make_routing(work, src, work.num_ll_tokens).topk_idx)
      places.push_back({work.rank_of(expert), next[static_cast<std::size_t>(work.rank_of(expert))]++});
  }
  return places;
}

/// [num_rows, hidden] bf16 from -1 to 1, different for each rank.
inline void fill_rows(const Workload& work, int rank, std::int64_t num_rows, std::uint16_t* rows) {
  Random random(work.seed * 7919 + static_cast<std::uint64_t>(rank) + 1);
  for (std::int64_t i = 0; i < num_rows * work.hidden; i += 2) {
    const std::uint64_t bits = random.next();
    rows[i] = plan::to_bf16(static_cast<float>(bits & 0xffffff) * 0x1p-23f - 1.0f);
    rows[i + 1] = plan::to_bf16(static_cast<float>((bits >> 32) & 0xffffff) * 0x1p-23f - 1.0f);
  }
}

}  // namespace deep_ep::bench
