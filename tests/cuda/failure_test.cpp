// SPDX-License-Identifier: MIT
// What goes wrong on a GPU is reported and harms nothing.
#include "gpu.h"

namespace deep_ep::test {
namespace {

constexpr int kTokens = 64, kHidden = 512, kTopk = 4, kExperts = 16;

struct Inputs {
  Tensor x, idx;
  DispatchInput call;
};

std::vector<std::int64_t> ids_of(int rank, int seed) {
  std::mt19937 random(static_cast<unsigned>(rank + 100 * seed));
  std::vector<std::int64_t> ids(kTokens * kTopk);
  for (auto& id : ids) id = random() % 9 == 0 ? -1 : static_cast<std::int64_t>(random() % kExperts);
  return ids;
}

std::unique_ptr<Inputs> inputs_of(int rank, int seed = 1) {
  auto in = std::make_unique<Inputs>();
  std::vector<std::uint16_t> x(kTokens * kHidden);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(0x3f80 + (i * 7 + rank) % 300);
  std::vector<std::int64_t> ids = ids_of(rank, seed);
  in->x = to_gpu(TensorView(x.data(), DType::kBf16, {kTokens, kHidden}));
  in->idx = to_gpu(TensorView(ids.data(), DType::kI64, {kTokens, kTopk}));
  in->call.x = in->x;
  in->call.topk_idx = in->idx;
  in->call.num_experts = kExperts;
  return in;
}

TEST(CudaFailure, a_rank_that_does_not_come_is_a_timeout_and_the_next_call_works) {
  EP_NEEDS_GPU();
  run_ranks(3, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    for (bool bounded : {false, true}) {
      in->call.max_rows = bounded ? 3 * kTokens : 0;
      auto hasty = in->call;
      hasty.timeout = std::chrono::milliseconds(50);
      if (buffer.rank() == 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        // The others have left: they announced, but nobody replies any more.
        EXPECT_EQ(code_of([&] { buffer.dispatch(hasty); }), ErrorCode::kTimeout);
      } else {
        try {
          buffer.dispatch(hasty);
          ADD_FAILURE() << "no timeout";
        } catch (const Error& error) {
          ASSERT_TRUE(error.wait().has_value()) << error.what();
          EXPECT_EQ(error.wait()->peer, 2);
          EXPECT_EQ(error.wait()->phase, "dispatch");
        }
      }
      EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
    }
  });
}

TEST(CudaFailure, a_late_combine_is_a_timeout_and_the_next_call_works) {
  EP_NEEDS_GPU();
  run_ranks(2, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    const DispatchOutput out = buffer.dispatch(in->call);
    CombineInput back;
    back.x = out.x;
    back.handle = out.handle;
    back.timeout = std::chrono::milliseconds(50);
    if (buffer.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    EXPECT_EQ(code_of([&] { buffer.combine(back); }), ErrorCode::kTimeout);
    back.timeout = std::chrono::milliseconds(0);
    EXPECT_EQ(buffer.combine(back).x.shape[0], kTokens);
  });
}

TEST(CudaFailure, an_id_out_of_range_is_named_on_every_rank_and_the_next_call_works) {
  EP_NEEDS_GPU();
  run_ranks(2, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    auto wrong = inputs_of(buffer.rank());
    const std::int64_t id = kExperts + 5;
    if (buffer.rank() == 1) device::copy(wrong->idx.as<std::int64_t>() + 17, &id, 8);
    std::string text;
    EXPECT_EQ(code_of([&] { buffer.dispatch(wrong->call); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("rank 1 refused"), std::string::npos) << text;
    EXPECT_NE(text.find("topk_idx[4, 1]: expert 21"), std::string::npos) << text;
    EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
  });
}

TEST(CudaFailure, calls_that_differ_and_wrong_arguments_are_heard_by_everybody) {
  EP_NEEDS_GPU();
  run_ranks(2, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    auto other = in->call;
    if (buffer.rank() == 1) other.layout = OutputLayout::kByExpert;
    std::string text;
    EXPECT_EQ(code_of([&] { buffer.dispatch(other); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("ranks differ in layout"), std::string::npos) << text;
    other = in->call;
    if (buffer.rank() == 1) other.num_experts = -3;
    EXPECT_EQ(code_of([&] { buffer.dispatch(other); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("num_experts"), std::string::npos) << text;
    EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
  });
}

TEST(CudaFailure, a_bound_or_an_arena_that_is_too_small_is_named_and_the_next_call_works) {
  EP_NEEDS_GPU();
  Config config = small_config();
  config.arena_bytes = 1 << 20;
  run_ranks(2, config, on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    auto bounded = in->call;
    bounded.max_rows = buffer.rank() == 0 ? 3 : 2 * kTokens;
    std::string text;
    EXPECT_EQ(code_of([&] { buffer.dispatch(bounded); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("max_rows: rank 0"), std::string::npos) << text;
    bounded.max_rows = buffer.rank() == 0 ? 2 * kTokens : 4000;  // 4 MB of rows in an arena of 1 MiB
    EXPECT_EQ(code_of([&] { buffer.dispatch(bounded); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("arena_bytes: rank 1"), std::string::npos) << text;
    EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
  });
}

TEST(CudaFailure, a_slot_that_duplicate_ids_would_overfill_is_named_and_the_next_call_works) {
  EP_NEEDS_GPU();
  run_ranks(2, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    const std::vector<std::int64_t> same(kTokens * kTopk, 3);  // every selection the same expert
    const Tensor idx = to_gpu(TensorView(same.data(), DType::kI64, {kTokens, kTopk}));
    auto padded = in->call;
    padded.topk_idx = idx;
    padded.layout = OutputLayout::kPadded;
    padded.max_tokens_per_rank = kTokens;
    std::string text;
    EXPECT_EQ(code_of([&] { buffer.dispatch(padded); }, &text), ErrorCode::kInvalidArgument);
    EXPECT_NE(text.find("kPadded: a slot of rank 0 would get 512 rows, it has room for 128"), std::string::npos)
        << text;
    EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
  });
}

TEST(CudaFailure, outputs_that_the_caller_keeps_leave_a_full_arena_by_a_copy) {
  EP_NEEDS_GPU();
  Config config = small_config();
  config.arena_bytes = 1 << 20;
  run_ranks(2, config, on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    std::vector<DispatchOutput> kept;
    for (int i = 0; i < 12; ++i) kept.push_back(buffer.dispatch(in->call));
    const auto first = bytes_of(kept[0].x);
    for (const auto& out : kept) EXPECT_EQ(bytes_of(out.x), first);
    EXPECT_GT(buffer.statistics().copied_out_bytes, 0u);
  });
}

TEST(CudaFailure, what_an_enqueued_call_found_out_late_is_raised_by_check) {
  EP_NEEDS_GPU();
  run_ranks(2, small_config(), on_gpu(), [](Buffer& buffer) {
    auto in = inputs_of(buffer.rank());
    cudaStream_t stream;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    auto bounded = in->call;
    bounded.stream = stream;
    bounded.max_rows = buffer.rank() == 0 ? 3 : 2 * kTokens;
    buffer.dispatch(bounded);
    EXPECT_EQ(code_of([&] { buffer.check(); }), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of([&] { buffer.check(); }), ErrorCode{});
    buffer.dispatch(bounded);
    gpu(cudaStreamSynchronize(stream));
    EXPECT_EQ(code_of([&] { buffer.dispatch(in->call); }), ErrorCode::kInvalidArgument);
    EXPECT_GT(buffer.dispatch(in->call).handle->num_rows, 0);
    gpu(cudaStreamDestroy(stream));
  });
}

}  // namespace
}  // namespace deep_ep::test
