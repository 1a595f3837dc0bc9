// SPDX-License-Identifier: MIT
// Between send and receive nothing of ours is on any SM.
#include <algorithm>
#include <set>

#include "cuda/everywhere.h"
#include "cuda/exchanges.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4, kTokens = 64;
constexpr std::uint64_t kLong = 2'000'000;  // ns

// Every SM at the same time, whole.
void expect_free_gpu(cudaStream_t stream) {
  int device = 0, sms = 0;
  gpu(cudaGetDevice(&device));
  gpu(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const auto there = device::allocate(sizeof(Stamp) * static_cast<std::size_t>(sms));
  launch_everywhere(static_cast<Stamp*>(there.get()), kLong, stream);
  gpu(cudaGetLastError());
  gpu(cudaStreamSynchronize(stream));
  std::vector<Stamp> stamps(static_cast<std::size_t>(sms));
  device::copy(stamps.data(), there.get(), sizeof(Stamp) * stamps.size());
  std::set<std::uint32_t> seen;
  std::uint64_t last_begin = 0, first_end = UINT64_MAX;
  for (const Stamp& stamp : stamps) {
    seen.insert(stamp.sm);
    last_begin = std::max(last_begin, stamp.begin);
    first_end = std::min(first_end, stamp.end);
  }
  EXPECT_EQ(seen.size(), stamps.size()) << "blocks shared an SM, so another was not free";
  EXPECT_LT(last_begin, first_end) << "a block had to wait for an SM";
}

TEST(CudaOverlap, every_sm_is_free_between_send_and_receive) {
  EP_NEEDS_GPU();
  Shape shape;
  shape.hidden = 7168;
  shape.layout = OutputLayout::kByExpert;
  shape.low_latency = true;
  shape.max_tokens_per_rank = kTokens;
  Config config = small_config();
  config.arena_bytes = std::size_t{256} << 20;
  config.low_latency = {kTokens, static_cast<std::size_t>(shape.hidden) * 2, shape.topk, 1024};
  Barrier barrier(kRanks);
  run_ranks(kRanks, config, on_gpu(), [&](Buffer& buffer) {
    const int rank = buffer.rank();
    Random random(static_cast<std::uint64_t>(rank) + 1);
    const Placed placed(Sample(shape, random, kTokens), true);
    cudaStream_t stream = nullptr;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const DispatchInput in = dispatch_of(shape, placed, 0, stream);
    const bool looks = device::of_rank(rank) == rank;  // one rank of each GPU
    Digests first;
    for (int turn = 0; turn < 4; ++turn) {
      const bool overlaps = turn % 2 == 1;
      const auto between = [&] {
        if (!overlaps) return;
        gpu(cudaStreamSynchronize(stream));
        barrier.wait();
        if (looks) expect_free_gpu(stream);
        barrier.wait();
      };
      auto there = buffer.low_latency_dispatch(in);
      between();
      const DispatchOutput sent = there.receive();
      auto back =
          buffer.low_latency_combine(combine_of(shape, placed, sent.x, sent.handle, SumOrder::by_topk(), stream));
      between();
      const CombineOutput home = back.receive();
      gpu(cudaStreamSynchronize(stream));
      buffer.check();
      const Digests digests = digests_of(sent, home, kRanks);
      if (turn == 0) first = digests;
      EXPECT_EQ(digests, first) << "rank " << rank << ", turn " << turn;
    }
    barrier.wait();
    gpu(cudaStreamDestroy(stream));
  });
}

}  // namespace
}  // namespace deep_ep::test
