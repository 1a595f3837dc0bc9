// SPDX-License-Identifier: MIT
// Bounded calls captured into a graph and replayed while ids, weights, rows and the number of tokens that take part
// change in place: each replay is compared with the host backend.
#include "cuda/exchanges.h"

namespace deep_ep::test {
namespace {

constexpr int kTokens = 48;

Shape shape_of(OutputLayout layout, bool fp8) {
  Shape s;
  s.layout = layout;
  s.alignment = layout == OutputLayout::kByExpert ? 4 : 1;
  s.hidden = 256;
  s.topk = 4;
  s.experts = 16;
  if (fp8) s.fp8 = Fp8Options{};
  return s;
}

// Only the first tokens of a batch take part: the others select nothing, which is how a graph of fixed shape brings
// fewer.
void leave_out(Sample& sample, int first, int topk) {
  for (std::int64_t i = std::int64_t{first} * topk; i < sample.ids.rows() * topk; ++i)
    sample.ids.set<std::int64_t>(i, -1);
}

void replay_with_other_inputs(const Shape& shape, int replays) {
  const int num_ranks = shape.ranks;
  Config config = small_config();
  config.ranks_per_node = shape.ranks_per_node;
  config.network.provider = shape.network;
  const std::int64_t bound = std::int64_t{num_ranks} * kTokens * shape.topk + shape.experts * shape.alignment;
  Barrier barrier(num_ranks);
  run_pairs(num_ranks, config, on_gpu(), [&](Buffer& host, Buffer& device) {
    const int rank = device.rank();
    Random random(static_cast<std::uint64_t>(rank) + 1);
    const Sample first(shape, random, kTokens);
    const Placed placed(first, true);
    cudaStream_t stream;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    // The rows that come home: what arrived, or where that is FP8 memory of their own.
    const Tensor rows = shape.fp8 ? device.allocate(DType::kBf16, {bound, shape.hidden}) : Tensor();
    DispatchOutput sent;
    CombineOutput home;
    const auto enqueue = [&](Stream on) {
      sent = device.dispatch(dispatch_of(shape, placed, bound, on));
      home = device.combine(combine_of(shape, placed, shape.fp8 ? rows : sent.x, sent.handle, SumOrder::by_topk(), on));
    };
    enqueue(nullptr);  // what a first call sets up is no part of a graph
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue(stream);
    gpu(cudaStreamEndCapture(stream, &graph));
    gpu(cudaGraphInstantiate(&replay, graph, 0));
    barrier.wait();  // instantiating allocates: not while a peer waits on the device
    for (int turn = 0; turn < replays; ++turn) {
      Sample sample(shape, random, kTokens);
      leave_out(sample, static_cast<int>(random.between(0, kTokens)), shape.topk);
      for (const auto& [to, from] :
           {std::pair(&placed.x, &sample.x), std::pair(&placed.ids, &sample.ids),
            std::pair(&placed.weights, &sample.weights), std::pair(&placed.home_weights, &sample.home_weights),
            std::pair(&placed.bias, &sample.bias)})
        gpu(cudaMemcpyAsync(to->data, from->bytes.data(), from->bytes.size(), cudaMemcpyHostToDevice, stream));
      const oracle::Array back = random_array(random, DType::kBf16, {bound, shape.hidden});
      if (shape.fp8)
        gpu(cudaMemcpyAsync(rows.data, back.bytes.data(), back.bytes.size(), cudaMemcpyHostToDevice, stream));
      gpu(cudaGraphLaunch(replay, stream));
      gpu(cudaStreamSynchronize(stream));
      device.check();

      const Placed here(sample, false);
      const DispatchOutput want = host.dispatch(dispatch_of(shape, here, bound, nullptr));
      const CombineOutput want_home = host.combine(combine_of(shape, here, shape.fp8 ? back.view() : TensorView(want.x),
                                                              want.handle, SumOrder::by_topk(), nullptr));
      EXPECT_EQ(digests_of(sent, home, num_ranks), digests_of(want, want_home, num_ranks))
          << "rank " << rank << ", replay " << turn << " of " << shape.to_string();
    }
    barrier.wait();  // so does destroying
    gpu(cudaGraphExecDestroy(replay));
    gpu(cudaGraphDestroy(graph));
    gpu(cudaStreamDestroy(stream));
  });
}

class CudaGraph : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, CudaGraph, testing::Values(1, 4, 8));

TEST_P(CudaGraph, replays_what_the_host_computes_with_other_ids_weights_and_counts) {
  EP_NEEDS_GPU();
  for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert})
    for (const bool fp8 : {false, true}) {
      Shape shape = shape_of(layout, fp8);
      shape.ranks = GetParam();
      replay_with_other_inputs(shape, 25);
    }
}

TEST(CudaGraphBetweenNodes, replays_what_the_host_computes_with_other_ids_weights_and_counts) {
  EP_NEEDS_GPU();
  for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert})
    for (const char* network : {"loopback", "tcp"}) {
      Shape shape = shape_of(layout, false);
      shape.ranks_per_node = {2, 2};
      shape.network = network;
      replay_with_other_inputs(shape, 12);
    }
}

}  // namespace
}  // namespace deep_ep::test
