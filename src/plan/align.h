// SPDX-License-Identifier: MIT
// Placing regions one after another: the same call sizes a region and says where it is.
#pragma once

#include <cstddef>

#include "plan/macros.h"

namespace deep_ep::plan {

constexpr std::size_t kRegionAlignment = 128;  // two cache lines, and what bulk copies ask for

EP_HOST_DEVICE constexpr std::size_t align_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

/// Takes `bytes` at `end` and moves `end` behind them; returns where they begin.
EP_HOST_DEVICE constexpr std::size_t take(std::size_t& end, std::size_t bytes,
                                          std::size_t alignment = kRegionAlignment) {
  const std::size_t at = align_up(end, alignment);
  end = at + bytes;
  return at;
}

}  // namespace deep_ep::plan
