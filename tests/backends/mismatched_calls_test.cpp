// SPDX-License-Identifier: MIT
// Calls that are right by themselves but not the same on every rank.
#include <gtest/gtest.h>

#include "backends/mistakes.h"

namespace deep_ep::test {
namespace {

TEST(MismatchedCalls, are_refused_by_everybody_and_the_next_call_works) {
  Shape s = plain();
  s.weights = false;
  const World world(s);
  const Homeward home = homeward(world, {});
  const Spare spare;
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"hidden",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 128});
       },
       {"256", "128"}},
      {"dtype", [&](auto& in) { in.x.dtype = DType::kFp16; }, {}},
      {"layout", [](auto& in) { in.layout = OutputLayout::kByExpert; }, {}},
      {"alignment", [](auto& in) { in.expert_alignment = 8; }, {"8", "1"}},
      {"experts", [](auto& in) { in.num_experts = 13; }, {"13", "12"}},
      {"topk",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 5});
       },
       {"5", "4"}},
      {"ids",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI32, {10, 4});
       },
       {}},
      {"placement",
       [](auto& in) {
         in.placement = Placement::from_lists({{0, 1, 2, 3, 4}, {5, 6, 7}, {8, 9, 10, 11}}, 12);
       },
       {}},
      {"weights",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {10, 4});
       },
       {}},
      {"quantisation", [](auto& in) { in.fp8 = Fp8Options{}; }, {}},
      {"scales",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {10, 1});
       },
       {}},
      {"side", [](auto& in) { in.side.clear(); }, {}},
  };
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (const auto& mistake : mistakes) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      const Outcome outcome = outcome_of([&] { buffer.dispatch(in); });
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument)
          << mistake.name << " on rank " << rank << ": " << outcome.message;
      EXPECT_TRUE(contains(outcome.message, "rank " + std::to_string(rank == kWrongRank ? 0 : kWrongRank)) ||
                  contains(outcome.message, "rank 2"))
          << mistake.name << ": " << outcome.message;
      for (const auto& part : mistake.named)
        EXPECT_TRUE(contains(outcome.message, part)) << mistake.name << " lacks " << part << ": " << outcome.message;
      const Outcome next = outcome_of(
          [&] { EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
    // Another call altogether.
    const auto sent = buffer.dispatch(world.input(rank));
    const Outcome outcome = outcome_of([&] {
      if (rank == kWrongRank) {
        buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank()));
      } else {
        buffer.dispatch(world.input(rank));
      }
    });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_TRUE(contains(outcome.message, "combine") && contains(outcome.message, "dispatch")) << outcome.message;
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

TEST(MismatchedCalls, low_latency_against_high_throughput_is_an_error_on_every_rank) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    in.timeout = 1000ms;
    const Outcome outcome = outcome_of([&] {
      if (rank == kWrongRank) {
        buffer.dispatch(in);
      } else {
        buffer.low_latency_dispatch(in).receive();
      }
    });
    EXPECT_TRUE(outcome.code == ErrorCode::kInvalidArgument || outcome.code == ErrorCode::kTimeout) << outcome.message;
    EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "");
  });
}

// Low latency writes before it hears what the others call; ThreadSanitizer sees whether anybody meets another's slots.
TEST(MismatchedCalls, low_latency_rows_of_another_size_are_refused_by_everybody) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 5; ++repeat) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) in.x = spare.view(DType::kBf16, {in.x.shape[0], 128});
      const Outcome outcome = outcome_of([&] { buffer.low_latency_dispatch(in).receive(); });
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
      for (const char* part : {"256", "128"}) EXPECT_TRUE(contains(outcome.message, part)) << outcome.message;
      EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "");
    }
  });
}

}  // namespace
}  // namespace deep_ep::test
