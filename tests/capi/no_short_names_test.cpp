// SPDX-License-Identifier: MIT
// A program that has its own FP8, BF16 and FP32 turns the short names off.
#define DEEP_EP_NO_SHORT_NAMES
#include "deep_ep.h"

namespace {
constexpr int FP8 = -8;    // NOLINT(readability-identifier-naming)
constexpr int BF16 = -16;  // NOLINT(readability-identifier-naming)
constexpr int FP32 = -32;  // NOLINT(readability-identifier-naming)
}  // namespace

#include <gtest/gtest.h>

TEST(CApi, short_names_can_be_turned_off) {
  EXPECT_EQ(FP8 + BF16 + FP32, -56);
  EXPECT_EQ(static_cast<int>(DEEP_EP_FP8), 1);
}
