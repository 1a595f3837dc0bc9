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

// Weights come home beside rows, or beside a node's sum, which stands for several of them.
TEST_P(InternodeCombine, brings_weights_home_beside_rows_and_sums_of_more_selections_than_a_warp_has_lanes) {
  for (const int topk : {3, 40}) {
    Shape s = shape();
    s.topk = topk;
    s.experts = 53;
    s.tokens = 9;
    HomewardShape home;
    home.hidden = 24;
    home.weights = !by_rank();
    home.topk_weights = true;
    expect_combine(World(s), home,
                   {SumOrder::by_topk(), SumOrder::by_rank_and_node(), {SumOrder::Key::kTopK, true, true, false}});
  }
}

// More requests than a home sends at once.
TEST(Internode, serves_homes_of_many_tokens) {
  Shape s = between({"2+1", {2, 1}});
  s.tokens = 5000;
  s.hidden = 16;
  s.topk = 2;
  HomewardShape home;
  home.hidden = 8;
  expect_combine(World(s), home, {SumOrder::by_rank(), SumOrder::by_rank_and_node()});
}

}  // namespace
}  // namespace deep_ep::test
