// SPDX-License-Identifier: MIT
// Counts puts by (source, channel, epoch): how a receiver knows that all of something is here, in whatever order it
// came.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "net/fabric.h"

namespace deep_ep::net {

/// Counts of the last kDepth epochs, places taken in turn: an epoch's place is free once everybody has left that epoch,
/// which the protocol above sees to (docs/protocol.md). For one thread.
class Arrivals {
 public:
  static constexpr std::uint32_t kDepth = 16;

  explicit Arrivals(int num_ranks) : counts_(num_ranks) {}

  /// One more; returns the count with it, or 0 for an epoch that has lost its place (it is not counted).
  std::uint64_t add(int source, const Notice& notice) {
    Count& count = place(source, notice);
    if (count.epoch > notice.epoch) return 0;
    if (count.epoch < notice.epoch) count = {notice.epoch, 0};
    return ++count.puts;
  }

  std::uint64_t count(int source, const Notice& notice) const {
    const Count& count = const_cast<Arrivals*>(this)->place(source, notice);
    return count.epoch == notice.epoch ? count.puts : 0;
  }

 private:
  struct Count {
    std::uint32_t epoch = 0;
    std::uint64_t puts = 0;
  };
  Count& place(int source, const Notice& notice) { return counts_[source][notice.epoch % kDepth][notice.channel]; }

  std::vector<std::array<std::array<Count, kNumChannels>, kDepth>> counts_;  // [source][epoch][channel]
};

}  // namespace deep_ep::net
