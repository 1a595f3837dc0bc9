// SPDX-License-Identifier: MIT
#include "plan/divisor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>

namespace deep_ep::plan {
namespace {

TEST(Divisor, gives_the_quotient_of_every_number_at_the_borders_and_of_random_ones) {
  std::mt19937 random(7);
  for (const std::uint32_t by :
       {1u,   2u,   3u,     5u,     7u,     8u,          10u,         22u,         32u,         44u,        127u,
        128u, 641u, 65535u, 65536u, 65537u, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xfffffffeu, 0xffffffffu}) {
    const Divisor divisor(by);
    const auto check = [&](std::uint32_t number) {
      ASSERT_EQ(divisor.quotient(number), number / by) << number << " / " << by;
    };
    for (std::uint32_t i = 0; i < 4096; ++i) check(i), check(0xffffffffu - i), check(by * i), check(by * i - 1);
    for (int i = 0; i < 20000; ++i) check(static_cast<std::uint32_t>(random()));
  }
}

TEST(Divisor, that_nobody_has_set_divides_by_one) {
  for (const std::uint32_t number : {0u, 1u, 2u, 0x80000000u, 0xffffffffu})
    EXPECT_EQ(Divisor().quotient(number), number);
}

}  // namespace
}  // namespace deep_ep::plan
