// SPDX-License-Identifier: MIT
// Which slots rows take when they come home in low latency on hosts.
#include "plan/home_slots.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace deep_ep::plan {
namespace {

using Numbers = std::vector<std::int32_t>;

HomeSlots slots_of(const Numbers& dst_rank, int topk, bool one_row_per_rank) {
  return make_home_slots(
      {dst_rank.data(), static_cast<std::int64_t>(dst_rank.size()) / topk, topk, 3, one_row_per_rank});
}

const Numbers kThreeTokens = {2, 0, 2, /**/ -1, -1, -1, /**/ 0, 2, -1};

TEST(HomeSlots, AreSideBySideForEachRankInTheOrderOfTokensAndSelections) {
  const HomeSlots slots = slots_of(kThreeTokens, 3, false);
  EXPECT_EQ(slots.first, (Numbers{0, 2, 2, 5}));
  EXPECT_EQ(slots.of, (Numbers{2, 0, 3, -1, -1, -1, 1, 4, -1}));
}

TEST(HomeSlots, ATokensSelectionsOnOneRankShareOneWhereItsRowsAreJoined) {
  const HomeSlots slots = slots_of(kThreeTokens, 3, true);
  EXPECT_EQ(slots.first, (Numbers{0, 2, 2, 4}));
  EXPECT_EQ(slots.of, (Numbers{2, 0, 2, -1, -1, -1, 1, 3, -1}));
}

TEST(HomeSlots, NoTokensTakeNone) {
  const HomeSlots slots = slots_of({}, 3, false);
  EXPECT_EQ(slots.first, (Numbers{0, 0, 0, 0}));
  EXPECT_TRUE(slots.of.empty());
}

}  // namespace
}  // namespace deep_ep::plan
