// SPDX-License-Identifier: MIT
#include "plan/tuning.h"

#include <gtest/gtest.h>

namespace deep_ep::plan {
namespace {

TEST(Tuning, AnExchangeOverALinkTakesTheSmsThatFillItAndThoseThatKeepPaceNearby) {
  // 350 GB/s by SMs of 42: nine; as many rows stay here as leave.
  EXPECT_EQ(default_sms({1, 1}, 132), 18);
  EXPECT_EQ(full_rate({1, 1}).far, 9);
  // One row of eight stays here: nine for the link, two beside them.
  EXPECT_EQ(default_sms({1, 7}, 132), 11);
}

TEST(Tuning, RanksOfOneGpuShareItsMemoryAndItsSms) {
  EXPECT_EQ(default_sms({2, 0}, 66), 24);
  EXPECT_EQ(default_sms({8, 0}, 16), 6);
  EXPECT_EQ(default_sms({1, 0}, 20), 20) << "never more than there are";
}

TEST(Tuning, FewBlocksWriteEverywhereAndEnoughHaveOneRoleEach) {
  const Neighbourhood pair{1, 1};
  EXPECT_EQ(roles_of(8, pair, false).far, 0);
  EXPECT_EQ(roles_of(8, pair, false).moving, 8);
  for (int blocks : {18, 24, 132}) {
    EXPECT_EQ(roles_of(blocks, pair, false).moving, 18) << blocks;
    EXPECT_EQ(roles_of(blocks, pair, false).far, 9) << blocks;
  }
  EXPECT_EQ(roles_of(16, pair, false).moving, 16);
  EXPECT_EQ(roles_of(16, pair, false).far, 8) << "nearly a link's rate, and nobody waits for it nearby";
  EXPECT_EQ(roles_of(14, pair, false).far, 0);
  for (int blocks : {16, 24, 132}) {
    EXPECT_EQ(roles_of(blocks, pair, true).far, 0) << "who quantises a row writes it everywhere";
    EXPECT_EQ(roles_of(blocks, pair, true).moving, 15) << blocks;
  }
  EXPECT_EQ(roles_of(8, pair, true).moving, 8);
  EXPECT_EQ(roles_of(24, {4, 0}, false).moving, 24);
}

TEST(Tuning, ASlowLinkTakesOneSm) {
  Rates rates;
  rates.of_link = 25;
  EXPECT_EQ(full_rate({1, 1}, rates).far, 1);
  EXPECT_EQ(full_rate({1, 1}, rates).moving, 2);
}

}  // namespace
}  // namespace deep_ep::plan
