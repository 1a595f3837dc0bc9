// SPDX-License-Identifier: MIT
#include "net/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace deep_ep::net {

namespace {

// Not FUTEX_PRIVATE: the word may be shared with other processes.
long futex(std::uint32_t* word, int operation, std::uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, word, operation, value, timeout, nullptr, 0);
}

}  // namespace

std::uint32_t Doorbell::count() const {
  // Acquire pairs with the ring's release part; flags themselves are acquired by whoever reads them.
  return std::atomic_ref<std::uint32_t>(const_cast<std::uint32_t&>(rings)).load(std::memory_order_acquire);
}

void Doorbell::ring() {
  // Sequentially consistent with sleep(): either the ringer sees the sleeper and wakes it, or the sleeper sees the new
  // count.
  std::atomic_ref<std::uint32_t>(rings).fetch_add(1, std::memory_order_seq_cst);
  if (std::atomic_ref<std::uint32_t>(sleepers).load(std::memory_order_seq_cst) > 0)
    futex(&rings, FUTEX_WAKE, INT_MAX, nullptr);
}

void Doorbell::sleep(std::uint32_t seen, Deadline until) {
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - Clock::now()).count();
  if (left <= 0) return;
  const timespec timeout{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
  std::atomic_ref<std::uint32_t> asleep(sleepers);
  asleep.fetch_add(1, std::memory_order_seq_cst);
  // The kernel compares rings with `seen` under its own lock: a ring in between makes this return at once.
  if (std::atomic_ref<std::uint32_t>(rings).load(std::memory_order_seq_cst) == seen)
    futex(&rings, FUTEX_WAIT, seen, &timeout);
  asleep.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace deep_ep::net
