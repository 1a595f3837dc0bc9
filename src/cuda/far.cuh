// SPDX-License-Identifier: MIT
// Ranks that share no memory with this one: kernels write what they send into pinned memory and hand it to the proxy
// thread (net/proxy.h), rows as puts, flags as signals. What comes from there lies in pinned memory too, where the link
// (net/link.h) stores the flags as neighbours store theirs: waiting is the same for both.
#pragma once

#include "cuda/wait.cuh"
#include "net/flag.h"
#include "net/kernel_end.h"

namespace deep_ep::cuda {

/// One thread: writes a net::Command or net::Signal into the queue. What this thread wrote before, and what it has from
/// others by a barrier, is seen by the proxy and by the network. False: the queue was full to the deadline.
template <class Any>
__device__ __noinline__ bool push(Now now, const Any& command) {
  net::FifoMemory& queue = now.common.far.end->commands;
  unsigned long long* const pushed = &now.common.far.pushed->commands;
  unsigned long long number = *static_cast<volatile unsigned long long*>(pushed);
  for (;;) {
    // Acquire: the proxy has read the slot's last command before we overwrite it.
    if (number >= ptx::load_acquire_system(&queue.taken) + net::FifoMemory::kCapacity) {
      if (ptx::nanoseconds() > now.deadline) {
        report(now, Fault::kTimeout, command.peer, 1, 0);
        return false;
      }
      number = *static_cast<volatile unsigned long long*>(pushed);
      continue;
    }
    const unsigned long long seen = atomicCAS(pushed, number, number + 1);
    if (seen == number) break;
    number = seen;
  }
  ptx::store_relaxed_system(&queue.epoch, now.epoch);
  const net::PackedCommand packed = net::PackedCommand::of(command, net::FifoMemory::lap_of(number));
  net::PackedCommand& slot = queue.slots[number % net::FifoMemory::kCapacity];
  ptx::store_relaxed_system(&slot.word1, packed.word1);
  ptx::store_release_system(&slot.word0, packed.word0);  // as FifoWriter::push()
  return true;
}

/// One thread: what the proxy is to tell a far rank in this operation; `flag` is a net::Flag or kCreditSignal. What
/// this thread wrote and read before comes before it.
__device__ inline void signal(const Now& now, int peer, int flag, std::uint32_t value, std::uint32_t puts = 0,
                              std::size_t payload_bytes = 0) {
  net::Signal signal;
  signal.peer = peer;
  signal.flag = flag;
  signal.epoch = static_cast<std::uint32_t>(now.epoch);
  signal.value = value;
  signal.puts = puts;
  signal.payload_bytes = plan::align_up(payload_bytes, net::Command::kUnit);
  push(now, signal);
}

/// One thread: publish() for a peer near or far. `payload_bytes`: of our announcement or reply there, which goes with
/// the flag; `puts`: of low-latency data to that peer, that it stands behind.
__device__ inline void publish_to(const Now& now, int peer, net::Flag flag, std::uint32_t value,
                                  std::size_t payload_bytes = 0, std::uint32_t puts = 0) {
  if (now.far(peer)) return signal(now, peer, static_cast<int>(flag), value, puts, payload_bytes);
  std::byte* const at =
      now.control(peer, now.common.rank) + net::place_of(now.common.layout, flag, now.epoch, now.common.rank);
  publish(now, reinterpret_cast<std::uint64_t*>(at), value);
}

/// Our low-latency data for a far rank, on its way: laid out as the slots there.
__device__ inline std::size_t staging_at(const Common& common, int peer, int ticket) {
  return common.layout.low_latency_ticket_bytes * (static_cast<std::size_t>(ticket) * common.num_ranks + peer);
}
__device__ inline std::byte* staging_of(const Common& common, int peer, int ticket) {
  return common.far.staging + staging_at(common, peer, ticket);
}

/// Low-latency data of far ranks that has come: laid out as the slots of our window.
__device__ inline std::byte* far_slots_of(const Common& common, int ticket) {
  return common.far.slots + common.layout.low_latency_ticket_bytes * ticket;
}

/// One thread: sends low-latency data to a far rank: what lies at `at` of its staging memory of this ticket goes to the
/// same place of its slots. Multiples of 16.
__device__ inline void put_low_latency(const Now& now, int peer, int ticket, std::size_t at, std::size_t bytes) {
  const Common& common = now.common;
  net::Command put;
  put.peer = peer;
  put.region = common.far.staging_region;
  put.remote_region = common.peers[peer].slots_region;
  put.channel = net::kDataChannel;
  put.epoch = static_cast<std::uint32_t>(now.epoch);
  put.at = staging_at(common, peer, ticket) + at;
  put.remote_at = common.layout.low_latency_ticket_bytes * ticket + at;
  put.bytes = bytes;
  if (push(now, put)) count_put(common, peer, bytes);
}

/// One thread: so many puts of this operation more. Whoever takes the staging memory again waits until they have left.
__device__ inline void count_puts(const Now& now, std::uint32_t puts) {
  unsigned long long* const count = &now.common.far.pushed->puts[now.epoch % plan::kOperationsInFlight];
  atomicMax(count, static_cast<unsigned long long>(now.epoch) << 32);
  atomicAdd(count, static_cast<unsigned long long>(puts));
}

/// One thread: the network has read what that operation sent from our staging memory. False: not by the deadline.
__device__ inline bool await_left(const Now& now, std::uint64_t epoch) {
  const Far& far = now.common.far;
  const int at = static_cast<int>(epoch % plan::kOperationsInFlight);
  const unsigned long long puts = far.end == nullptr ? 0 : __ldcg(&far.pushed->puts[at]);
  if (epoch == 0 || puts >> 32 != epoch || (puts & 0xffffffff) == 0) return true;  // it sent nothing
  // Acquire: our next writes come after the network's reads.
  while (ptx::load_acquire_system(&far.end->left[at]) < puts) {
    if (ptx::nanoseconds() <= now.deadline) continue;
    report(now, Fault::kTimeout, now.common.rank, 1, 0);
    return false;
  }
  return true;
}

}  // namespace deep_ep::cuda
