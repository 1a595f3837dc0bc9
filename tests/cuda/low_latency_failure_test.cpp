// SPDX-License-Identifier: MIT
// Low latency on one GPU where something is wrong: ranks that do not come, calls that differ, ids and slots that do not
// fit. Everybody hears of it, and later calls work.
#include "low_latency_cases.h"

namespace deep_ep::test {
namespace {

TEST(CudaLowLatencyFailure, a_rank_that_does_not_come_is_a_timeout_and_later_calls_work) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 3, .tokens = 8, .layout = OutputLayout::kPadded});
  for (bool at_once : {false, true})
    run_ranks(3, config_of(series.c), on_gpu(), [&](Buffer& b) {
      const Placed in(series.c, series.inputs(b.rank(), 0), true);
      DispatchInput hasty = in.call;
      hasty.timeout = std::chrono::milliseconds(50);
      hasty.at_once = at_once;
      if (b.rank() == 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        EXPECT_EQ(code_of([&] { b.low_latency_dispatch(hasty).receive(); }), ErrorCode{});  // the others had sent
      } else {
        try {
          b.low_latency_dispatch(hasty).receive();
          ADD_FAILURE() << "no timeout";
        } catch (const Error& error) {
          ASSERT_TRUE(error.wait().has_value()) << error.what();
          EXPECT_EQ(error.wait()->peer, 2);
          EXPECT_EQ(error.wait()->phase, "low_latency_dispatch");
        }
      }
      for (int i = 0; i < 20; ++i) EXPECT_GT(b.low_latency_dispatch(in.call).receive().x.shape[0], 0);
    });
}

TEST(CudaLowLatencyFailure, calls_that_differ_wrong_ids_and_wrong_arguments_are_heard_by_everybody) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 8, .layout = OutputLayout::kPadded});
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) {
    const Placed in(series.c, series.inputs(b.rank(), 0), true);
    Placed wrong(series.c, series.inputs(b.rank(), 0), true);
    std::string text;
    DispatchInput other = in.call;
    if (b.rank() == 1) other.expert_alignment = 4;
    EXPECT_EQ(code_of([&] { b.low_latency_dispatch(other).receive(); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("ranks differ in expert_alignment"), std::string::npos) << text;
    const std::int64_t id = series.c.experts + 5;
    if (b.rank() == 1) device::copy(wrong.idx.as<std::int64_t>() + 7, &id, 8);
    EXPECT_EQ(code_of([&] { b.low_latency_dispatch(wrong.call).receive(); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("topk_idx[1, 3]: expert 21"), std::string::npos) << text;
    other = in.call;
    if (b.rank() == 1) other.max_tokens_per_rank = 1;
    EXPECT_EQ(code_of([&] { b.low_latency_dispatch(other).receive(); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("max_tokens_per_rank"), std::string::npos) << text;
    // One rank calls low latency, the other does not: both hear it.
    const ErrorCode code = b.rank() == 0 ? code_of([&] { b.low_latency_dispatch(in.call).receive(); }, &text)
                                         : code_of([&] { b.dispatch(in.call); }, &text);
    EXPECT_EQ(code, ErrorCode::kInvalidArgument) << text;
    EXPECT_NE(text.find("ranks differ in operation"), std::string::npos) << text;
    for (int i = 0; i < 10; ++i) EXPECT_GT(b.low_latency_dispatch(in.call).receive().x.shape[0], 0);
  });
}

TEST(CudaLowLatencyFailure, a_slot_that_duplicate_ids_would_overfill_is_named) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 8, .layout = OutputLayout::kPadded});
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) {
    const Placed in(series.c, series.inputs(b.rank(), 0), true);
    const std::vector<std::int64_t> same(in.idx.numel(), 3);
    device::copy(in.idx.data, same.data(), in.idx.bytes());
    std::string text;
    const ErrorCode code = code_of([&] { b.low_latency_dispatch(in.call).receive(); }, &text);
    EXPECT_EQ(code, b.rank() == 0 ? ErrorCode::kInvalidArgument : ErrorCode{}) << text;
  });
}

}  // namespace
}  // namespace deep_ep::test
