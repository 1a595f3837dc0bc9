// SPDX-License-Identifier: MIT
// Ten thousand exchanges of random shape on one buffer, high throughput and low latency mixed, each compared with the
// host backend's by digests.
#include "cuda/exchanges.h"

namespace deep_ep::test {
namespace {

constexpr int kMostTokens = 24;

Shape small_shape(Random& random) {
  Shape s;
  s.layout = random.pick({OutputLayout::kByRank, OutputLayout::kByExpert});
  s.dtype = random.pick({DType::kBf16, DType::kFp16, DType::kFp32});
  s.hidden = 8 * random.pick({1, 2, 3, 16, 17, 40});
  s.topk = static_cast<int>(random.pick({1, 2, 4, 8, 9}));
  s.experts = static_cast<int>(random.pick({1, 3, 8, 32, 64}));
  s.percent_missing = static_cast<int>(random.pick({0, 10, 50, 100}));
  if (s.layout == OutputLayout::kByExpert) s.alignment = static_cast<int>(random.pick({1, 4}));
  s.weights = random.one_in(2);
  if (s.hidden % 16 == 0 && random.one_in(4)) s.fp8 = Fp8Options{random.one_in(2), false};
  s.low_latency = random.one_in(3);
  s.max_tokens_per_rank = kMostTokens;
  return s;
}

DispatchOutput dispatch(Buffer& buffer, DispatchInput in, const Shape& shape, bool at_once) {
  in.at_once = at_once;
  return shape.low_latency ? buffer.low_latency_dispatch(in).receive() : buffer.dispatch(in);
}

// Every rank draws the same shape, and its own inputs.
void exchange(Buffer& host, Buffer& device, std::uint64_t seed) {
  Random shared(seed), mine(seed * 64 + static_cast<std::uint64_t>(device.rank()) + 7);
  const Shape shape = small_shape(shared);
  const SumOrder order = all_orders()[static_cast<std::size_t>(shared.below(16))];
  const bool bounded = shared.one_in(3) && !shape.low_latency, at_once = shared.one_in(2);
  const int most = static_cast<int>(shared.pick({1, 5, kMostTokens}));
  const int num_ranks = device.num_ranks();
  const std::int64_t bound =
      bounded ? std::int64_t{num_ranks} * most * shape.topk + shape.experts * shape.alignment : 0;
  const Sample sample(shape, mine, static_cast<int>(mine.between(0, most)));
  Digests seen[2];
  Buffer* const buffers[2] = {&host, &device};
  for (int i = 0; i < 2; ++i) {
    const Placed placed(sample, i == 1);
    const DispatchInput in = dispatch_of(shape, placed, bound, nullptr);
    const DispatchOutput sent = dispatch(*buffers[i], in, shape, at_once);
    DispatchOutput rows = sent;
    if (shape.fp8) {  // codes are no numbers to add: send the rows as they are along the same routes
      DispatchInput plain = in;
      plain.fp8.reset();
      if (!shape.low_latency) {
        plain = {};
        plain.x = placed.x;
        plain.handle = sent.handle;
      }
      rows = dispatch(*buffers[i], plain, shape, at_once);
    }
    CombineInput back = combine_of(shape, placed, rows.x, sent.handle, order, nullptr);
    back.at_once = at_once;
    seen[i] = digests_of(
        sent, shape.low_latency ? buffers[i]->low_latency_combine(back).receive() : buffers[i]->combine(back),
        num_ranks);
  }
  EXPECT_EQ(seen[1], seen[0]) << "rank " << device.rank() << ", seed " << seed << ", " << shape.to_string();
}

TEST(CudaIterations, ten_thousand_random_exchanges_are_the_hosts) {
  EP_NEEDS_GPU();
  constexpr std::uint64_t kIterations = 10000;
  Config config = small_config();
  config.ranks_per_node = {2};
  config.low_latency = {.max_tokens_per_rank = kMostTokens, .row_bytes = 4 * 320, .num_topk = 9};
  run_pairs(4, config, on_gpu(), [&](Buffer& host, Buffer& device) {
    for (std::uint64_t seed = 1; seed <= kIterations && !testing::Test::HasFailure(); ++seed)
      exchange(host, device, seed);
    EXPECT_EQ(device.statistics().timeouts + device.statistics().refused, 0u);
  });
}

}  // namespace
}  // namespace deep_ep::test
