// SPDX-License-Identifier: MIT
// The queue through which workers, and kernels, hand puts and signals to the proxy thread: 16-byte commands in memory
// that both can write. Host and device code.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "plan/macros.h"

namespace deep_ep::net {

/// One put, with a notice. Offsets and bytes are multiples of kUnit.
struct Command {
  static constexpr std::size_t kUnit = 16;
  static constexpr std::size_t kMaxBytes = ((std::size_t{1} << 24) - 1) * kUnit;  // of one put: 256 MiB
  static constexpr std::uint64_t kMaxOffset = ((std::uint64_t{1} << 32) - 1) * kUnit;
  static constexpr int kMaxRegions = 16;
  static constexpr int kMaxPeers = 1 << 16;

  int peer = 0;
  int region = 0;         // of ours
  int remote_region = 0;  // of the peer's
  int channel = 0;
  std::uint32_t epoch = 0;
  std::uint64_t at = 0;
  std::uint64_t remote_at = 0;
  std::size_t bytes = 0;
};

/// A flag for a peer, and how much of what it publishes goes before it. A message, which kernels cannot send
/// themselves; what it says is the receiver's of the commands to know.
struct Signal {
  int peer = 0;
  int flag = 0;  // at most 15
  std::uint32_t epoch = 0;
  std::uint32_t value = 0, puts = 0;
  std::size_t payload_bytes = 0;  // a multiple of Command::kUnit
};

/// Either of them as it lies in the queue.
// A put:
//   word 0  [ lap: 1 | 0: 3 | peer: 16 | channel: 4 | region: 4 | remote region: 4 | bytes / 16: 24 | epoch: 8 ]
//   word 1  [ offset / 16: 32 | remote offset / 16: 32 ]
// A signal:
//   word 0  [ lap: 1 | 1: 3 | peer: 16 | flag: 4 | 0: 8 | payload bytes / 16: 24 | epoch: 8 ]
//   word 1  [ value: 32 | puts: 32 ]
// Of the epoch the low bits travel.
struct PackedCommand {
  static constexpr std::uint64_t kIsSignal = std::uint64_t{1} << 60;

  std::uint64_t word0 = 0, word1 = 0;

  static EP_HOST_DEVICE PackedCommand of(const Command& command, bool lap) {
    PackedCommand packed;
    packed.word0 = static_cast<std::uint64_t>(lap) << 63 | static_cast<std::uint64_t>(command.peer) << 44 |
                   static_cast<std::uint64_t>(command.channel) << 40 |
                   static_cast<std::uint64_t>(command.region) << 36 |
                   static_cast<std::uint64_t>(command.remote_region) << 32 |
                   static_cast<std::uint64_t>(command.bytes / Command::kUnit) << 8 | (command.epoch & 0xff);
    packed.word1 = command.at / Command::kUnit << 32 | command.remote_at / Command::kUnit;
    return packed;
  }

  static EP_HOST_DEVICE PackedCommand of(const Signal& signal, bool lap) {
    PackedCommand packed;
    packed.word0 = static_cast<std::uint64_t>(lap) << 63 | kIsSignal | static_cast<std::uint64_t>(signal.peer) << 44 |
                   static_cast<std::uint64_t>(signal.flag) << 40 |
                   static_cast<std::uint64_t>(signal.payload_bytes / Command::kUnit) << 8 | (signal.epoch & 0xff);
    packed.word1 = static_cast<std::uint64_t>(signal.value) << 32 | signal.puts;
    return packed;
  }

  EP_HOST_DEVICE bool lap() const { return word0 >> 63 != 0; }
  EP_HOST_DEVICE bool is_signal() const { return (word0 & kIsSignal) != 0; }

  /// `near`: an epoch at most 127 away from the command's, of which only the low bits travel.
  EP_HOST_DEVICE Signal unpack_signal(std::uint32_t near) const {
    Signal signal;
    signal.peer = static_cast<int>(word0 >> 44 & 0xffff);
    signal.flag = static_cast<int>(word0 >> 40 & 15);
    signal.payload_bytes = static_cast<std::size_t>(word0 >> 8 & 0xffffff) * Command::kUnit;
    signal.epoch = epoch_near(near);
    signal.value = static_cast<std::uint32_t>(word1 >> 32);
    signal.puts = static_cast<std::uint32_t>(word1);
    return signal;
  }
  EP_HOST_DEVICE Command unpack(std::uint32_t near) const {
    Command command;
    command.peer = static_cast<int>(word0 >> 44 & 0xffff);
    command.channel = static_cast<int>(word0 >> 40 & 15);
    command.region = static_cast<int>(word0 >> 36 & 15);
    command.remote_region = static_cast<int>(word0 >> 32 & 15);
    command.bytes = static_cast<std::size_t>(word0 >> 8 & 0xffffff) * Command::kUnit;
    command.epoch = epoch_near(near);
    command.at = (word1 >> 32) * Command::kUnit;
    command.remote_at = (word1 & 0xffffffff) * Command::kUnit;
    return command;
  }

 private:
  EP_HOST_DEVICE std::uint32_t epoch_near(std::uint32_t near) const {
    const auto ahead = static_cast<std::uint8_t>((word0 & 0xff) - near + 128);
    return near + ahead - 128;
  }
};
static_assert(sizeof(PackedCommand) == 16);

/// The queue's memory; zero is its first state. For kernels it lies in pinned, mapped host memory.
//
// Slots are taken in turn. A command is there when its lap bit is the one of this round (1 in the first, then 0, 1,
// ..), so nothing is ever cleared. A producer reserves a number (its own counter: producers of one queue share one,
// which lies wherever their atomics are fast), waits until number < taken + kCapacity, writes word 1, and then stores
// word 0 with release, system scope on a device; or both by one 16-byte release store. The proxy loads word 0 with
// acquire, so it sees word 1, and all bytes of the put that its producer wrote or acquired before.
struct FifoMemory {
  static constexpr std::uint64_t kCapacity = 2048;

  alignas(128) std::uint64_t taken = 0;  // commands that the proxy has read; it stores this with release
  alignas(128) PackedCommand slots[kCapacity] = {};

  /// Where kernels write: the operation that they are in, before its first command. Host threads tell the proxy by
  /// Proxy::set_epoch().
  alignas(128) std::uint64_t epoch = 0;

  static EP_HOST_DEVICE bool lap_of(std::uint64_t number) { return (number / kCapacity & 1) == 0; }
};

/// Host threads that write one queue; any number of them at once.
class FifoWriter {
 public:
  explicit FifoWriter(FifoMemory& memory) : memory_(memory) {}

  /// A Command or a Signal. False: full, nothing was written.
  template <class Any>
  bool push(const Any& command) {
    std::uint64_t number = reserved_.load(std::memory_order_relaxed);
    do {
      // Acquire: the proxy has read the slot's last command before we overwrite it.
      const std::uint64_t taken = std::atomic_ref(memory_.taken).load(std::memory_order_acquire);
      if (number >= taken + FifoMemory::kCapacity) return false;
    } while (!reserved_.compare_exchange_weak(number, number + 1, std::memory_order_relaxed));
    const PackedCommand packed = PackedCommand::of(command, FifoMemory::lap_of(number));
    PackedCommand& slot = memory_.slots[number % FifoMemory::kCapacity];
    std::atomic_ref(slot.word1).store(packed.word1, std::memory_order_relaxed);
    // Release: word 1, and the put's bytes, go before.
    std::atomic_ref(slot.word0).store(packed.word0, std::memory_order_release);
    return true;
  }

  std::uint64_t pushed() const { return reserved_.load(std::memory_order_relaxed); }

 private:
  FifoMemory& memory_;
  alignas(128) std::atomic<std::uint64_t> reserved_{0};
};

/// The one thread that reads a queue.
class FifoReader {
 public:
  explicit FifoReader(FifoMemory& memory) : memory_(memory) {}

  bool is_empty() const { return !next_is_there(); }
  /// Relaxed: a number, publishes nothing.
  std::uint64_t epoch() const { return std::atomic_ref(memory_.epoch).load(std::memory_order_relaxed); }

  std::optional<PackedCommand> pop() {
    if (!next_is_there()) return std::nullopt;
    PackedCommand& slot = memory_.slots[next_ % FifoMemory::kCapacity];
    PackedCommand packed;
    packed.word0 = std::atomic_ref(slot.word0).load(std::memory_order_relaxed);
    packed.word1 = std::atomic_ref(slot.word1).load(std::memory_order_relaxed);
    // Release: our loads of the slot come before its next writer's stores.
    std::atomic_ref(memory_.taken).store(++next_, std::memory_order_release);
    return packed;
  }

 private:
  bool next_is_there() const {
    const PackedCommand& slot = memory_.slots[next_ % FifoMemory::kCapacity];
    // Acquire: pairs with the writer's release of word 0.
    const std::uint64_t word0 = std::atomic_ref(const_cast<std::uint64_t&>(slot.word0)).load(std::memory_order_acquire);
    return (word0 >> 63 != 0) == FifoMemory::lap_of(next_);
  }

  FifoMemory& memory_;
  std::uint64_t next_ = 0;
};

}  // namespace deep_ep::net
