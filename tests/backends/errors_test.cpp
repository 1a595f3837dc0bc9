// SPDX-License-Identifier: MIT
// Every wrong argument of dispatch and combine: the rank that is wrong hears which argument and both values, the others
// which rank refused, and the next call works.
#include <gtest/gtest.h>

#include "backends/mistakes.h"

namespace deep_ep::test {
namespace {

std::vector<Mistake<DispatchInput>> dispatch_mistakes(const Spare& spare) {
  return {
      {"no x", [](auto& in) { in.x = {}; }, {"x"}},
      {"x of one dimension", [](auto& in) { in.x.ndim = 1; }, {"x", "2 dimensions", "bf16[10]"}},
      {"x not contiguous",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 64});
         stretch(in.x);
       },
       {"x", "contiguous", "bf16[10, 64]", "strides 65"}},
      {"x with fewer rows", [](auto& in) { in.x.shape[0] = 9; }, {"x", "topk_idx", "9", "10"}},
      {"a row that is no multiple of 16 bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 12});
       },
       {"x", "24", "16"}},
      {"no topk_idx", [](auto& in) { in.topk_idx = {}; }, {"topk_idx"}},
      {"topk_idx of another type",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kFp32, {10, 4});
       },
       {"topk_idx", "i32 or i64", "fp32"}},
      {"topk_idx not contiguous",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         stretch(in.topk_idx);
       },
       {"topk_idx", "contiguous", "i64[10, 4]", "strides 5"}},
      {"an id out of range",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         in.topk_idx.template as<std::int64_t>()[7] = 12;
       },
       {"topk_idx[1, 3]", "expert 12", "0 .. 11"}},
      {"weights of another type",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kBf16, {10, 4});
       },
       {"topk_weights", "bf16[10, 4]", "fp32[10, 4]"}},
      {"weights of another shape",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {10, 3});
       },
       {"topk_weights", "fp32[10, 3]", "fp32[10, 4]"}},
      {"scales of another type",
       [&](auto& in) {
         in.scales = spare.view(DType::kBf16, {10, 4});
       },
       {"scales", "fp32 or i32", "bf16"}},
      {"scales with fewer rows",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {9, 4});
       },
       {"scales", "9", "10"}},
      {"scales and quantisation together",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {10, 4});
         in.fp8 = Fp8Options{};
       },
       {"scales", "fp8"}},
      {"quantising bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kU8, {10, 128});
         in.fp8 = Fp8Options{};
       },
       {"x", "bf16, fp16 or fp32", "u8"}},
      {"exponent scales that are not rounded",
       [](auto& in) {
         in.fp8 = Fp8Options{false, true};
       },
       {"ue8m0", "round_scale"}},
      {"a side tensor with fewer rows",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kI32, {9, 2});
       },
       {"side", "9", "10"}},
      {"a side tensor of odd rows",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kU8, {10, 7});
       },
       {"side", "7", "4"}},
      {"no experts", [](auto& in) { in.num_experts = 0; }, {"num_experts", "at least 1", "0"}},
      {"more experts than planned", [](auto& in) { in.num_experts = 25; }, {"max_experts", "25", "24"}},
      {"a placement of other experts",
       [](auto& in) { in.placement = Placement::even(13, kRanks); },
       {"placement", "13", "12"}},
      {"a placement of other ranks",
       [](auto& in) { in.placement = Placement::even(12, kRanks + 1); },
       {"placement", "4", "3"}},
      {"an alignment of zero", [](auto& in) { in.expert_alignment = 0; }, {"expert_alignment", "at least 1", "0"}},
      {"a negative alignment", [](auto& in) { in.expert_alignment = -8; }, {"expert_alignment", "at least 1", "-8"}},
      {"padded without a bound", [](auto& in) { in.layout = OutputLayout::kPadded; }, {"max_tokens_per_rank"}},
      {"more tokens than the bound",
       [](auto& in) {
         in.layout = OutputLayout::kPadded;
         in.max_tokens_per_rank = 9;
       },
       {"max_tokens_per_rank", "10", "9"}},
      {"a negative bound of rows", [](auto& in) { in.max_rows = -1; }, {"max_rows", "-1"}},
  };
}

TEST(DispatchErrors, each_wrong_argument_is_named_on_every_rank_and_the_next_call_works) {
  const World world(plain());
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    Spare mine = spare;  // ids are written there
    for (const auto& mistake : dispatch_mistakes(mine)) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.dispatch(in); }), rank, mistake.name, mistake.named);
      const Outcome next = outcome_of(
          [&] { EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
    EXPECT_GE(buffer.statistics().refused, 20u);
  });
}

TEST(DispatchErrors, everybody_makes_the_same_mistake_and_the_next_call_works) {
  const World world(plain());
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    in.expert_alignment = 0;
    EXPECT_EQ(outcome_of([&] { buffer.dispatch(in); }).code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

TEST(DispatchErrors, what_a_handle_says_must_be_left_out) {
  const World world(plain());
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"ids", [&](auto& in) { in.topk_idx = world.ranks[kWrongRank].topk_idx.view(); }, {"topk_idx", "handle"}},
      {"experts", [](auto& in) { in.num_experts = 12; }, {"num_experts", "handle"}},
      {"a placement", [](auto& in) { in.placement = Placement::even(12, kRanks); }, {"placement", "handle"}},
      {"a layout", [](auto& in) { in.layout = OutputLayout::kByExpert; }, {"layout", "handle"}},
      {"an alignment", [](auto& in) { in.expert_alignment = 4; }, {"expert_alignment", "handle"}},
      {"other tokens", [](auto& in) { in.x.shape[0] = 9; }, {"x", "9", "10"}},
  };
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const auto& mistake : mistakes) {
      DispatchInput in;
      in.x = world.input(rank).x;
      in.handle = sent.handle;
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.dispatch(in); }), rank, mistake.name, mistake.named);
    }
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

std::vector<Mistake<CombineInput>> combine_mistakes(const Spare& spare) {
  return {
      {"no handle", [](auto& in) { in.handle = nullptr; }, {"handle"}},
      {"nothing to bring home", [](auto& in) { in.x = {}; }, {"x"}},
      {"bytes", [&](auto& in) { in.x.dtype = DType::kU8; }, {"x", "bf16, fp16 or fp32", "u8"}},
      {"a row too few", [](auto& in) { in.x.shape[0] -= 1; }, {"x must be bf16[", "it is bf16["}},
      {"x not contiguous", [](auto& in) { stretch(in.x); }, {"x", "contiguous", "strides 65"}},
      {"a row that is no multiple of 16 bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {in.x.shape[0], 12});
         in.out = {};
       },
       {"x", "24", "16"}},
      {"a bias of another type",
       [&](auto& in) {
         in.bias[0] = spare.view(DType::kFp32, {10, 64});
       },
       {"bias[0]", "fp32[10, 64]", "bf16[10, 64]"}},
      {"a bias of another shape",
       [&](auto& in) {
         in.bias[1] = spare.view(DType::kBf16, {9, 64});
       },
       {"bias[1]", "bf16[9, 64]", "bf16[10, 64]"}},
      {"weights of rows that are sums",
       [&](auto& in) {
         in.weights = spare.view(DType::kFp32, {10, 4});
       },
       {"weights"}},
      {"topk_weights of another shape",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {1, 4});
       },
       {"topk_weights must be fp32[", "it is fp32[1, 4]"}},
      {"out of another type",
       [&](auto& in) {
         in.out = spare.view(DType::kFp16, {10, 64});
       },
       {"out", "fp16[10, 64]", "bf16[10, 64]"}},
      {"out of another shape",
       [&](auto& in) {
         in.out = spare.view(DType::kBf16, {10, 32});
       },
       {"out", "bf16[10, 32]", "bf16[10, 64]"}},
  };
}

TEST(CombineErrors, each_wrong_argument_is_named_on_every_rank_and_the_next_call_works) {
  const World world(plain());
  const Homeward home = homeward(world, {});
  const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const auto& mistake : combine_mistakes(spare)) {
      CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
      const CombineInput right = in;
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.combine(in); }), rank, mistake.name, mistake.named);
      const Outcome next =
          outcome_of([&] { EXPECT_EQ(difference(expected[rank], buffer.combine(right)), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
  });
}

TEST(CombineErrors, weights_of_another_shape_are_named) {
  Shape s = plain();
  s.layout = OutputLayout::kByExpert;
  const World world(s);
  const Homeward home = homeward(world, {});
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const TensorView& weights : {spare.view(DType::kFp32, {10, 3}), spare.view(DType::kBf16, {10, 4})}) {
      CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
      in.weights = rank == kWrongRank ? weights : spare.view(DType::kFp32, {10, 4});
      expect_refusal(outcome_of([&] { buffer.combine(in); }), rank, "weights",
                     {"weights", "fp32[10, 4]", describe(weights)});
    }
  });
}

}  // namespace
}  // namespace deep_ep::test
