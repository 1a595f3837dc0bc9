// SPDX-License-Identifier: MIT
// How the proxy sleeps until somebody has work for it, or the network has. As net/doorbell.h, but with an event
// descriptor instead of a futex, because one must be able to wait for it and for the network's descriptor at once.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace deep_ep::net {

class Wake {
 public:
  Wake();
  ~Wake();
  Wake(const Wake&) = delete;
  Wake& operator=(const Wake&) = delete;

  /// By anybody, after publishing work.
  void ring();
  /// By the sleeper, before it looks for work for the last time.
  std::uint64_t count() const { return rings_.load(std::memory_order_seq_cst); }
  /// By the sleeper: until the next ring, until `other` (-1: none) is readable, at most `limit`; not at all if count()
  /// has moved on from `seen`.
  void sleep(std::uint64_t seen, int other, std::chrono::microseconds limit);

 private:
  int event_;
  std::atomic<std::uint64_t> rings_{0};
  std::atomic<bool> asleep_{false};
};

}  // namespace deep_ep::net
