// SPDX-License-Identifier: MIT
// Low-latency dispatch, gather: where the rows of each source and slot begin, from what the sources tell.
#pragma once

#include "cuda/low_latency_message.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// What a block knows of all that comes, in shared memory.
struct Gathered {
  std::int32_t* tokens;         // [ranks]: that a source has, wherever they go
  std::int32_t* first_arrival;  // [ranks + 1]
  std::int32_t* slot_first;     // [slots + 1]
  std::int32_t* slot_rows;      // [slots]
  std::int32_t* rows_before;    // [ranks][slots]: rows of earlier sources in the slot
};

__device__ Gathered gathered_of(const Params& p, const Shared& shared) {
  const int ranks = p.common.num_ranks;
  Gathered g;
  g.tokens = shared.of_gather;
  g.first_arrival = g.tokens + ranks;
  g.slot_first = g.first_arrival + ranks + 1;
  g.slot_rows = g.slot_first + p.num_slots + 1;
  g.rows_before = g.slot_rows + p.num_slots;
  return g;
}

__host__ __device__ std::size_t gathered_words(int ranks, int slots) {
  return 2 * static_cast<std::size_t>(ranks) + 1 + 2 * static_cast<std::size_t>(slots) + 1 +
         static_cast<std::size_t>(ranks) * slots;
}

// Every thread of a block takes lines of what the sources have counted. Numbers of a peer that makes another call may
// be anything: they are bounded here, and what follows from them by whoever writes there.
__device__ bool take_counts(const Now& now, const Params& p, const Peers& peers, const Gathered& g) {
  const int ranks = p.common.num_ranks, slots = p.num_slots, lines = plan::count_lines(slots);
  const Messages messages(now, p, p.window);
  const auto most = static_cast<std::uint32_t>(p.max_tokens_per_rank);
  for (int i = idle_turn(); i < ranks * lines; i += kLowLatencyThreads) {
    const int src = p.per.count_lines.quotient(i), line = i - src * lines;
    if (peers.far(src) && peers.active(src)) continue;
    uint4 v{};
    if (peers.active(src) && !await_line(now, messages.counts(src) + plan::kLineBytes * line, v, src)) return false;
    if (line == 0) {
      g.tokens[src] = static_cast<std::int32_t>(min(v.x, most));
      g.first_arrival[src] = static_cast<std::int32_t>(min(v.y, most));
      continue;
    }
    std::int32_t* const rows = g.rows_before + src * slots;
    for (int w = 0, slot = plan::kLineWords * (line - 1); w < plan::kLineWords && slot < slots; ++w, ++slot)
      rows[slot] = static_cast<std::int32_t>(min(word_of(v, w), most * p.num_topk));
  }
  return true;
}

// How many warps of a block take counts, in the order of their turns.
__device__ int counting_warps(const Params& p) {
  return min((p.common.num_ranks * plan::count_lines(p.num_slots) + 31) / 32, kLowLatencyWarps);
}

// A block, a warp for each far source: the same from its announcement. Its tokens are those alone that come.
__device__ bool take_far_counts(const Now& now, const Params& p, const Peers& peers, const Gathered& g,
                                const Place& at) {
  const auto most = static_cast<std::uint32_t>(p.max_tokens_per_rank);
  bool good = true;
  for (int src = at.warp; src < p.common.num_ranks; src += kLowLatencyWarps) {
    if (!peers.far(src) || !peers.active(src)) continue;
    std::byte* const inbox = peers.inbox(src);
    std::uint32_t value = 0;
    // What it says besides kSame is found out by whoever hears of the calls.
    if (!await_word(now, src, &words_in(now, inbox, src).announced, value, false, at.lane) || value != kSame) {
      good = false;
      continue;
    }
    const std::int32_t* const counted = announced_tokens_in(now, inbox, src);
    if (at.lane == 0)
      g.tokens[src] = g.first_arrival[src] =
          static_cast<std::int32_t>(min(static_cast<std::uint32_t>(__ldcg(counted)), most));
    for (int slot = at.lane; slot < p.num_slots; slot += 32)
      g.rows_before[src * p.num_slots + slot] = static_cast<std::int32_t>(
          min(static_cast<std::uint32_t>(__ldcg(counted + p.common.num_ranks + slot)), most * p.num_topk));
  }
  return good;
}

// A warp: values[0 .. count) become what comes before each; values[count] all.
__device__ void prefix_by_warp(std::int32_t* values, int count, int lane) {
  std::int32_t base = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const std::int32_t value = first + lane < count ? values[first + lane] : 0;
    std::int32_t sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::int32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (first + lane < count) values[first + lane] = base + sum - value;
    base += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) values[count] = base;
}

// Every block for itself, of the counts that its threads have taken, behind a block barrier: where the rows of each
// source and slot begin, as plan::make_row_plan has it.
__device__ bool gather(const Now& now, const Params& p, const Gathered& g, const Place& at) {
  const int ranks = p.common.num_ranks, slots = p.num_slots;
  const bool padded = p.layout == OutputLayout::kPadded;
  bool good = true;
  const std::int32_t padded_rows = ranks * p.max_tokens_per_rank;
  for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kLowLatencyThreads) {
    std::int32_t sum = 0;
#pragma unroll 2
    for (int src = 0; src < ranks; ++src) {
      const std::int32_t rows = g.rows_before[src * slots + slot];
      g.rows_before[src * slots + slot] = sum;
      sum += rows;
    }
    g.slot_rows[slot] = sum;
    g.slot_first[slot] =
        padded ? slot * padded_rows : (sum + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
    if (padded && sum > padded_rows) {  // duplicate ids only
      report(now, Fault::kFullSlot, p.common.rank, sum, padded_rows);
      good = false;
    }
  }
  if (at.warp == kLowLatencyWarps - 1) prefix_by_warp(g.first_arrival, ranks, at.lane);
  if (padded && threadIdx.x == 0) g.slot_first[slots] = slots * padded_rows;
  if (!__syncthreads_and(good)) return false;
  if (padded) return true;
  if (at.warp == 0) prefix_by_warp(g.slot_first, slots, at.lane);
  __syncthreads();
  return true;
}

// One block, for the handle and the statistics.
__device__ void write_tables(const Params& p, const Gathered& g) {
  const int ranks = p.common.num_ranks, slots = p.num_slots, first = static_cast<int>(threadIdx.x);
  for (int i = first; i <= ranks; i += kLowLatencyThreads) p.tables.first_arrival[i] = g.first_arrival[i];
  for (int i = first; i < slots; i += kLowLatencyThreads) {
    p.tables.slot_rows[i] = g.slot_rows[i];
    count_received(p.common, i, g.slot_rows[i]);
  }
  for (int i = first; i <= slots; i += kLowLatencyThreads) p.tables.slot_first_row[i] = g.slot_first[i];
  for (int i = first; i < ranks * ranks; i += kLowLatencyThreads)
    p.tables.tokens_between[i] =
        i % ranks == p.common.rank ? g.first_arrival[i / ranks + 1] - g.first_arrival[i / ranks] : 0;
  if (p.tables.source_range == nullptr) return;
  for (int i = first; i < slots * ranks; i += kLowLatencyThreads) {
    const int slot = i / ranks, src = i % ranks;
    const std::int32_t begin = g.rows_before[src * slots + slot];
    const std::int32_t end = src + 1 < ranks ? g.rows_before[(src + 1) * slots + slot] : g.slot_rows[slot];
    p.tables.source_range[i] = std::int64_t{begin} << 32 | (end - begin);
  }
}

}  // namespace
}  // namespace deep_ep::cuda
