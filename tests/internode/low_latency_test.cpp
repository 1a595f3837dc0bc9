// SPDX-License-Identifier: MIT
// Low latency between logical nodes that share no memory: direct puts, send and receive apart, the same bits.
#include <gtest/gtest.h>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

using Param = std::tuple<Nodes, OutputLayout>;
class InternodeLowLatency : public testing::TestWithParam<Param> {
 protected:
  Shape shape() const {
    Shape s = between(std::get<0>(GetParam()));
    s.layout = std::get<1>(GetParam());
    s.low_latency = true;
    s.tokens = 12;
    return s;
  }
};

INSTANTIATE_TEST_SUITE_P(Loopback, InternodeLowLatency,
                         testing::Combine(testing::ValuesIn(kNodes), testing::ValuesIn(kLayouts)));

TEST_P(InternodeLowLatency, gives_the_rows_and_sums_of_the_oracle) {
  const RoughLoopback network(31);
  Shape s = shape();
  s.fp8 = Fp8Options{};
  s.hidden = 256;
  s.side = {{DType::kFp32, 3}};
  HomewardShape home;
  home.topk_weights = true;
  expect_combine(World(s), home, {SumOrder::by_topk(), SumOrder::by_rank_and_node()});
}

TEST_P(InternodeLowLatency, keeps_several_tickets_in_flight_and_uses_their_slots_again) {
  const RoughLoopback network(37);
  Shape s = shape();
  const World one(s);
  s.seed += 1;
  const World two(s);
  run_ranks(s.ranks, one.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 5; ++repeat) {
      auto first = buffer.low_latency_dispatch(one.input(rank));
      auto second = buffer.low_latency_dispatch(two.input(rank));
      auto dropped = buffer.low_latency_dispatch(one.input(rank));
      dropped = {};
      EXPECT_EQ(difference(two, rank, second.receive()), "") << "repeat " << repeat;
      EXPECT_EQ(difference(one, rank, first.receive()), "") << "repeat " << repeat;
    }
  });
}

TEST(InternodeLowLatencyOverLibfabric, gives_the_rows_and_sums_of_the_oracle) {
  Shape s = between(kNodes[0]);
  s.network = "tcp";
  s.low_latency = true;
  s.layout = OutputLayout::kPadded;
  expect_combine(World(s), {}, {SumOrder::by_topk()});
}

}  // namespace
}  // namespace deep_ep::test
