// SPDX-License-Identifier: MIT
// How a rank leaves an operation, and tells its peers that the places it used there are free again.
#pragma once

#include "cuda/far.cuh"

namespace deep_ep::cuda {

/// Nobody writes for that operation into our window any more, except ranks that are left out.
__device__ inline bool everybody_sent(const Now& now, std::uint64_t epoch) {
  for (int peer = 0; peer < now.common.num_ranks; ++peer)
    if (now.active(peer) && ptx::load_acquire_system(&now.progress(now.common.rank, peer).sent) < epoch) return false;
  return true;
}

/// One thread: counts on over the operations that have ended, as far as `begun`, and gives what may be said released.
/// One that ended without its data holds back those after it until nobody writes for it any more.
__device__ __noinline__ inline std::uint64_t advance_released(Now now, std::uint64_t begun) {
  State& state = *now.common.state;
  std::uint64_t released = state.released;
  for (; released < begun; ++released) {
    const std::uint64_t next = released + 1, at = next % plan::kOperationsInFlight;
    if (state.ended[at] != next) break;
    if (state.abandoned[at] == next && !everybody_sent(now, next)) break;
  }
  return state.released = released;
}

/// One warp: as advance_released, its loads all at once. `ending`: an operation that counts as ended, or 0.
__device__ inline std::uint64_t advance_released_by_warp(const Now& now, std::uint64_t begun, std::uint64_t ending,
                                                         int lane) {
  constexpr int kDepth = plan::kOperationsInFlight;
  static_assert(kDepth <= 32);
  State& state = *now.common.state;
  const std::uint64_t released = state.released;
  const std::uint64_t ended = state.ended[lane % kDepth], abandoned = state.abandoned[lane % kDepth];
  const std::uint64_t next = released + 1 + static_cast<std::uint64_t>(lane);
  const int at = static_cast<int>(next % kDepth);
  const std::uint64_t ended_next = __shfl_sync(kAllLanes, static_cast<unsigned long long>(ended), at);
  const std::uint64_t abandoned_next = __shfl_sync(kAllLanes, static_cast<unsigned long long>(abandoned), at);
  const bool over = next <= begun && (ended_next == next || ending == next);
  const unsigned ends = __ballot_sync(kAllLanes, !over || abandoned_next == next);
  unsigned long long result = released + static_cast<unsigned>(__ffs(ends) - 1);
  // Lane 31 is never over: no more operations are in flight than half a warp has lanes.
  if (lane == 0 && __ffs(ends) > 1) state.released = result;
  const bool waits = __shfl_sync(kAllLanes, static_cast<int>(over), __ffs(ends) - 1) != 0;
  __syncwarp();
  if (waits && lane == 0) result = advance_released(now, begun);
  return __shfl_sync(kAllLanes, result, 0);
}

/// One thread: tells a far rank. Our reads come before the signal, which is a release.
__device__ inline void tell_far_progress(const Now& now, int peer, std::uint64_t released, std::uint64_t sent) {
  signal(now, peer, static_cast<int>(net::Flag::kReleased), static_cast<std::uint32_t>(released),
         static_cast<std::uint32_t>(sent));
}

/// One thread: tells a peer how far we are. The fence makes both words releases: our reads come before the peer's next
/// writes in the same places.
__device__ inline void tell_progress(const Now& now, int peer, std::uint64_t released, std::uint64_t sent) {
  if (now.far(peer)) return tell_far_progress(now, peer, released, sent);
  Progress& there = now.progress(peer, now.common.rank);
  ptx::fence_system();
  ptx::store_relaxed_system(&there.sent, sent);
  ptx::store_relaxed_system(&there.released, released);
}

/// The last block ends the operation: its places may be used again, and the next one counts on.
__device__ inline void finish(const Now& now) {
  __shared__ std::uint64_t released;
  State& state = *now.common.state;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) state.ended[now.epoch % plan::kOperationsInFlight] = now.epoch;
    const std::uint64_t upto = advance_released_by_warp(now, now.epoch, now.epoch, lane);
    if (lane == 0) released = upto;
  }
  __syncthreads();
  // Other warps, where there are any: thread 0 has to wait for a fence of its own.
  const auto threads = static_cast<int>(blockDim.x);
  for (int peer = (static_cast<int>(threadIdx.x) + threads - 32) % threads; peer < now.common.num_ranks;
       peer += threads)
    tell_progress(now, peer, released, now.epoch);
  if (threadIdx.x != 0) return;
  state.barrier = state.blocks_done = 0;
  state.tickets[0] = state.tickets[1] = 0;
  state.bad_selection = 0;
  state.epoch = now.epoch;
  ptx::fence_system();
  *static_cast<volatile std::uint64_t*>(&now.common.mailbox->completed) = now.common.serial;
}

}  // namespace deep_ep::cuda
