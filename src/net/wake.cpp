// SPDX-License-Identifier: MIT
#include "net/wake.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "deep_ep/error.h"

namespace deep_ep::net {

Wake::Wake() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (event_ < 0) throw Error(ErrorCode::kSystem, fmt::format("eventfd: {}", std::strerror(errno)));
}

Wake::~Wake() { ::close(event_); }

void Wake::ring() {
  // Sequentially consistent with sleep(): either the ringer sees the sleeper and wakes it, or the sleeper sees the new
  // count.
  rings_.fetch_add(1, std::memory_order_seq_cst);
  if (!asleep_.load(std::memory_order_seq_cst)) return;
  const std::uint64_t one = 1;
  // It fails only where the counter is full, and then the sleeper wakes anyway.
  [[maybe_unused]] const ssize_t written = ::write(event_, &one, sizeof one);
}

void Wake::sleep(std::uint64_t seen, int other, std::chrono::microseconds limit) {
  asleep_.store(true, std::memory_order_seq_cst);
  if (rings_.load(std::memory_order_seq_cst) == seen) {
    pollfd waits[2] = {{event_, POLLIN, 0}, {other, POLLIN, 0}};
    const timespec timeout{static_cast<time_t>(limit.count() / 1'000'000),
                           static_cast<long>(limit.count() % 1'000'000 * 1000)};
    ppoll(waits, other >= 0 ? 2 : 1, &timeout, nullptr);
    std::uint64_t rings;
    [[maybe_unused]] const ssize_t taken = ::read(event_, &rings, sizeof rings);
  }
  asleep_.store(false, std::memory_order_seq_cst);
}

}  // namespace deep_ep::net
