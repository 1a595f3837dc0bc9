// SPDX-License-Identifier: MIT
// Combine against the oracle, bit for bit: every order of summation, biases, weights, weights that travel home.
#include <gtest/gtest.h>

#include <algorithm>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

using MatrixParam = std::tuple<int, DType, OutputLayout>;
class CombineMatrix : public testing::TestWithParam<MatrixParam> {};

TEST_P(CombineMatrix, sums_are_bit_identical_to_the_oracle_in_every_order) {
  const auto& [ranks, dtype, layout] = GetParam();
  Shape shape;
  shape.ranks = ranks;
  shape.layout = layout;
  shape.ranks_per_node = ranks == 4 ? std::vector<int>{3, 1} : std::vector<int>{2};
  if (ranks % 2 != 0) shape.ranks_per_node = {};
  shape.experts = 2 * ranks + 1;
  shape.topk = std::min(6, shape.experts);
  shape.tokens = 16;
  shape.seed = static_cast<std::uint64_t>(ranks) + 100;
  HomewardShape home;
  home.dtype = dtype;
  home.hidden = 72;
  home.biases = ranks % 3;
  home.weights = layout != OutputLayout::kByRank && ranks % 2 == 0;
  home.topk_weights = ranks % 2 == 1;
  expect_combine(World(shape), home, all_orders());
}

INSTANTIATE_TEST_SUITE_P(All, CombineMatrix,
                         testing::Combine(testing::Values(1, 2, 3, 4, 7, 8),
                                          testing::Values(DType::kBf16, DType::kFp16, DType::kFp32),
                                          testing::ValuesIn(kLayouts)));

class CombineEveryLayout : public testing::TestWithParam<OutputLayout> {
 protected:
  Shape shape() const {
    Shape shape;
    shape.layout = GetParam();
    shape.tokens = 16;
    return shape;
  }
  bool by_rank() const { return GetParam() == OutputLayout::kByRank; }
};

INSTANTIATE_TEST_SUITE_P(All, CombineEveryLayout, testing::ValuesIn(kLayouts));

TEST_P(CombineEveryLayout, adds_no_one_or_two_biases_first_or_last) {
  for (int biases = 0; biases <= 2; ++biases) {
    HomewardShape home;
    home.biases = biases;
    for (const DType dtype : {DType::kBf16, DType::kFp32}) {
      home.dtype = dtype;
      expect_combine(World(shape()), home, all_orders());
    }
  }
}

TEST_P(CombineEveryLayout, weighs_each_selection_by_one_fused_multiply_add) {
  if (by_rank()) return;  // its rows are sums already: refused, see errors_test.cpp
  for (const bool duplicates : {false, true}) {
    Shape s = shape();
    s.duplicates = duplicates;
    s.experts = 8;
    s.ranks_per_node = {2};
    if (duplicates && s.layout == OutputLayout::kPadded) s.max_tokens_per_rank = s.tokens * s.topk;
    HomewardShape home;
    home.weights = true;
    home.biases = 2;
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      home.dtype = dtype;
      expect_combine(World(s), home, all_orders());
    }
  }
}

TEST_P(CombineEveryLayout, brings_topk_weights_home_in_both_ways) {
  for (const auto way : {WeightsHome::kSumOverRanks, WeightsHome::kFromOwner}) {
    for (const bool rows : {true, false}) {
      Shape s = shape();
      s.duplicates = s.layout != OutputLayout::kPadded;
      const World world(s);
      HomewardShape wanted;
      wanted.rows = rows;
      wanted.topk_weights = true;
      const Homeward home = homeward(world, wanted);
      const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank(), way);
      run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        const auto sent = buffer.dispatch(world.input(rank));
        CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
        in.weights_home = way;
        EXPECT_EQ(difference(expected[rank], buffer.combine(in)), "") << "rank " << rank << " " << s.to_string();
      });
    }
  }
}

// Where the rows to combine may lie.
enum class Place { kOrdinary, kAllocated, kOutputItself };

TEST_P(CombineEveryLayout, reads_rows_wherever_they_lie_and_writes_where_it_is_told) {
  for (const Place place : {Place::kOrdinary, Place::kAllocated, Place::kOutputItself}) {
    for (const bool own_out : {false, true}) {
      const World world(shape());
      Homeward home = homeward(world, {});
      if (place == Place::kOutputItself) {
        for (int r = 0; r < world.shape.ranks; ++r) home.ranks[r].x = world.expected[r].x;
      }
      const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
      run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        const auto sent = buffer.dispatch(world.input(rank));
        CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
        Tensor memory;
        if (place == Place::kAllocated) {
          const auto& s = home.ranks[rank].x.shape;
          memory = s.size() == 3 ? buffer.allocate(DType::kBf16, {s[0], s[1], s[2]})
                                 : buffer.allocate(DType::kBf16, {s[0], s[1]});
          if (!home.ranks[rank].x.bytes.empty()) {
            overwrite(memory, home.ranks[rank].x.bytes.data());
          }
          in.x = memory;
        }
        if (place == Place::kOutputItself) in.x = sent.x;
        if (own_out) in.out = home.out[rank].view();
        buffer.reset_statistics();
        const CombineOutput got = buffer.combine(in);
        EXPECT_EQ(difference(expected[rank], got), "") << "rank " << rank << ", place " << static_cast<int>(place);
        if (own_out) {
          EXPECT_EQ(got.x.data, home.out[rank].view().data);
        }
        const bool staged = buffer.statistics().staged_bytes > 0;
        EXPECT_EQ(staged, place == Place::kOrdinary && in.x.numel() > 0) << "place " << static_cast<int>(place);
      });
    }
  }
}

// More rows than two pieces hold: they go through the same memory, whose size they do not have.
TEST_P(CombineEveryLayout, stages_many_rows_piece_by_piece) {
  Shape s = shape();
  s.tokens = 480;
  s.topk = 6;
  s.duplicates = GetParam() != OutputLayout::kPadded;
  const World world(s);
  HomewardShape shape_home;
  shape_home.dtype = DType::kFp32;
  shape_home.hidden = by_rank() ? 5120 : GetParam() == OutputLayout::kByExpert ? 2560 : 640;
  const Homeward home = homeward(world, shape_home);
  const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  run_ranks(4, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
    const std::size_t before = buffer.statistics().arena_bytes_high_water;
    // Ranks 1 and 3 have their rows in the arena.
    Tensor memory;
    if (rank % 2 == 1) {
      memory = buffer.allocate(DType::kU8, {static_cast<std::int64_t>(in.x.bytes())});
      overwrite(memory, in.x.data);
      in.x.data = memory.data;
    }
    std::size_t result = 0;  // lies in the arena too
    for (int repeat = 0; repeat < 3; ++repeat) {
      const CombineOutput got = buffer.combine(in);
      EXPECT_EQ(difference(expected[rank], got), "");
      result = got.x.bytes();
    }
    // A GPU has room for all of them; a node's ranks read them there for the others.
    if (rank % 2 == 0 && !on_cuda() && world.shape.network.empty()) {
      EXPECT_LT(buffer.statistics().arena_bytes_high_water, before + in.x.bytes() + result);
    }
  });
}

TEST_P(CombineEveryLayout, gives_biases_or_zero_to_tokens_that_were_sent_nowhere) {
  for (int biases = 0; biases <= 2; ++biases) {
    Shape s = shape();
    s.percent_missing = 100;
    HomewardShape home;
    home.biases = biases;
    expect_combine(World(s), home, {SumOrder::by_rank(), SumOrder::by_topk()});
  }
}

TEST_P(CombineEveryLayout, follows_replicas_and_uneven_placements) {
  for (const Homes homes : {Homes::kUneven, Homes::kReplicas}) {
    for (const auto policy : {Placement::Policy::kSpread, Placement::Policy::kLocalFirst}) {
      Shape s = shape();
      s.homes = homes;
      s.policy = policy;
      s.ranks_per_node = {2};
      s.experts = 9;
      HomewardShape home;
      home.weights = !by_rank();
      expect_combine(World(s), home, all_orders());
    }
  }
}

TEST_P(CombineEveryLayout, works_after_bounded_and_cached_dispatches) {
  const World world(shape());
  std::int64_t bound = 8;
  for (const auto& e : world.expected) bound = std::max(bound, e.num_rows + 8);
  const bool bounded = GetParam() != OutputLayout::kPadded;
  // Rows beyond the valid ones are not read, whatever they hold: each rank's input is as long as the bound, as is what
  // a repeat gives.
  Homeward home = homeward(world, {});
  const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  if (bounded) {
    for (auto& rank : home.ranks) {
      rank.x.bytes.resize(static_cast<std::size_t>(bound) * rank.x.row_bytes(), std::byte{0x7f});
      rank.x.shape[0] = bound;
    }
  }
  run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    if (bounded) in.max_rows = bound;
    const auto sent = buffer.dispatch(in);
    EXPECT_EQ(difference(expected[rank], buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank()))),
              "");
    DispatchInput again;
    again.x = in.x;
    again.handle = sent.handle;
    const auto second = buffer.dispatch(again);
    EXPECT_EQ(difference(expected[rank], buffer.combine(combine_input(home, rank, second.handle, SumOrder::by_rank()))),
              "");
  });
}

TEST(Combine, serves_wide_rows_and_many_selections) {
  const std::tuple<std::int64_t, int, int> wide[] = {{8192, 4, 16}, {8, 32, 1024}, {520, 32, 32}, {16, 1, 1}};
  for (const auto& [hidden, topk, experts] : wide) {
    for (const OutputLayout layout : kLayouts) {
      Shape s;
      s.layout = layout;
      s.ranks = 3;
      s.topk = topk;
      s.experts = experts;
      s.tokens = 6;
      s.hidden = 16;
      HomewardShape home;
      home.hidden = hidden;
      home.weights = layout != OutputLayout::kByRank;
      expect_combine(World(s), home,
                     {SumOrder::by_rank(), SumOrder::by_topk(), {SumOrder::Key::kTopK, true, true, true}});
    }
  }
}

}  // namespace
}  // namespace deep_ep::test
