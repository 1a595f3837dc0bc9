// SPDX-License-Identifier: MIT
// A moment after which a wait ends.
#pragma once

#include <algorithm>
#include <chrono>

namespace deep_ep::bootstrap {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  /// Zero and less: has passed already. Very long timeouts (milliseconds::max()) are cut to a year, which cannot
  /// overflow.
  explicit Deadline(std::chrono::milliseconds timeout)
      : at_(Clock::now() + std::clamp<std::chrono::milliseconds>(timeout, std::chrono::milliseconds(0), kLongest)) {}

  Clock::time_point at() const { return at_; }
  bool passed() const { return Clock::now() >= at_; }

  /// What is left, rounded up so that a wait of this length does not end early, and at most `most`.
  std::chrono::milliseconds left(std::chrono::milliseconds most = std::chrono::hours(1)) const {
    const auto rest = std::chrono::ceil<std::chrono::milliseconds>(at_ - Clock::now());
    return std::clamp<std::chrono::milliseconds>(rest, std::chrono::milliseconds(0), most);
  }

 private:
  static constexpr std::chrono::milliseconds kLongest = std::chrono::hours(24 * 365);
  Clock::time_point at_;
};

}  // namespace deep_ep::bootstrap
