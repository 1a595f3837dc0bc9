// SPDX-License-Identifier: MIT
// A network in memory between threads of one process, that can be as bad as a real one: for tests.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "net/fabric.h"

namespace deep_ep::net {

/// What the network does to its traffic. Decided for each packet by (seed, source, target, number of the packet on that
/// link) alone, so that a run with the same traffic meets the same faults.
struct LoopbackFaults {
  std::uint64_t seed = 1;
  int max_delay = 0;     // a packet lies still for 0 .. max_delay progress() calls of its target; so packets overtake
  bool tear = false;     // the bytes of a put land in two pieces, the last piece first
  double duplicate = 0;  // share of packets that come twice
  double drop = 0;       // share of packets that never come; their senders do not learn it
  std::size_t immediate_bytes = 8;  // width of notices: 8 or 4
  int queue_depth = 1 << 16;        // packets under way to one target, then put() and message() say false
};

class LoopbackNetwork {
 public:
  virtual ~LoopbackNetwork() = default;

  static std::shared_ptr<LoopbackNetwork> create(int num_ranks, const LoopbackFaults& faults = {},
                                                 std::uint64_t job = 1);
  /// The endpoint of a rank; it keeps the network alive. Once per rank.
  virtual std::unique_ptr<Fabric> open(int rank) = 0;

  // What a test does to it, from any thread
  // -------------------------------------------------------------------------------------------------------------------
  /// The rank's process ends: it moves nothing any more, and the others learn it.
  virtual void kill(int rank) = 0;
  /// The link between two ranks is cut: packets wait in it, both ways, and nobody is told.
  virtual void cut(int a, int b) = 0;
  virtual void mend(int a, int b) = 0;
  /// Bytes that come to a rank as a message, and as a notice, whoever may have made them.
  virtual void inject_message(int target, std::span<const std::byte> wire) = 0;
  virtual void inject_notice(int target, std::uint64_t word) = 0;

  // For ranks that open through open_fabric() with the provider "loopback": the network of a job in this process
  // -------------------------------------------------------------------------------------------------------------------
  static std::shared_ptr<LoopbackNetwork> of_job(std::uint64_t job, int num_ranks);
  /// What networks that of_job() creates from now on do to their traffic.
  static void set_faults(const LoopbackFaults& faults);
  /// The one that of_job() created last, for kill() and cut(); null if it has ended.
  static std::shared_ptr<LoopbackNetwork> latest();
};

}  // namespace deep_ep::net
