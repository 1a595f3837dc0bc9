// SPDX-License-Identifier: MIT
// Blocks of the arena, above all those whose size is known only after they were taken.
#include "plan/arena.h"

#include <gtest/gtest.h>

#include <vector>

#include "plan/align.h"

namespace deep_ep::plan {
namespace {

constexpr std::size_t kUnit = kRegionAlignment;
constexpr std::size_t kEverywhere = SIZE_MAX;

// An arena of so many units; the last quarter is its landing zone.
std::shared_ptr<Arena> arena_of(std::size_t units) {
  auto memory = std::make_shared<std::vector<std::byte>>(units * kUnit);
  return std::make_shared<Arena>(memory, memory->data(), 0, units * kUnit);
}

TEST(Arena, ASettledReservationKeepsItsFirstBytesAndGivesTheRestBack) {
  const auto arena = arena_of(16);
  Arena::Block block = arena->reserve(8 * kUnit, kEverywhere);
  ASSERT_TRUE(block.owner);
  EXPECT_EQ(block.bytes, 8 * kUnit);
  EXPECT_EQ(arena->in_use(), 8 * kUnit);
  arena->settle(block, 2 * kUnit + 1);
  EXPECT_EQ(block.bytes, 3 * kUnit);
  EXPECT_EQ(arena->in_use(), 3 * kUnit);
  EXPECT_EQ(arena->high_water(), 3 * kUnit) << "what was only reserved was never used";
  EXPECT_EQ(arena->allocate(kUnit, false).at, block.at + 3 * kUnit);
  block.owner.reset();
  EXPECT_EQ(arena->in_use(), 0U);
  EXPECT_EQ(arena->largest_free(), 16 * kUnit);
}

TEST(Arena, AReservationTakesWhatThereIsOutsideTheLandingZone) {
  const auto arena = arena_of(16);
  const Arena::Block first = arena->allocate(kUnit, false);
  const Arena::Block all = arena->reserve(100 * kUnit, kEverywhere);
  EXPECT_EQ(all.at, kUnit);
  EXPECT_EQ(all.bytes, 11 * kUnit);
  EXPECT_FALSE(all.landing);
  EXPECT_FALSE(arena->reserve(kUnit, kEverywhere).owner);
  const Arena::Block landing = arena->allocate(4 * kUnit, true);
  EXPECT_TRUE(landing.owner);
  EXPECT_TRUE(landing.landing);
}

TEST(Arena, AReservationEndsWhereItIsToldTo) {
  const auto arena = arena_of(16);
  const Arena::Block block = arena->reserve(8 * kUnit, 5 * kUnit + 1);
  EXPECT_EQ(block.bytes, 5 * kUnit);
  EXPECT_FALSE(arena->reserve(kUnit, 5 * kUnit).owner);
}

TEST(Arena, AReservationPrefersTheFirstHoleThatHasAllAndElseTheLargest) {
  const auto arena = arena_of(32);
  Arena::Block small = arena->allocate(2 * kUnit, false);
  const Arena::Block between = arena->allocate(kUnit, false);
  Arena::Block large = arena->allocate(5 * kUnit, false);
  const Arena::Block rest = arena->allocate(16 * kUnit, false);
  small.owner.reset(), large.owner.reset();
  EXPECT_EQ(arena->reserve(2 * kUnit, kEverywhere).at, 0U);
  EXPECT_EQ(arena->reserve(3 * kUnit, kEverywhere).at, 3 * kUnit);
  const Arena::Block most = arena->reserve(9 * kUnit, kEverywhere);
  EXPECT_EQ(most.at, 3 * kUnit);
  EXPECT_EQ(most.bytes, 5 * kUnit);
}

}  // namespace
}  // namespace deep_ep::plan
