// SPDX-License-Identifier: MIT
// High-throughput combine between logical nodes that share no memory: the same bits as inside one node, in every order.
#include <gtest/gtest.h>

#include <algorithm>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

using Param = std::tuple<Nodes, OutputLayout>;
class InternodeCombine : public testing::TestWithParam<Param> {
 protected:
  Shape shape() const {
    Shape s = between(std::get<0>(GetParam()));
    s.layout = std::get<1>(GetParam());
    s.tokens = 16;
    return s;
  }
  bool by_rank() const { return std::get<1>(GetParam()) == OutputLayout::kByRank; }
};

INSTANTIATE_TEST_SUITE_P(Loopback, InternodeCombine,
                         testing::Combine(testing::ValuesIn(kNodes), testing::ValuesIn(kLayouts)));

TEST_P(InternodeCombine, sums_are_bit_identical_to_the_oracle_in_every_order) {
  const RoughLoopback network(11);
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    HomewardShape home;
    home.dtype = dtype;
    home.hidden = 72;
    home.biases = dtype == DType::kBf16 ? 1 : 2;
    home.weights = !by_rank() && dtype == DType::kBf16;
    expect_combine(World(shape()), home, all_orders());
  }
}

}  // namespace
}  // namespace deep_ep::test
