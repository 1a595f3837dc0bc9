// SPDX-License-Identifier: MIT
// Chunks between a rank and a far one (plan/forwarding.h), as kernels take slots for them, send them, and take them
// out. Nothing here waits: whoever packs for others also takes out what they send, and goes from one to the other.
#pragma once

#include "cuda/far.cuh"
#include "plan/forwarding.h"

namespace deep_ep::cuda {

__device__ inline std::size_t slot_at(const Common& common, int peer, int slot) {
  return (static_cast<std::size_t>(peer) * plan::kForwardSlots + slot) * common.far.slot_bytes;
}

/// Where a chunk for that slot of the peer is put together, in pinned memory.
__device__ inline std::byte* chunk_to(const Common& common, int peer, int slot) {
  return common.far.chunks + slot_at(common, peer, slot);
}
/// Where a chunk of the peer lies that has come into that slot of ours.
__device__ inline const std::byte* chunk_from(const Common& common, int peer, int slot) {
  return common.far.inbox + slot_at(common, peer, slot);
}

/// One thread: that slot at the peer, if it is free; it is ours to fill then. Several blocks may ask for it.
__device__ inline bool take_slot(const Common& common, int peer, int slot) {
  // Acquire: the peer has read what the slot held before, and so has the network what lies here for it.
  const std::uint32_t free_again = ptx::load_acquire_system(&common.far.end->peers()[peer].free_again[slot]);
  return atomicCAS(&common.far.slot_use[peer].taken[slot], free_again, free_again + 1) == free_again;
}

/// One thread: a free slot at a peer for a chunk of this stream, now ours to fill; -1: none. Several blocks may ask for
/// slots of the same peer.
__device__ inline int take_slot(const Common& common, int peer, plan::Stream stream) {
  const bool requests = stream == plan::Stream::kRequests;
  const int begin = requests ? plan::kRequestSlot : plan::kRequestSlot + 1;
  const int end = requests ? plan::kRequestSlot + 1 : plan::kForwardSlots;
  for (int slot = begin; slot < end; ++slot)
    if (take_slot(common, peer, slot)) return slot;
  return -1;
}

/// One thread: a slot that was taken is not needed after all.
__device__ inline void leave_slot(const Common& common, int peer, int slot) {
  atomicSub(&common.far.slot_use[peer].taken[slot], 1u);
}

/// One thread, after a block barrier behind the chunk's bytes: sends it off. Whole multiples of 16 bytes travel.
__device__ inline void put_chunk(const Now& now, int peer, int slot, const plan::ChunkHead& head) {
  const Common& common = now.common;
  *reinterpret_cast<plan::ChunkHead*>(chunk_to(common, peer, slot)) = head;
  net::Command put;
  put.peer = peer;
  put.region = common.far.chunk_region;
  put.remote_region = common.peers[peer].inbox_region;
  put.channel = slot;
  put.epoch = static_cast<std::uint32_t>(now.epoch);
  put.at = slot_at(common, peer, slot);
  put.remote_at = slot_at(common, common.rank, slot);
  put.bytes = plan::align_up(head.bytes, net::Command::kUnit);
  if (push(now, put)) count_put(common, peer, put.bytes);
}

/// One thread: the slot of ours is free again for its source.
__device__ inline void give_back(const Now& now, int source, int slot) {
  signal(now, source, net::kCreditSignal, static_cast<std::uint32_t>(slot));
}

/// A chunk has come into that slot of ours that nobody has looked at, of this operation or an earlier one.
__device__ inline bool has_landed(const Now& now, int source, int slot) {
  const Common& common = now.common;
  // Acquire: the chunk's bytes. A slot holds one chunk until it is given back.
  if (ptx::load_acquire_system(&common.far.end->peers()[source].landed[slot]) == common.far.slot_use[source].seen[slot])
    return false;
  return __ldcg(reinterpret_cast<const unsigned long long*>(chunk_from(common, source, slot))) <= now.epoch;
}

/// One thread, the only one for this slot, after has_landed(): the chunk is the caller's until it gives the slot back.
/// False: it was of an earlier operation, and the slot is given back already.
__device__ inline bool take_landed(const Now& now, int source, int slot) {
  const Common& common = now.common;
  ++common.far.slot_use[source].seen[slot];
  if (__ldcg(reinterpret_cast<const unsigned long long*>(chunk_from(common, source, slot))) == now.epoch) return true;
  give_back(now, source, slot);
  return false;
}

}  // namespace deep_ep::cuda
