// SPDX-License-Identifier: MIT
// What lies between the endpoints of the network in memory (loopback.h): packets in a queue at their target's port, and
// the faults that happen to them on the way.
#pragma once

#include <fmt/format.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "net/loopback.h"

namespace deep_ep::net::loopback {

/// Spreads a number over all bits, the same everywhere.
inline std::uint64_t scramble(std::uint64_t x) {
  x += 0x9e37'79b9'7f4a'7c15;
  x = (x ^ x >> 30) * 0xbf58'476d'1ce4'e5b9;
  x = (x ^ x >> 27) * 0x94d0'49bb'1331'11eb;
  return x ^ x >> 31;
}

struct RegionKey {
  std::uint64_t region = 0, bytes = 0, key = 0;
};

struct Packet {
  int source = -1;  // -1: injected
  int target = -1;
  std::uint64_t sequence = 0;
  std::uint64_t due = 0;  // step of the target
  // A put
  const std::byte* from = nullptr;
  RegionKey region;  // of the target
  std::uint64_t to = 0;
  std::size_t bytes = 0;
  std::size_t left = 0;  // of the bytes, from their beginning, that have not landed
  Completions* completions = nullptr;
  std::optional<std::uint64_t> word;
  // A message
  Blob wire;
  // Where the network delivers it twice: whether either copy has been acknowledged.
  std::shared_ptr<std::atomic<bool>> acknowledged;
};

/// A put or a message (0 bytes) that has ended, on its way back to its source.
struct Ack {
  int target;
  Completions* completions;
  std::size_t bytes;
  bool failed;
};

struct Region {
  std::byte* base = nullptr;  // null: no more
  std::size_t bytes = 0;
  std::uint64_t key = 0;
};

/// A descriptor that is readable from a ring until it is silenced.
class Bell {
 public:
  Bell() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (event_ < 0) throw Error(ErrorCode::kSystem, fmt::format("eventfd: {}", std::strerror(errno)));
  }
  ~Bell() { ::close(event_); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  int fd() const { return event_; }
  void ring() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(event_, &one, sizeof one);
  }
  void silence() {
    std::uint64_t rings;
    [[maybe_unused]] const auto taken = ::read(event_, &rings, sizeof rings);
  }

 private:
  int event_;
};

/// What one rank has on the network. Two ports are never locked together.
struct Port {
  std::mutex mutex;
  Bell bell;                      // rung with every packet, acknowledgement and failure that is put here
  std::atomic<bool> dead{false};  // killed or closed; set under the lock
  std::uint64_t step = 0;
  std::vector<Packet> arriving;
  std::vector<Ack> acks;
  std::vector<std::pair<int, std::string>> failures;
  std::vector<Region> regions;
};

struct Link {
  std::atomic<bool> is_cut{false};
  std::atomic<std::uint64_t> packets{0};
};

class Network final : public LoopbackNetwork, public std::enable_shared_from_this<Network> {
 public:
  Network(int num_ranks, const LoopbackFaults& faults, std::uint64_t job)
      : num_ranks(num_ranks), faults(faults), job(job), ports(num_ranks), links(num_ranks * num_ranks) {}

  std::unique_ptr<Fabric> open(int rank) override;

  void kill(int rank) override { end(rank, "its process has ended"); }
  void cut(int a, int b) override { link(a, b).is_cut = link(b, a).is_cut = true; }
  void mend(int a, int b) override;
  void inject_message(int target, std::span<const std::byte> wire) override;
  void inject_notice(int target, std::uint64_t word) override;

  Link& link(int source, int target) { return links[source * num_ranks + target]; }

  /// Takes a rank off the network: afterwards none of its memory is read or written by others. Once more by its own
  /// close(), for what it sent while it was killed.
  void end(int rank, const std::string& reason);
  /// Tells the source of a packet that it has landed, or never will.
  void acknowledge(const Packet& packet, bool failed);
  /// Number of the packet on its link decides its fate. Returns false where the queue is full. A target that has left
  /// fails the packet.
  bool send(Packet packet);

  const int num_ranks;
  const LoopbackFaults faults;
  const std::uint64_t job;
  std::deque<Port> ports;
  std::deque<Link> links;
};

}  // namespace deep_ep::net::loopback
