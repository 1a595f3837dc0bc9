// SPDX-License-Identifier: MIT
// Low-latency dispatch, route: one block for each destination counts which of our tokens go there and tells it.
#pragma once

#include "cuda/low_latency_message.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

__device__ std::int64_t expert_of(const Params& p, std::int64_t at) {
  return p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[at]
                       : static_cast<const std::int32_t*>(p.topk_idx)[at];
}

// Where a selection goes; rank -1: nowhere.
__device__ Placement::Replica replica_of(const Params& p, const Peers& peers, std::int64_t expert, int token) {
  if (expert < 0 || expert >= p.num_experts) return {-1, -1};
  const Placement::Replica to = p.one_copy_each
                                    ? p.placement.replicas[expert]
                                    : plan::route(p.placement, static_cast<int>(expert), p.common.rank, token);
  return peers.active(to.rank) ? to : Placement::Replica{-1, -1};
}

// What a lane knows of its selection after the count inside its warp.
struct Routed {
  int token, k;  // token -1: none
  int slot;      // -1: not at this destination
  int row;       // as the how-manieth of this warp
  int arrival;   // of the token's first selection there; -1 elsewhere
};

// One step of a warp: whole tokens, as many as there are lanes for.
__device__ Routed route_step(const Params& p, const Peers& peers, std::int32_t* counters, int dst, int first, int slots,
                             int lane, unsigned long long* bad) {
  const int of_step = 32 / p.num_topk;
  const int token = first + lane / p.num_topk;
  Routed r{-1, lane % p.num_topk, -1, 0, -1};
  int rank = -1;
  if (lane < of_step * p.num_topk && token < p.num_tokens) {
    const std::int64_t at = std::int64_t{token} * p.num_topk + r.k;
    const std::int64_t expert = expert_of(p, at);
    if (expert >= p.num_experts) atomicMin(bad, static_cast<unsigned long long>(at));
    const Placement::Replica to = replica_of(p, peers, expert, token);
    r.token = token;
    rank = to.rank;
    if (rank == dst) r.slot = to.slot;
    if (dst == p.common.rank) p.dst_rank[at] = rank;
  }
  const unsigned below = (1u << lane) - 1;
  const unsigned same_token = __match_any_sync(kAllLanes, r.slot >= 0 ? lane / p.num_topk : -1 - lane);
  const bool leads = r.slot >= 0 && (same_token & below) == 0;
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  const unsigned same_slot = __match_any_sync(kAllLanes, r.slot >= 0 ? r.slot : -1 - lane);
  if (r.slot >= 0) r.row = counters[r.slot] + __popc(same_slot & below);
  if (leads) r.arrival = counters[slots] + __popc(leaders & below);
  __syncwarp();
  if (r.slot >= 0 && (same_slot & below) == 0) counters[r.slot] += __popc(same_slot);
  if (lane == 0) counters[slots] += __popc(leaders);
  __syncwarp();
  return r;
}

// The head of a token's message: each selection a line of its own.
__device__ void write_head(const Params& p, std::byte* message, const Routed& r, int row, int arrival,
                           std::uint32_t number) {
  ptx::store_whole_system(message + plan::kLineBytes * r.k, {static_cast<std::uint32_t>(r.slot),
                                                             static_cast<std::uint32_t>(row),
                                                             static_cast<std::uint32_t>(arrival), number});
}

// Counters of a block that routes: of all tokens so far, then of each warp's.
struct RouteCounters {
  std::int32_t *carry, *of_warps;
  int keys;

  __device__ RouteCounters(const Shared& shared, int slots)
      : carry(shared.words), of_warps(shared.words + slots + 1), keys(slots + 1) {}
  /// A block barrier must follow.
  __device__ void clear(int warps) const {
    for (int i = static_cast<int>(threadIdx.x); i < keys * (warps + 1); i += kLowLatencyThreads) carry[i] = 0;
  }
  __device__ std::int32_t* of(int warp) const { return of_warps + warp * keys; }
  /// Each warp's counts become what comes before it. Every thread; block barriers must stand before and after.
  __device__ void add_up(int warps) const {
    for (int key = static_cast<int>(threadIdx.x); key < keys; key += kLowLatencyThreads) {
      std::int32_t sum = carry[key];
#pragma unroll 4
      for (int w = 0; w < warps; ++w) {
        const std::int32_t count = of(w)[key];
        of(w)[key] = sum;
        sum += count;
      }
      carry[key] = sum;
    }
  }
};

__device__ int slots_of(const Params& p, int rank) { return p.first_copy[rank + 1] - p.first_copy[rank]; }

// How many tokens a batch of a block has, and how they are shared.
struct Batch {
  int steps, of_warp, tokens, warps;
  __device__ Batch(const Params& p, int left) {
    const int of_step = 32 / p.num_topk, most_warps = route_warps(p.max_slots);
    const int wanted = (left + most_warps * of_step - 1) / (most_warps * of_step);
    steps = min(wanted, kRouteSteps);
    of_warp = of_step * steps;
    tokens = min(left, of_warp * most_warps);
    warps = (tokens + of_warp - 1) / of_warp;
  }
};

// A block: which of our tokens go to one destination, in token order. Then says how many. The counters are clear.
__device__ void route_to(const Now& now, const Params& p, const Shared& shared, int dst, const Place& at) {
  __shared__ unsigned long long bad;  // lowest selection that does not exist
  const Common& common = p.common;
  const int me = common.rank, slots = slots_of(p, dst), of_step = 32 / p.num_topk;
  const std::uint32_t number = number_of(now);
  const RouteCounters counters(shared, slots);
  std::byte* const window = shared.peers.window(dst);
  const Messages messages(now, p, window);
  if (threadIdx.x == 0) bad = ~0ull;
  if (at.warp == kLowLatencyWarps - 1) write_signature(now, window, at.lane);
  __syncthreads();
  for (int done = 0; done < p.num_tokens;) {
    const Batch batch(p, p.num_tokens - done);
    const int first = done + at.warp * batch.of_warp;
    Routed routed[kRouteSteps];
    if (at.warp < batch.warps) {
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i)
        if (i < batch.steps)
          routed[i] = route_step(p, shared.peers, counters.of(at.warp), dst, first + i * of_step, slots, at.lane, &bad);
    }
    __syncthreads();
    counters.add_up(batch.warps);
    __syncthreads();
    if (at.warp < batch.warps && bad == ~0ull) {
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i) {
        if (i >= batch.steps) continue;
        const Routed& r = routed[i];
        const unsigned of_token = __match_any_sync(kAllLanes, r.token >= 0 ? r.token : -1 - at.lane);
        const unsigned leader = __ballot_sync(kAllLanes, r.arrival >= 0) & of_token;
        const int arrival = __shfl_sync(kAllLanes, r.arrival, leader != 0 ? __ffs(leader) - 1 : at.lane);
        if (r.token < 0) continue;
        const int row = r.slot >= 0 ? r.row + counters.of(at.warp)[r.slot] : 0;
        write_head(p, messages.of(me, r.token), r, row,
                   leader != 0 ? arrival + counters.of(at.warp)[slots] : -1, number);
      }
    }
    done += batch.tokens;
    if (done == p.num_tokens) break;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < counters.keys * kLowLatencyWarps &&
                                                i < counters.keys * route_warps(p.max_slots);
         i += kLowLatencyThreads)
      counters.of_warps[i] = 0;
    __syncthreads();
  }
  if (bad != ~0ull) {
    if (threadIdx.x != 0) return;
    Announcement& mine = announcement_in(now, window, me);
    mine.bad_selection = static_cast<std::int64_t>(bad);
    mine.bad_expert = expert_of(p, static_cast<std::int64_t>(bad));
    publish(now, &words_in(now, window, me).announced, kBadExpert);
    return;
  }
  for (int line = static_cast<int>(threadIdx.x); line < plan::count_lines(slots); line += kLowLatencyThreads) {
    const auto count = [&](int slot) { return slot < slots ? static_cast<std::uint32_t>(counters.carry[slot]) : 0; };
    const int slot = plan::kLineWords * (line - 1);
    const uint4 words = line == 0 ? uint4{static_cast<std::uint32_t>(p.num_tokens),
                                          static_cast<std::uint32_t>(counters.carry[slots]), 0, number}
                                  : uint4{count(slot), count(slot + 1), count(slot + 2), number};
    ptx::store_whole_system(messages.counts(me) + plan::kLineBytes * line, words);
  }
  // The signature was written before the block's barriers.
  if (threadIdx.x != kLowLatencyThreads - 1) return;
  publish(now, &words_in(now, window, me).announced, kSame);
  count_sent(common, dst, static_cast<std::uint64_t>(counters.carry[slots]) * p.message_bytes);
}

}  // namespace
}  // namespace deep_ep::cuda
