// SPDX-License-Identifier: MIT
// How a rank sleeps until a peer has written a flag: flags are polled for a while, then the rank sleeps on its
// doorbell, a futex in its window that every writer of a flag rings.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace deep_ep::net {

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

/// What comes before the first sleep: many polls where every rank has a core of its own; where ranks share cores few,
/// and then the core is offered to the others again and again, which costs less than to be woken.
struct Patience {
  int spins = 0;
  std::chrono::microseconds yield_for{0};
};

/// Polls `ready` until it holds or the deadline passes; returns its last answer. `tick` may cost system calls, so it is
/// called after ten milliseconds and then ten times a second, however often the doorbell rings meanwhile; it may end
/// the wait by returning false.
template <typename Ready, typename Tick>
bool wait_until(Doorbell& doorbell, Deadline deadline, const Patience& patience, const Ready& ready, const Tick& tick) {
  for (int i = 0; i < patience.spins; ++i) {
    if (ready()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (patience.yield_for.count() > 0) {
    for (const Deadline end = std::min(deadline, Clock::now() + patience.yield_for); Clock::now() < end;) {
      if (ready()) return true;
      sched_yield();
    }
  }
  Deadline next_tick = Clock::now() + std::chrono::milliseconds(10);
  for (;;) {
    // The order matters: count, look, sleep. A ring between the look and the sleep changes the count and so ends the
    // sleep.
    const std::uint32_t seen = doorbell.count();
    if (ready()) return true;
    const auto now = Clock::now();
    if (now >= deadline) return ready();
    if (now >= next_tick) {
      if (!tick()) return ready();
      next_tick = now + std::chrono::milliseconds(100);
    }
    doorbell.sleep(seen, std::min(deadline, next_tick));
  }
}

}  // namespace deep_ep::net
