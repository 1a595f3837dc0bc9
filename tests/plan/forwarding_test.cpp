// SPDX-License-Identifier: MIT
// Rails, chunks and units: the arithmetic of what crosses between nodes.
#include "plan/forwarding.h"

#include <gtest/gtest.h>

namespace deep_ep::plan {
namespace {

TEST(Rail, is_the_rank_with_the_same_place_in_nodes_of_one_size) {
  const Topology topology = Topology::from({4}, 8);
  const std::vector<char> nobody(8, 0);
  for (int src = 0; src < 4; ++src) EXPECT_EQ(rail(topology, src, 1, nobody), 4 + src);
  for (int src = 4; src < 8; ++src) EXPECT_EQ(rail(topology, src, 0, nobody), src - 4);
}

TEST(Rail, wraps_around_in_smaller_nodes_and_passes_over_ranks_that_are_left_out) {
  const Topology topology = Topology::from({4, 3, 1}, 8);
  std::vector<char> left_out(8, 0);
  const auto rails = [&](int node) {
    std::vector<int> all;
    for (int src = 0; src < 4; ++src) all.push_back(rail(topology, src, node, left_out));
    return all;
  };
  EXPECT_EQ(rails(1), (std::vector<int>{4, 5, 6, 4}));
  EXPECT_EQ(rails(2), (std::vector<int>{7, 7, 7, 7}));
  left_out[5] = 1;
  EXPECT_EQ(rails(1), (std::vector<int>{4, 6, 4, 6}));
  left_out[7] = 1;
  EXPECT_EQ(rails(2), (std::vector<int>{-1, -1, -1, -1}));
}

TEST(FarMemory, is_part_of_the_plan_where_a_network_is_asked_for) {
  Config config;
  config.arena_bytes = 1 << 20;
  config.ranks_per_node = {2};
  const std::size_t without = config.plan(4).total_bytes;
  config.network.provider = "tcp";
  const MemoryPlan plan = config.plan(4);
  ASSERT_EQ(plan.regions.back().name, "between nodes");
  EXPECT_EQ(plan.total_bytes, without + plan.regions.back().bytes);
  EXPECT_GE(plan.regions.back().bytes, 2 * 4 * kForwardSlots * config.forward_slot_bytes);
  config.ranks_per_node = {};  // one node has nobody to reach
  EXPECT_EQ(config.plan(4).total_bytes, without);
}

TEST(Topology, knows_where_nodes_begin_and_the_place_of_each_rank) {
  const Topology topology = Topology::from({3, 1, 2}, 6);
  EXPECT_EQ(topology.first_rank_of_node, (std::vector<std::int32_t>{0, 3, 4, 6}));
  EXPECT_EQ(topology.member_of(2), 2);
  EXPECT_EQ(topology.member_of(3), 0);
  EXPECT_EQ(topology.member_of(5), 1);
  EXPECT_TRUE(topology.same_node(4, 5));
  EXPECT_FALSE(topology.same_node(2, 3));
}

TEST(Chunking, covers_every_unit_once_and_stays_in_its_slot) {
  for (const std::size_t unit : {16u, 48u, 7520u, 65000u}) {
    for (const std::int64_t units : {0, 1, 2, 7, 1000}) {
      const std::size_t slot = 65536 + kChunkHeadBytes;
      const Chunking chunking = Chunking::of(unit, slot);
      ASSERT_GE(chunking.per_chunk, 1);
      std::int64_t covered = 0;
      for (std::int64_t chunk = 0; chunk < chunking.num_chunks(units); ++chunk) {
        const std::int64_t inside = chunking.units_in(chunk, units);
        EXPECT_GE(inside, 1);
        EXPECT_LE(chunking.chunk_bytes(inside), slot);
        for (std::int64_t i = 0; i < inside; ++i, ++covered) {
          EXPECT_EQ(chunking.chunk_of(covered), chunk);
          EXPECT_EQ(chunking.at(covered), kChunkHeadBytes + static_cast<std::size_t>(i) * unit);
        }
      }
      EXPECT_EQ(covered, units);
    }
  }
  EXPECT_EQ(Chunking::of(5000, 4096).per_chunk, 0);  // does not fit
}

RowShape deep_shape() {
  RowShape shape;
  shape.row_bytes = 7168;
  shape.num_scales = 56;
  shape.num_topk = 8;
  shape.topk_idx_bytes = 8;
  shape.topk_weights = true;
  return shape;
}

TEST(TokenUnit, adds_less_than_two_percent_to_what_the_caller_sends) {
  const RowShape shape = deep_shape();
  const double payload = 7168 + 4 * 56 + 8 * 8 + 4 * 8;  // row, scales, ids, weights
  for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded})
    EXPECT_LE(static_cast<double>(TokenUnit::place(shape, layout).bytes), 1.02 * payload);
}

TEST(TokenUnit, keeps_its_parts_apart) {
  RowShape shape = deep_shape();
  shape.num_side = 2;
  shape.side_bytes[0] = 4;
  shape.side_bytes[1] = 20;
  const TokenUnit unit = TokenUnit::place(shape, OutputLayout::kByExpert);
  EXPECT_GE(unit.scales_at, shape.row_bytes);
  EXPECT_GE(unit.weights_at, unit.scales_at + 4 * 56);
  EXPECT_GE(unit.selections_at, unit.weights_at + 4 * 8);
  EXPECT_GE(unit.arrivals_at, unit.selections_at + 8 * 8);
  EXPECT_GE(unit.token_at, unit.arrivals_at + 4 * 8);
  EXPECT_GE(unit.side_at[0], unit.token_at + 4);
  EXPECT_GE(unit.side_at[1], unit.side_at[0] + 4);
  EXPECT_GE(unit.bytes, unit.side_at[1] + 20);
  EXPECT_EQ(unit.bytes % kUnitAlignment, 0u);
}

}  // namespace
}  // namespace deep_ep::plan
