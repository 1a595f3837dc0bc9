// SPDX-License-Identifier: MIT
// Calls on the caller's streams, what they find out late, the grids that they take, counters, and an arena whose pages
// come as they are needed.
#include <algorithm>
#include <atomic>
#include <thread>

#include "cuda/exchanges.h"

namespace deep_ep::test {
namespace {

Shape plain_shape(OutputLayout layout = OutputLayout::kByRank) {
  Shape s;
  s.layout = layout;
  s.hidden = 256;
  s.percent_missing = 20;
  return s;
}

ErrorCode code_of(const std::function<void()>& call, std::string* text = nullptr) {
  const Outcome outcome = outcome_of(call);
  if (text != nullptr) *text = outcome.message;
  return outcome.code.value_or(ErrorCode{});
}

class OwnStream {
 public:
  OwnStream() { gpu(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { gpu(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

TEST(CudaStreams, exact_outputs_are_right_in_the_order_of_the_callers_stream) {
  EP_NEEDS_GPU();
  run_pairs(4, small_config(), on_gpu(), [](Buffer& host, Buffer& device) {
    const int rank = device.rank();
    Random random(static_cast<std::uint64_t>(rank) + 1);
    const OwnStream first, second;
    for (int turn = 0; turn < 12; ++turn) {
      const Shape shape = plain_shape(turn % 2 == 0 ? OutputLayout::kByRank : OutputLayout::kByExpert);
      const Sample sample(shape, random, 40);
      const Placed here(sample, false), there(sample, true);
      const OwnStream& stream = turn % 3 == 0 ? first : second;  // a change of streams is ordered too
      const DispatchOutput sent = device.dispatch(dispatch_of(shape, there, 0, stream));
      const CombineOutput home =
          device.combine(combine_of(shape, there, sent.x, sent.handle, SumOrder::by_rank(), stream));
      stream.wait();
      device.check();
      const DispatchOutput want = host.dispatch(dispatch_of(shape, here, 0, nullptr));
      EXPECT_EQ(sent.x.shape, want.x.shape);
      const CombineOutput want_home =
          host.combine(combine_of(shape, here, want.x, want.handle, SumOrder::by_rank(), nullptr));
      EXPECT_EQ(digests_of(sent, home, 4), digests_of(want, want_home, 4)) << "rank " << rank << ", turn " << turn;
    }
  });
}

// Holds a stream up until it is let go, without taking an SM.
class Gate {
 public:
  explicit Gate(cudaStream_t stream) {
    gpu(cudaLaunchHostFunc(
        stream,
        [](void* open) {
          while (!static_cast<std::atomic<bool>*>(open)->load()) std::this_thread::sleep_for(1ms);
        },
        &open_));
  }
  void open() { open_ = true; }

 private:
  std::atomic<bool> open_{false};
};

// The tables of a placement go to the GPU at once, when calls that are enqueued have yet to use their memory.
TEST(CudaStreams, a_placement_that_is_new_lies_nowhere_where_an_enqueued_call_writes) {
  EP_NEEDS_GPU();
  run_pairs(2, small_config(), on_gpu(), [](Buffer& host, Buffer& device) {
    constexpr int kTokens = 200;
    const int rank = device.rank();
    Random random(static_cast<std::uint64_t>(rank) + 1);
    const Shape shape = plain_shape();
    Shape other = shape;
    const Sample sample(shape, random, kTokens);
    const Placed here(sample, false), there(sample, true);
    const OwnStream stream;
    const DispatchOutput want = host.dispatch(dispatch_of(shape, here, 2 * kTokens, nullptr));
    const CombineOutput want_home =
        host.combine(combine_of(shape, here, want.x, want.handle, SumOrder::by_rank(), nullptr));
    for (other.experts = 2; other.experts <= 20; other.experts += 2) {
      const Sample token(other, random, 1);
      const Placed token_here(token, false), token_there(token, true);
      Gate gate(stream);
      const DispatchOutput sent = device.dispatch(dispatch_of(shape, there, 2 * kTokens, stream));
      const DispatchLayout layout = device.dispatch_layout(token_there.ids, other.experts, nullptr, stream);
      const CombineOutput home =
          device.combine(combine_of(shape, there, sent.x, sent.handle, SumOrder::by_rank(), stream));
      gate.open();
      stream.wait();
      device.check();
      const DispatchLayout want_layout = host.dispatch_layout(token_here.ids, other.experts);
      EXPECT_EQ(bytes_of(layout.is_token_in_rank), bytes_of(want_layout.is_token_in_rank)) << other.experts;
      EXPECT_EQ(bytes_of(layout.tokens_per_rank), bytes_of(want_layout.tokens_per_rank)) << other.experts;
      EXPECT_EQ(bytes_of(layout.tokens_per_expert), bytes_of(want_layout.tokens_per_expert)) << other.experts;
      EXPECT_EQ(digests_of(sent, home, 2), digests_of(want, want_home, 2)) << "rank " << rank << ", " << other.experts;
    }
  });
}

TEST(CudaStreams, a_rank_without_room_hears_of_it_at_once_and_the_others_when_they_ask) {
  EP_NEEDS_GPU();
  Config config = small_config();
  config.arena_bytes = 1 << 20;
  run_ranks(2, config, on_gpu(), [](Buffer& buffer) {
    const Shape shape = plain_shape();
    Random random(static_cast<std::uint64_t>(buffer.rank()) + 1);
    const Placed placed(Sample(shape, random, 16), true);
    const OwnStream stream;
    // 8000 rows of 512 bytes in an arena of 1 MiB.
    const DispatchInput in = dispatch_of(shape, placed, buffer.rank() == 1 ? 8000 : 64, stream);
    std::string text;
    if (buffer.rank() == 1) {
      EXPECT_EQ(code_of([&] { buffer.dispatch(in); }, &text), ErrorCode::kInvalidArgument);
    } else {
      EXPECT_EQ(code_of([&] { buffer.dispatch(in); }, &text), ErrorCode{}) << text;
      EXPECT_EQ(code_of([&] { buffer.check(); }, &text), ErrorCode::kInvalidArgument);
    }
    EXPECT_NE(text.find("arena_bytes: rank 1"), std::string::npos) << text;
    EXPECT_GT(buffer.dispatch(dispatch_of(shape, placed, 0, nullptr)).handle->num_rows, 0);
  });
}

// Grid widths of the kernels of a captured bounded dispatch, in launch order.
std::vector<unsigned> grids_of(Buffer& buffer, int sms) {
  const Shape shape = plain_shape();
  Random random(1);
  const Placed placed(Sample(shape, random, 4096), true);
  DispatchInput in = dispatch_of(shape, placed, 4096, nullptr);
  in.num_workers = sms;
  buffer.dispatch(in);
  const OwnStream stream;
  in.stream = stream;
  cudaGraph_t graph;
  gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const DispatchOutput sent = buffer.dispatch(in);
  CombineInput back = combine_of(shape, placed, sent.x, sent.handle, SumOrder::by_rank(), stream);
  back.num_workers = sms;
  buffer.combine(back);
  gpu(cudaStreamEndCapture(stream, &graph));
  std::size_t count = 0;
  gpu(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  gpu(cudaGraphGetNodes(graph, nodes.data(), &count));
  std::vector<unsigned> grids;
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    gpu(cudaGraphNodeGetType(node, &type));
    if (type != cudaGraphNodeTypeKernel) continue;
    cudaKernelNodeParams kernel;
    gpu(cudaGraphKernelNodeGetParams(node, &kernel));
    grids.push_back(kernel.gridDim.x);
  }
  gpu(cudaGraphDestroy(graph));
  return grids;
}

TEST(CudaGrids, take_as_many_multiprocessors_as_the_call_says_and_no_more) {
  EP_NEEDS_GPU();
  run_ranks(1, small_config(), on_gpu(), [](Buffer& buffer) {
    for (const int sms : {1, 2, 7, 32, 100}) {
      const std::vector<unsigned> grids = grids_of(buffer, sms);
      ASSERT_EQ(grids.size(), 3u);  // notify, dispatch, combine
      EXPECT_LE(grids[0], static_cast<unsigned>(sms));
      EXPECT_EQ(grids[1], static_cast<unsigned>(sms));
      EXPECT_EQ(grids[2], static_cast<unsigned>(sms));
    }
  });
}

TEST(CudaStatistics, count_what_the_host_counts) {
  EP_NEEDS_GPU();
  run_pairs(4, small_config(), on_gpu(), [](Buffer& host, Buffer& device) {
    Random random(static_cast<std::uint64_t>(device.rank()) + 1);
    for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert}) {
      const Shape shape = plain_shape(layout);
      const Sample sample(shape, random, 30);
      for (Buffer* buffer : {&host, &device}) {
        const Placed placed(sample, buffer == &device);
        const DispatchOutput sent = buffer->dispatch(dispatch_of(shape, placed, 0, nullptr));
        DispatchInput again;
        again.x = placed.x;
        again.handle = sent.handle;
        buffer->dispatch(again);
        buffer->combine(combine_of(shape, placed, sent.x, sent.handle, SumOrder::by_rank(), nullptr));
      }
    }
    const Statistics want = host.statistics(), got = device.statistics();
    EXPECT_EQ(got.operations, want.operations);
    EXPECT_EQ(got.rows_per_slot, want.rows_per_slot);
    for (int peer = 0; peer < 4; ++peer) {
      EXPECT_EQ(got.peers[peer].bytes_sent, want.peers[peer].bytes_sent) << "to rank " << peer;
      EXPECT_LE(got.peers[peer].wait_ns_max, got.peers[peer].wait_ns_sum);
    }
    device.reset_statistics();
    EXPECT_EQ(device.statistics().peers[0].bytes_sent, 0u);
  });
}

// A budget of 8 GiB takes little until it is used; what is used then is mapped for every rank.
TEST(CudaArena, takes_pages_as_they_are_needed) {
  EP_NEEDS_GPU();
  Config config = small_config();
  config.arena_bytes = std::size_t{8} << 30;
  std::size_t free_before = 0, total = 0;
  gpu(cudaMemGetInfo(&free_before, &total));
  run_pairs(2, config, on_gpu(), [&](Buffer& host, Buffer& device) {
    std::size_t free_now = 0, all = 0;
    gpu(cudaMemGetInfo(&free_now, &all));
    EXPECT_LT(free_before - std::min(free_before, free_now), std::size_t{2} << 30);
    Shape shape = plain_shape();
    shape.hidden = 4096;
    Random random(static_cast<std::uint64_t>(device.rank()) + 1);
    const Sample sample(shape, random, 2048);
    const Placed here(sample, false), there(sample, true);
    const DispatchOutput want = host.dispatch(dispatch_of(shape, here, 0, nullptr));
    const CombineOutput want_home =
        host.combine(combine_of(shape, here, want.x, want.handle, SumOrder::by_rank(), nullptr));
    std::vector<DispatchOutput> kept;  // 32 MiB each
    for (int i = 0; i < 12; ++i) {
      kept.push_back(device.dispatch(dispatch_of(shape, there, 0, nullptr)));
      const CombineOutput home =
          device.combine(combine_of(shape, there, kept.back().x, kept.back().handle, SumOrder::by_rank(), nullptr));
      EXPECT_EQ(digests_of(kept.back(), home, 2), digests_of(want, want_home, 2)) << "output " << i;
    }
    EXPECT_EQ(device.statistics().copied_out_bytes, 0u);
    EXPECT_GT(device.statistics().arena_bytes_high_water, std::size_t{300} << 20);
  });
}

}  // namespace
}  // namespace deep_ep::test
