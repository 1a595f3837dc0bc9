// SPDX-License-Identifier: MIT
// High-throughput dispatch against the oracle: every layout, row type, placement, and the arguments of DispatchInput
// one by one.
#include <gtest/gtest.h>

#include <algorithm>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

using MatrixParam = std::tuple<int, DType, OutputLayout>;
class DispatchMatrix : public testing::TestWithParam<MatrixParam> {};

TEST_P(DispatchMatrix, every_rank_gets_exactly_what_the_oracle_says) {
  const auto& [ranks, dtype, layout] = GetParam();
  Shape shape;
  shape.ranks = ranks;
  shape.dtype = dtype;
  shape.layout = layout;
  shape.hidden = 80;
  shape.experts = 3 * ranks + 1;
  shape.topk = std::min(6, shape.experts);
  shape.alignment = layout == OutputLayout::kPadded ? 1 : 8;
  shape.caller_scales = dtype == DType::kFp8E4m3 ? 5 : 0;
  shape.side = {{DType::kI64, 1}};
  shape.seed = static_cast<std::uint64_t>(ranks);
  expect_dispatch(World(shape));
}

INSTANTIATE_TEST_SUITE_P(All, DispatchMatrix,
                         testing::Combine(testing::Values(1, 2, 3, 4, 7, 8),
                                          testing::Values(DType::kBf16, DType::kFp16, DType::kFp32, DType::kU8,
                                                          DType::kFp8E4m3),
                                          testing::ValuesIn(kLayouts)));

class DispatchEveryLayout : public testing::TestWithParam<OutputLayout> {
 protected:
  Shape shape() const {
    Shape shape;
    shape.layout = GetParam();
    return shape;
  }
  bool padded() const { return GetParam() == OutputLayout::kPadded; }
};

INSTANTIATE_TEST_SUITE_P(All, DispatchEveryLayout, testing::ValuesIn(kLayouts));

TEST_P(DispatchEveryLayout, groups_of_experts_are_aligned_and_padded_with_zeros) {
  if (padded()) return expect_dispatch(World(shape()));  // has no groups; its alignment is the slot itself
  for (const int alignment : {1, 8, 128}) {
    Shape s = shape();
    s.alignment = alignment;
    s.fp8 = Fp8Options{};
    s.hidden = 256;
    expect_dispatch(World(s));
  }
}

TEST_P(DispatchEveryLayout, quantises_to_fp8_in_every_variant_and_scale_order) {
  const std::vector<Fp8Options> variants = {{}, {true, false}, {true, true}};
  for (const Fp8Options& fp8 : variants) {
    for (const auto order : {ScaleOrder::kRowMajor, ScaleOrder::kColumnMajor}) {
      for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
        Shape s = shape();
        s.dtype = dtype;
        s.fp8 = fp8;
        s.scale_order = order;
        s.hidden = 128 * 6 + 32;  // the last group is short, the last word of exponents is not full
        s.tokens = 12;
        expect_dispatch(World(s));
      }
    }
  }
}

TEST_P(DispatchEveryLayout, carries_rows_that_the_caller_quantised_with_scales_of_any_strides) {
  for (const bool strided : {false, true}) {
    for (const DType scale : {DType::kFp32, DType::kI32}) {
      for (const auto order : {ScaleOrder::kRowMajor, ScaleOrder::kColumnMajor}) {
        Shape s = shape();
        s.dtype = DType::kFp8E4m3;
        s.hidden = 384;
        s.caller_scales = 3;
        s.caller_scale_dtype = scale;
        s.caller_scales_strided = strided;
        s.scale_order = order;
        expect_dispatch(World(s));
      }
    }
  }
}

TEST_P(DispatchEveryLayout, takes_ids_of_32_and_64_bits_with_and_without_weights) {
  for (const bool idx64 : {false, true}) {
    for (const bool weights : {false, true}) {
      for (const bool mask : {false, true}) {
        Shape s = shape();
        s.idx64 = idx64;
        s.weights = weights;
        s.mask_weights = mask;
        expect_dispatch(World(s));
      }
    }
  }
}

TEST_P(DispatchEveryLayout, carries_several_side_tensors) {
  Shape s = shape();
  s.side = {{DType::kFp32, 3}, {DType::kU8, 20}, {DType::kI64, 2}, {DType::kBf16, 6}};
  expect_dispatch(World(s));
}

TEST_P(DispatchEveryLayout, follows_uneven_placements_and_replicas_with_both_policies) {
  for (const Homes homes : {Homes::kUneven, Homes::kReplicas}) {
    for (const auto policy : {Placement::Policy::kSpread, Placement::Policy::kLocalFirst}) {
      for (std::uint64_t seed = 1; seed <= 3; ++seed) {
        Shape s = shape();
        s.homes = homes;
        s.policy = policy;
        s.ranks = 4;
        s.ranks_per_node = {2};
        s.experts = 11;
        s.seed = seed;
        s.alignment = padded() ? 1 : 4;
        expect_dispatch(World(s));
      }
    }
  }
}

TEST_P(DispatchEveryLayout, works_on_logical_nodes_of_any_size) {
  const std::vector<std::vector<int>> sizes = {{}, {1}, {2}, {4}, {3, 1}, {1, 3}, {2, 1, 1}};
  for (const auto& nodes : sizes) {
    Shape s = shape();
    s.ranks_per_node = nodes;
    s.homes = Homes::kReplicas;
    s.policy = Placement::Policy::kLocalFirst;
    expect_dispatch(World(s));
  }
}

TEST_P(DispatchEveryLayout, accepts_no_tokens_on_some_or_all_ranks) {
  Shape s = shape();
  s.tokens = 1;
  expect_dispatch(World(s));
  World none(s);
  for (auto& rank : none.ranks) {
    rank.x = oracle::Array(s.dtype, {0, s.hidden});
    rank.topk_idx = oracle::Array(DType::kI64, {0, s.topk});
    rank.topk_weights = oracle::Array(DType::kFp32, {0, s.topk});
  }
  none.expect_again();
  expect_dispatch(none);
}

TEST_P(DispatchEveryLayout, accepts_tokens_that_select_nothing) {
  Shape s = shape();
  s.percent_missing = 100;
  expect_dispatch(World(s));
}

TEST_P(DispatchEveryLayout, sends_everything_to_one_expert) {
  Shape s = shape();
  s.topk = 1;
  s.uneven_tokens = false;
  World world(s);
  for (auto& rank : world.ranks) {
    for (std::int64_t t = 0; t < rank.x.rows(); ++t) rank.topk_idx.set<std::int64_t>(t, 5);
  }
  world.expect_again();
  expect_dispatch(world);
}

TEST_P(DispatchEveryLayout, treats_duplicate_ids_as_selections_of_their_own) {
  Shape s = shape();
  s.duplicates = true;
  s.experts = 7;
  s.topk = 6;
  if (padded()) s.max_tokens_per_rank = s.tokens * s.topk;  // room for every selection in one slot
  expect_dispatch(World(s));
}

TEST_P(DispatchEveryLayout, serves_row_widths_from_16_bytes_to_8192_elements) {
  for (const std::int64_t hidden : {8, 16, 24, 136, 1032, 8192}) {
    Shape s = shape();
    s.ranks = 2;
    s.hidden = hidden;
    s.tokens = 6;
    expect_dispatch(World(s));
  }
}

TEST_P(DispatchEveryLayout, serves_top_1_to_32_of_1_to_1024_experts) {
  const std::pair<int, int> cases[] = {{1, 1}, {1, 1024}, {32, 32}, {32, 1024}, {17, 100}, {8, 3}, {40, 64}};
  for (const auto& [topk, experts] : cases) {
    Shape s = shape();
    s.topk = topk;
    s.experts = experts;
    s.tokens = 10;
    s.hidden = 16;
    expect_dispatch(World(s));
  }
}

TEST_P(DispatchEveryLayout, gives_bounded_outputs_with_the_valid_rows_first) {
  for (const bool fp8 : {false, true}) {
    Shape s = shape();
    s.alignment = padded() ? 1 : 4;
    s.hidden = 256;
    s.side = {{DType::kI32, 1}};
    if (fp8) s.fp8 = Fp8Options{};
    const World world(s);
    if (padded()) continue;  // kPadded is bounded by its shape; max_rows says nothing more
    std::int64_t bound = 0;
    for (const auto& e : world.expected) bound = std::max(bound, e.num_rows);
    for (const std::int64_t max_rows : {bound, bound + 37}) {
      run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
        DispatchInput in = world.input(buffer.rank());
        in.max_rows = max_rows;
        const auto got = buffer.dispatch(in);
        EXPECT_EQ(difference_bounded(world, buffer.rank(), got, max_rows), "")
            << "rank " << buffer.rank() << " " << s.to_string();
      });
    }
  }
}

TEST_P(DispatchEveryLayout, refuses_a_bound_that_is_too_small_and_works_on) {
  if (padded()) return;  // as above
  Shape s = shape();
  s.uneven_tokens = false;
  const World world(s);
  const std::int64_t need = world.expected[1].num_rows;
  run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
    DispatchInput in = world.input(buffer.rank());
    if (buffer.rank() == 1) in.max_rows = need - 1;
    const Outcome outcome = outcome_of([&] { buffer.dispatch(in); });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_NE(outcome.message.find("rank 1"), std::string::npos) << outcome.message;
    EXPECT_NE(outcome.message.find("max_rows"), std::string::npos) << outcome.message;
    EXPECT_NE(outcome.message.find(std::to_string(need)), std::string::npos) << outcome.message;
    EXPECT_NE(outcome.message.find(std::to_string(need - 1)), std::string::npos) << outcome.message;
    in.max_rows = 0;
    EXPECT_EQ(difference(world, buffer.rank(), buffer.dispatch(in)), "");
  });
}

// The rows of another tensor, sent along the routes of an earlier dispatch.
World along(const World& first, DType dtype, std::int64_t hidden, bool weights) {
  World again = first;
  again.shape.dtype = dtype;
  again.shape.hidden = hidden;
  again.shape.weights = weights;
  Random random(99);
  for (auto& rank : again.ranks) {
    rank.x = random_array(random, dtype, {rank.x.rows(), hidden});
    rank.topk_weights =
        weights ? random_array(random, DType::kFp32, {rank.x.rows(), first.shape.topk}) : oracle::Array();
  }
  again.expect_again();
  return again;
}

TEST_P(DispatchEveryLayout, repeats_the_routes_of_a_handle_with_other_rows) {
  Shape s = shape();
  s.alignment = padded() ? 1 : 8;
  const World first(s);
  const std::vector<World> repeats = {along(first, DType::kFp32, 48, true), along(first, DType::kU8, 32, false),
                                      along(first, DType::kBf16, 64, true), along(first, DType::kFp16, 1024, false)};
  run_ranks(s.ranks, first.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(first.input(rank));
    std::shared_ptr<const Handle> handle = sent.handle;
    for (const World& again : repeats) {
      DispatchInput in = again.input(rank);
      in.topk_idx = {};
      in.num_experts = 0;
      in.placement = nullptr;
      in.layout = OutputLayout::kByRank;
      in.expert_alignment = 1;
      in.max_tokens_per_rank = 0;
      in.handle = handle;
      const auto got = buffer.dispatch(in);
      EXPECT_EQ(difference(again, rank, got, true), "") << "rank " << rank << " " << again.shape.to_string();
      handle = got.handle;  // a handle of a cached call is as good
    }
  });
}

TEST_P(DispatchEveryLayout, keeps_outputs_valid_while_later_calls_run) {
  Shape s = shape();
  const World first(s);
  s.seed = 2;
  const World second(s);
  run_ranks(s.ranks, first.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    std::vector<DispatchOutput> kept;
    for (int i = 0; i < 6; ++i) kept.push_back(buffer.dispatch((i % 2 == 0 ? first : second).input(rank)));
    for (int i = 0; i < 6; ++i) EXPECT_EQ(difference(i % 2 == 0 ? first : second, rank, kept[i]), "") << "output " << i;
    buffer.close();
    EXPECT_EQ(difference(first, rank, kept[0]), "") << "after close()";
  });
}

TEST(Dispatch, works_with_many_ranks) {
  Shape s;
  s.ranks = on_cuda() ? 12 : 64;  // a GPU has 32 queues for streams, and each rank takes two
  s.tokens = 3;
  s.hidden = 16;
  s.experts = 128;
  s.topk = 8;
  World world(s);
  run_ranks(
      s.ranks,
      [&] {
        auto c = world.config();
        c.arena_bytes = 1 << 20;
        c.timeout = 60s;
        return c;
      }(),
      [&](AnyBuffer& buffer) {
        const auto got = buffer.dispatch(world.input(buffer.rank()));
        EXPECT_EQ(difference(world, buffer.rank(), got), "") << "rank " << buffer.rank();
      },
      Options{.num_workers = 1});
}

TEST(DispatchLayout, counts_what_the_oracle_counts) {
  for (const Homes homes : {Homes::kEven, Homes::kUneven, Homes::kReplicas}) {
    for (const bool idx64 : {false, true}) {
      Shape s;
      s.homes = homes;
      s.idx64 = idx64;
      s.policy = Placement::Policy::kLocalFirst;
      s.ranks_per_node = {3, 1};
      s.duplicates = true;
      s.experts = 9;
      const World world(s);
      run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        const auto& tokens = world.ranks[rank];
        const oracle::Layout want = oracle::layout(world.exchange, tokens, rank);
        const DispatchLayout got = buffer.dispatch_layout(tokens.topk_idx.view(), s.experts, world.placement);
        const auto ints = [](const TensorView& v) {
          return std::vector<std::int32_t>(v.as<std::int32_t>(), v.as<std::int32_t>() + v.numel());
        };
        EXPECT_EQ(ints(got.tokens_per_rank), want.tokens_per_rank);
        EXPECT_EQ(ints(got.tokens_per_node), want.tokens_per_node);
        EXPECT_EQ(ints(got.tokens_per_expert), want.tokens_per_expert);
        ASSERT_EQ(got.is_token_in_rank.dtype, DType::kBool);
        ASSERT_EQ(got.is_token_in_rank.shape[0], tokens.x.rows());
        ASSERT_EQ(got.is_token_in_rank.shape[1], s.ranks);
        const auto* bits = got.is_token_in_rank.as<std::uint8_t>();
        EXPECT_EQ(std::vector<std::uint8_t>(bits, bits + got.is_token_in_rank.numel()), want.is_token_in_rank);
      });
    }
  }
}

TEST(Topology, nodes_are_the_logical_ones_of_the_config) {
  Config config = small_config();
  config.ranks_per_node = {3, 1};
  run_ranks(4, config, [](AnyBuffer& buffer) {
    EXPECT_EQ(buffer.num_ranks(), 4);
    EXPECT_EQ(buffer.num_nodes(), 2);
    for (int r = 0; r < 4; ++r) EXPECT_EQ(buffer.node_of(r), r < 3 ? 0 : 1);
    EXPECT_EQ(buffer.config().ranks_per_node, (std::vector<int>{3, 1}));
  });
}

}  // namespace
}  // namespace deep_ep::test
