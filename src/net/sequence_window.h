// SPDX-License-Identifier: MIT
// Takes every sequence number once, in any order: what a network delivers a second time is refused.
#pragma once

#include <cstdint>
#include <vector>

namespace deep_ep::net {

class SequenceWindow {
 public:
  /// How far behind the newest number one may come and still be taken. What is older counts as seen: wrongly refusing
  /// is safe, the wait for it ends at its deadline; wrongly taking is not.
  static constexpr std::uint64_t kReach = 1 << 14;

  /// Whether this number (from 1) comes for the first time; it is then seen.
  bool take(std::uint64_t sequence) {
    if (sequence == 0 || sequence + kReach <= newest_) return false;
    if (seen_.empty()) seen_.resize(kReach);
    if (sequence > newest_) {
      // The places between belong to numbers that have not come yet.
      const std::uint64_t fresh = sequence - newest_ < kReach ? sequence - newest_ : kReach;
      for (std::uint64_t i = 0; i < fresh; ++i) seen_[(sequence - i) % kReach] = false;
      newest_ = sequence;
    }
    const bool is_new = !seen_[sequence % kReach];
    seen_[sequence % kReach] = true;
    return is_new;
  }

 private:
  std::uint64_t newest_ = 0;
  std::vector<bool> seen_;  // by number modulo kReach; empty until the first one
};

}  // namespace deep_ep::net
