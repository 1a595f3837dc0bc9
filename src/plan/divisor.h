// SPDX-License-Identifier: MIT
// Division by a number that is known before: GPUs divide in a hundred cycles, and multiply in a few.
#pragma once

#include <cstdint>

#include "plan/macros.h"

namespace deep_ep::plan {

struct Divisor {
  std::uint32_t by = 1;
  std::uint32_t inverse = 0xffffffff;  // (2^32 - 1) / by

  Divisor() = default;
  explicit Divisor(std::int64_t number) : by(static_cast<std::uint32_t>(number)), inverse(0xffffffff / by) {}

  /// number / by, of any number. What the inverse lacks of 2^32 / by is at most 1, so that the product is one too small
  /// at most.
  EP_HOST_DEVICE std::uint32_t quotient(std::uint32_t number) const {
    const auto low = static_cast<std::uint32_t>(std::uint64_t{number} * inverse >> 32);
    return low + (number - low * by >= by ? 1 : 0);
  }
  EP_HOST_DEVICE int quotient(int number) const {
    return static_cast<int>(quotient(static_cast<std::uint32_t>(number)));
  }
};

}  // namespace deep_ep::plan
