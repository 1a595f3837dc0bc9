// SPDX-License-Identifier: MIT
// What kernels count for Statistics: a few additions per operation, which nobody waits for. Relaxed atomics: the
// numbers publish nothing, and the host may read or clear them at any time.
#pragma once

#include "cuda/exchange.h"

namespace deep_ep::cuda {

__device__ inline void add_relaxed(std::uint64_t* counter, std::uint64_t value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}

/// Bytes that this rank wrote for `peer`.
__device__ inline void count_sent(const Common& common, int peer, std::uint64_t bytes) {
  add_relaxed(&common.counters.peers[peer].bytes_sent, bytes);
}

/// Bytes that this rank handed to the network for `peer`.
__device__ inline void count_put(const Common& common, int peer, std::uint64_t bytes) {
  add_relaxed(&common.counters.peers[peer].network_bytes, bytes);
}

/// Rows that came for an expert of ours.
__device__ inline void count_received(const Common& common, int slot, std::int32_t rows) {
  add_relaxed(&common.counters.rows_per_slot[slot], static_cast<std::uint64_t>(rows));
}

/// A wait for `peer` that was not over at once.
__device__ inline void count_wait(const Common& common, int peer, std::uint64_t nanoseconds) {
  Statistics::Peer& of = common.counters.peers[peer];
  add_relaxed(&of.waits, 1);
  add_relaxed(&of.wait_ns_sum, nanoseconds);
  atomicMax(reinterpret_cast<unsigned long long*>(&of.wait_ns_max), static_cast<unsigned long long>(nanoseconds));
}

}  // namespace deep_ep::cuda
