// SPDX-License-Identifier: MIT
// High-throughput dispatch between logical nodes that share no memory: the same bits as inside one node.
#include <gtest/gtest.h>

#include <algorithm>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

using Param = std::tuple<Nodes, OutputLayout>;
class InternodeDispatch : public testing::TestWithParam<Param> {
 protected:
  Shape shape() const {
    Shape s = between(std::get<0>(GetParam()));
    s.layout = std::get<1>(GetParam());
    s.alignment = s.layout == OutputLayout::kByExpert ? 8 : 1;
    return s;
  }
};

INSTANTIATE_TEST_SUITE_P(Loopback, InternodeDispatch,
                         testing::Combine(testing::ValuesIn(kNodes), testing::ValuesIn(kLayouts)));

TEST_P(InternodeDispatch, every_rank_gets_exactly_what_the_oracle_says) {
  const RoughLoopback network(7);
  Shape s = shape();
  s.side = {{DType::kI64, 1}, {DType::kU8, 20}};
  expect_dispatch(World(s));
}

}  // namespace
}  // namespace deep_ep::test
