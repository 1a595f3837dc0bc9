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

// The word in our own window by which we hear that all rows of a rank are here. Those of far ranks are passed on by a
// rank of our node, which stores it.
__device__ std::uint64_t* arrived_of(const Now& now, int owner, int source) {
  return &reinterpret_cast<plan::Words*>(now.window(owner) + now.common.layout.words(now.epoch, source))->arrived;
}

// Phase receive: the last block tells the peers that all is sent, and waits for theirs.
__device__ void receive(const Now& now, const DispatchParams& p) {
  const int me = p.common.rank;
  const bool failed = has_failed(now);
  for (int peer = static_cast<int>(threadIdx.x); !failed && peer < p.common.num_ranks;
       peer += static_cast<int>(blockDim.x)) {
    if (!now.active(peer)) continue;
    if (!now.far(peer)) publish(now, arrived_of(now, peer, me), 1);
    std::uint32_t value = 0;
    if (!await(now, arrived_of(now, me, peer), value, peer)) report(now, Fault::kTimeout, peer, 1, 0);
  }
  if (!failed) count_exchange(now, p);
}

}  // namespace
}  // namespace deep_ep::cuda
