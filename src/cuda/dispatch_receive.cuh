// SPDX-License-Identifier: MIT
// Dispatch: how its last kernel ends it, once all that this rank sends is written.
#pragma once

#include "cuda/dispatch_routes.cuh"
#include "cuda/progress.cuh"

namespace deep_ep::cuda {
namespace {  // a part of the kernels whose files include it

// The last block, once an exchange has ended well.
__device__ void count_exchange(const Now& now, const DispatchParams& p) {
  const std::uint64_t bytes =
      p.shape.bytes_of_arrival(p.layout) + (p.layout == OutputLayout::kByRank ? p.shape.bytes_of_row(p.layout) : 0);
  const std::int32_t* const tokens = p.tokens_between + p.common.rank * p.common.num_ranks;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x))
    if (now.active(peer)) count_sent(p.common, peer, static_cast<std::uint64_t>(tokens[peer]) * bytes);
  for (int slot = static_cast<int>(threadIdx.x); slot < p.num_slots; slot += static_cast<int>(blockDim.x))
    count_received(p.common, slot, p.slot_rows[slot]);
}

// Phase receive: the last block tells the peers that all is sent, and waits for theirs. `to` names the words there:
// what was acquired since has emptied the caches, and a look at a peer's address would be a trip to memory.
__device__ void receive(const Now& now, const DispatchParams& p, const Destination* to) {
  const int me = p.common.rank;
  const bool failed = has_failed_relaxed(now);  // last_block() has acquired what other blocks reported
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x)) {
    ptx::fence_system();  // release, as last_block() says; whether it failed is read meanwhile
    if (failed || !to[peer].active) continue;
    if (to[peer].arrived != nullptr) publish_fenced(now, to[peer].arrived, 1);
    std::uint32_t value = 0;
    if (!await(now, arrived_of(now, me, peer), value, peer)) report(now, Fault::kTimeout, peer, 1, 0);
  }
  if (!failed) count_exchange(now, p);
}

}  // namespace
}  // namespace deep_ep::cuda
