// SPDX-License-Identifier: MIT
// What kernels and a link (link.h) share, in pinned host memory. Host and device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "net/fifo.h"
#include "plan/forwarding.h"

namespace deep_ep::net {

/// What a put brings, by its channel: low-latency data; those below bring a chunk into that slot.
inline constexpr int kDataChannel = plan::kForwardSlots;

/// What the link knows of another rank: forwarding slots between us, as counts that only grow, and its end.
struct PeerWords {
  std::uint32_t free_again[plan::kForwardSlots] = {};  // how often the peer gave back each of its slots
  std::uint32_t landed[plan::kForwardSlots] = {};      // how many chunks of the peer have come into each of ours
  std::uint32_t dead = 0;                              // 1: the rank is known to have ended
};

/// A kernel gives a slot back by a Signal of this number instead of a flag's; `value` is the slot.
inline constexpr int kCreditSignal = 15;

/// Zero is its first state. PeerWords of each rank follow it.
struct KernelEnd {
  FifoMemory commands;
  /// By operation modulo kOperationsInFlight: epoch << 32 | low-latency puts whose bytes have left. Stored by the link.
  alignas(128) std::uint64_t left[plan::kOperationsInFlight] = {};
  /// Likewise, of chunks.
  std::uint64_t chunks_left[plan::kOperationsInFlight] = {};
  alignas(128) std::uint32_t deaths = 0;  // ranks that are known to have ended

  EP_HOST_DEVICE PeerWords* peers() { return reinterpret_cast<PeerWords*>(this + 1); }
  static std::size_t bytes(int num_ranks) { return sizeof(KernelEnd) + sizeof(PeerWords) * num_ranks; }
};

}  // namespace deep_ep::net
