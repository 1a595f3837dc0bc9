// SPDX-License-Identifier: MIT
// Ten thousand exchanges of random shape on one buffer, each compared with the host backend's by digests.
#include "cuda/exchanges.h"

namespace deep_ep::test {
namespace {

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
  return s;
}

// Every rank draws the same shape, and its own inputs.
void exchange(Buffer& host, Buffer& device, std::uint64_t seed) {
  Random shared(seed), mine(seed * 64 + static_cast<std::uint64_t>(device.rank()) + 7);
  const Shape shape = small_shape(shared);
  const SumOrder order = all_orders()[static_cast<std::size_t>(shared.below(16))];
  const bool bounded = shared.one_in(3);
  const int most = static_cast<int>(shared.pick({1, 5, 24}));
  const int num_ranks = device.num_ranks();
  const std::int64_t bound =
      bounded ? std::int64_t{num_ranks} * most * shape.topk + shape.experts * shape.alignment : 0;
  const Sample sample(shape, mine, static_cast<int>(mine.between(0, most)));
  Digests seen[2];
  Buffer* const buffers[2] = {&host, &device};
  for (int i = 0; i < 2; ++i) {
    const Placed placed(sample, i == 1);
    const DispatchOutput sent = buffers[i]->dispatch(dispatch_of(shape, placed, bound, nullptr));
    CombineInput back;
    Tensor codes;
    if (shape.fp8) {  // codes are no numbers to add: send the rows as they are along the same routes
      DispatchInput plain;
      plain.x = placed.x;
      plain.handle = sent.handle;
      codes = buffers[i]->dispatch(plain).x;
    }
    back = combine_of(shape, placed, shape.fp8 ? codes : sent.x, sent.handle, order, nullptr);
    seen[i] = digests_of(sent, buffers[i]->combine(back), num_ranks);
  }
  EXPECT_EQ(seen[1], seen[0]) << "rank " << device.rank() << ", seed " << seed << ", " << shape.to_string();
}

TEST(CudaIterations, ten_thousand_random_exchanges_are_the_hosts) {
  EP_NEEDS_GPU();
  constexpr std::uint64_t kIterations = 10000;
  Config config = small_config();
  config.ranks_per_node = {2};
  run_pairs(4, config, on_gpu(), [&](Buffer& host, Buffer& device) {
    for (std::uint64_t seed = 1; seed <= kIterations && !testing::Test::HasFailure(); ++seed)
      exchange(host, device, seed);
    EXPECT_EQ(device.statistics().timeouts + device.statistics().refused, 0u);
  });
}

}  // namespace
}  // namespace deep_ep::test
