// SPDX-License-Identifier: MIT
// The words by which ranks tell each other how far they are, and where each lies in a window.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/window.h"

namespace deep_ep::net {

/// The words that a rank writes for another: those of one operation, in the order of plan::Words, and two that stand
/// for the rank as a whole.
enum class Flag : std::uint8_t { kAnnounced, kReplied, kArrived, kFinished, kReleased, kExcluded };
inline constexpr std::size_t kNumFlags = 4;  // of one operation

/// Where a flag that `writer` stores lies in a window.
EP_HOST_DEVICE inline std::size_t place_of(const plan::WindowLayout& layout, Flag flag, std::uint64_t epoch,
                                           int writer) {
  switch (flag) {
    case Flag::kAnnounced: return layout.words(epoch, writer) + offsetof(plan::Words, announced);
    case Flag::kReplied: return layout.words(epoch, writer) + offsetof(plan::Words, replied);
    case Flag::kArrived: return layout.words(epoch, writer) + offsetof(plan::Words, arrived);
    case Flag::kFinished: return layout.words(epoch, writer) + offsetof(plan::Words, finished);
    case Flag::kReleased: return layout.released(writer);
    case Flag::kExcluded: return layout.excluded(writer);
  }
  return 0;
}

}  // namespace deep_ep::net
