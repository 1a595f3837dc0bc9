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

// The head of a token's message: every lane its selection, the lane of selection 0 the arrival.
__device__ void write_head(const Params& p, std::byte* message, const Routed& r, int row, int arrival) {
  reinterpret_cast<std::int32_t*>(message + p.message.slots_at)[r.k] = r.slot;
  reinterpret_cast<std::int32_t*>(message + p.message.rows_at)[r.k] = row;
  if (r.k == 0) *reinterpret_cast<std::int32_t*>(message + p.message.src_token_at) = arrival;
}

// A block: which of our tokens go to one destination, in token order. Then says so, and how many of them there are.
__device__ void route_to(const Now& now, const Params& p, const Shared& shared, int dst, const Place& at) {
  __shared__ unsigned long long bad;  // lowest selection that does not exist
  const Common& common = p.common;
  const int me = common.rank, slots = p.first_copy[dst + 1] - p.first_copy[dst], keys = slots + 1;
  const int warps = route_warps(p.max_slots);
  const int of_step = 32 / p.num_topk, of_warp = of_step * kRouteSteps, of_batch = of_warp * warps;
  std::int32_t* const carry = shared.words;  // over the tokens so far
  std::int32_t* const counters = carry + keys;
  std::byte* const window = shared.peers.window(dst);
  if (threadIdx.x == 0) bad = ~0ull;
  if (at.warp == kLowLatencyWarps - 1) write_signature(now, window, at.lane);
  for (int i = static_cast<int>(threadIdx.x); i < keys; i += kLowLatencyThreads) carry[i] = 0;
  for (int batch = 0; batch < p.num_tokens; batch += of_batch) {
    const int left = p.num_tokens - batch;
    const int working = left < of_batch ? (left + of_warp - 1) / of_warp : warps;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < keys * working; i += kLowLatencyThreads) counters[i] = 0;
    __syncthreads();
    Routed routed[kRouteSteps];
    const int first = batch + at.warp * of_warp;
    if (at.warp < working) {
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i)
        routed[i] =
            route_step(p, shared.peers, counters + at.warp * keys, dst, first + i * of_step, slots, at.lane, &bad);
    }
    __syncthreads();
    for (int key = static_cast<int>(threadIdx.x); key < keys; key += kLowLatencyThreads) {
      std::int32_t sum = carry[key];
#pragma unroll 8
      for (int w = 0; w < working; ++w) {
        const std::int32_t count = counters[w * keys + key];
        counters[w * keys + key] = sum;
        sum += count;
      }
      carry[key] = sum;
    }
    __syncthreads();
    if (at.warp >= working) continue;
#pragma unroll
    for (int i = 0; i < kRouteSteps; ++i) {
      const Routed& r = routed[i];
      const unsigned of_token = __match_any_sync(kAllLanes, r.token >= 0 ? r.token : -1 - at.lane);
      const unsigned leader = __ballot_sync(kAllLanes, r.arrival >= 0) & of_token;
      const int arrival = __shfl_sync(kAllLanes, r.arrival, leader != 0 ? __ffs(leader) - 1 : at.lane);
      if (r.token < 0) continue;
      const int row = r.slot >= 0 ? r.row + counters[at.warp * keys + r.slot] : 0;
      write_head(p, message_of(now, p, window, me, r.token), r, row,
                 leader != 0 ? arrival + counters[at.warp * keys + slots] : -1);
    }
  }
  __syncthreads();
  std::int32_t* const tokens = announced_tokens_in(now, window, me);
  for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kLowLatencyThreads)
    tokens[common.num_ranks + slot] = carry[slot];
  if (threadIdx.x == 0) {
    tokens[dst] = carry[slots];
    count_sent(common, dst, static_cast<std::uint64_t>(carry[slots]) * p.message.bytes);
  }
  __syncthreads();  // the block's writes, before the fence of lanes 0 and 1
  plan::Words& words = words_in(now, window, me);
  if (at.warp != 0) return;
  if (bad == ~0ull) {
    __threadfence_system();
    auto* const word = static_cast<volatile std::uint64_t*>(at.lane == 0 ? &words.arrived : &words.announced);
    if (at.lane < 2) *word = now.epoch << 32 | static_cast<std::uint32_t>(at.lane == 0 ? p.num_tokens : kSame);
    return;
  }
  if (at.lane != 0) return;
  Announcement& mine = announcement_in(now, window, me);
  mine.bad_selection = static_cast<std::int64_t>(bad);
  mine.bad_expert = expert_of(p, static_cast<std::int64_t>(bad));
  publish(now, &words.announced, kBadExpert);
}

}  // namespace
}  // namespace deep_ep::cuda
