// SPDX-License-Identifier: MIT
// How a rank sleeps until a peer has written a flag: flags are polled for a while, then the rank sleeps on its
// doorbell, a futex in its window that every writer of a flag rings.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace deep_ep::host {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

/// Lies in shared memory; zero is its first state.
struct Doorbell {
  alignas(64) std::uint32_t rings = 0;
  alignas(64) std::uint32_t sleepers = 0;

  /// By a writer, after the release store of its flag.
  void ring();
  /// By the owner: sleeps until the next ring, at most until `until`, unless rings has moved on from `seen`.
  void sleep(std::uint32_t seen, Deadline until);

  std::uint32_t count() const;
};

/// Polls `ready` until it holds or the deadline passes; returns its last answer. `spins` polls come before the first
/// sleep: few where ranks share cores. `tick` is called about ten times a second while asleep; it may end the wait by
/// returning false.
template <typename Ready, typename Tick>
bool wait_until(Doorbell& doorbell, Deadline deadline, int spins, const Ready& ready, const Tick& tick) {
  for (int i = 0; i < spins; ++i) {
    if (ready()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  for (;;) {
    // The order matters: count, look, sleep. A ring between the look and the sleep changes the count and so ends the
    // sleep.
    const std::uint32_t seen = doorbell.count();
    if (ready()) return true;
    const auto now = Clock::now();
    if (now >= deadline || !tick()) return ready();
    doorbell.sleep(seen, std::min(deadline, now + std::chrono::milliseconds(100)));
  }
}

}  // namespace deep_ep::host
