// SPDX-License-Identifier: MIT
// Wrong arguments of the low-latency calls, heard as those of the others (errors_test.cpp).
#include <gtest/gtest.h>

#include "backends/mistakes.h"

namespace deep_ep::test {
namespace {

TEST(LowLatencyErrors, each_capacity_is_named_with_both_values_and_the_next_call_works) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  Config config = roomy(world);
  config.low_latency = {.max_tokens_per_rank = 10, .row_bytes = 128, .num_topk = 4, .side_bytes = 8};
  const Spare spare;
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"more tokens per rank than planned",
       [](auto& in) { in.max_tokens_per_rank = 4000; },
       {"Config::low_latency", "4000"}},
      {"no tokens per rank", [](auto& in) { in.max_tokens_per_rank = 0; }, {"max_tokens_per_rank", "at least 1", "0"}},
      {"more tokens than announced", [](auto& in) { in.max_tokens_per_rank = 9; }, {"max_tokens_per_rank", "10", "9"}},
      {"a wider row",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 8192});
       },
       {"Config::low_latency", "16384"}},
      {"more side bytes",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kI32, {10, 6000});
       },
       {"Config::low_latency"}},
      {"a bound of rows", [](auto& in) { in.max_rows = 100; }, {"max_rows"}},
      {"an id out of range",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         in.topk_idx.template as<std::int64_t>()[39] = 1 << 20;
       },
       {"topk_idx[9, 3]", "expert 1048576", "0 .. 11"}},
  };
  run_ranks(kRanks, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (const auto& mistake : mistakes) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.low_latency_dispatch(in).receive(); }), rank, mistake.name, mistake.named);
      const Outcome next = outcome_of([&] {
        EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "")
            << mistake.name;
      });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
  });
}

TEST(LowLatencyErrors, handles_go_back_the_way_they_came) {
  Shape s = plain();
  s.low_latency = true;
  const World low(s);
  s.low_latency = false;
  const World high(s);
  const Homeward home = homeward(low, {});
  run_ranks(kRanks, low.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto fast = buffer.low_latency_dispatch(low.input(rank)).receive();
    const auto wide = buffer.dispatch(high.input(rank));
    const auto to_combine = outcome_of([&] { buffer.combine(combine_input(home, rank, fast.handle, {})); });
    EXPECT_EQ(to_combine.code, ErrorCode::kInvalidArgument) << to_combine.message;
    EXPECT_TRUE(contains(to_combine.message, "handle")) << to_combine.message;
    const auto to_low =
        outcome_of([&] { buffer.low_latency_combine(combine_input(home, rank, wide.handle, {})).receive(); });
    EXPECT_EQ(to_low.code, ErrorCode::kInvalidArgument) << to_low.message;
    EXPECT_TRUE(contains(to_low.message, "handle")) << to_low.message;
    EXPECT_EQ(difference(high, rank, buffer.dispatch(high.input(rank))), "");
  });
}

TEST(LowLatencyErrors, a_buffer_without_low_latency_capacity_says_so) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  Config config = roomy(world);
  config.low_latency = {};
  run_ranks(kRanks, config, [&](AnyBuffer& buffer) {
    const auto outcome = outcome_of([&] { buffer.low_latency_dispatch(world.input(buffer.rank())).receive(); });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_TRUE(contains(outcome.message, "Config::low_latency")) << outcome.message;
  });
}

}  // namespace
}  // namespace deep_ep::test
