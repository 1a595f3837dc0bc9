// SPDX-License-Identifier: MIT
// How time is taken: ranks meet at a board in shared memory, the last to come notes the start, each notes its own end,
// and a repetition takes as long as its slowest rank.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <vector>

namespace deep_ep::bench {

inline constexpr int kMaxRanks = 32;
inline constexpr const char* kClockBoundary =
    "host monotonic clock, from the arrival of the last rank at the benchmark's own barrier (shared memory, not timed "
    "itself) to the return "
    "of the call on the slowest rank";

/// steady_clock is CLOCK_MONOTONIC: one clock for all processes of a machine.
inline std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// What a process used so far, as the kernel counts it.
struct Usage {
  double user_s = 0;
  double system_s = 0;
  std::int64_t minor_faults = 0;
  std::int64_t switches = 0;
};

/// In memory that all ranks share, zero at first.
struct Board {
  std::atomic<std::uint32_t> arrived;
  std::atomic<std::uint32_t> round;
  std::atomic<std::uint32_t> failed;  // a rank gave up: nobody waits any more
  std::int64_t start_ns;              // written by the last to arrive
  struct alignas(64) PerRank {
    std::int64_t end_ns;
    Usage usage;
    std::int64_t note[8];  // small facts for rank 0's report
    std::atomic<std::uint64_t> signals[kMaxRanks];
  } ranks[kMaxRanks];
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);

class Barrier {
 public:
  Barrier(Board& board, int rank, int num_ranks)
      : board_(board), rank_(rank), num_ranks_(static_cast<std::uint32_t>(num_ranks)) {}

  int rank() const { return rank_; }
  int num_ranks() const { return static_cast<int>(num_ranks_); }
  Board& board() { return board_; }

  /// Returns, on all ranks, when the last one came. Waits by sched_yield: with more ranks than cores, others must get
  /// on.
  std::int64_t sync() {
    const std::uint32_t round = board_.round.load(std::memory_order_relaxed);
    // Acquire and release: the last to come has seen what all the others wrote before they came.
    if (board_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_ranks_) {
      board_.arrived.store(0, std::memory_order_relaxed);
      board_.start_ns = now_ns();
      // Release: whoever sees the new round sees the start, the zero, and what every rank wrote.
      board_.round.store(round + 1, std::memory_order_release);
    } else {
      while (board_.round.load(std::memory_order_acquire) == round) {
        if (board_.failed.load(std::memory_order_relaxed) != 0) throw std::runtime_error("another rank failed");
        sched_yield();
      }
    }
    return board_.start_ns;
  }

  /// Runs `work` on all ranks at once and returns, on all ranks, the slowest one's nanoseconds.
  template <class Work>
  std::int64_t time(const Work& work) {
    const std::int64_t start = sync();
    work();
    board_.ranks[rank_].end_ns = now_ns();
    sync();
    // Nobody writes its end again before everybody has come to the next sync.
    std::int64_t end = start;
    for (std::uint32_t rank = 0; rank < num_ranks_; ++rank) end = std::max(end, board_.ranks[rank].end_ns);
    return end - start;
  }

 private:
  Board& board_;
  int rank_;
  std::uint32_t num_ranks_;
};

struct Summary {
  double median_us = 0;
  double p99_us = 0;
  double min_us = 0;
  double max_us = 0;
  double mean_us = 0;
  int n = 0;
};

/// p99 is the smallest time that at least 99 % of the repetitions do not exceed: with fewer than 100 the largest.
inline Summary summarize(std::vector<std::int64_t> times_ns) {
  Summary summary;
  if (times_ns.empty()) return summary;
  std::sort(times_ns.begin(), times_ns.end());
  const std::size_t n = times_ns.size();
  const auto us = [&](std::size_t i) { return static_cast<double>(times_ns[i]) * 1e-3; };
  summary.median_us = (us((n - 1) / 2) + us(n / 2)) / 2;
  summary.p99_us = us((n * 99 + 99) / 100 - 1);
  summary.min_us = us(0);
  summary.max_us = us(n - 1);
  for (std::size_t i = 0; i < n; ++i) summary.mean_us += us(i) / static_cast<double>(n);
  summary.n = static_cast<int>(n);
  return summary;
}

inline nlohmann::json to_json(const Summary& summary) {
  return {{"median_us", summary.median_us}, {"p99_us", summary.p99_us},   {"min_us", summary.min_us},
          {"max_us", summary.max_us},       {"mean_us", summary.mean_us}, {"n", summary.n}};
}

}  // namespace deep_ep::bench
