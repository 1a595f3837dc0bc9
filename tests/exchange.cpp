// SPDX-License-Identifier: MIT
// Whole exchanges against the oracle.
#include "exchange.h"

#include <gtest/gtest.h>

namespace deep_ep::test {

DispatchOutput dispatch(AnyBuffer& buffer, const DispatchInput& input, bool low_latency) {
  return low_latency ? buffer.low_latency_dispatch(input).receive() : buffer.dispatch(input);
}

CombineOutput combine(AnyBuffer& buffer, const CombineInput& input, bool low_latency) {
  return low_latency ? buffer.low_latency_combine(input).receive() : buffer.combine(input);
}

void expect_dispatch(const World& world, const Options& options) {
  SCOPED_TRACE(world.shape.to_string());
  run_ranks(
      world.shape.ranks, world.config(),
      [&](AnyBuffer& buffer) {
        const DispatchOutput got = dispatch(buffer, world.input(buffer.rank()), world.shape.low_latency);
        EXPECT_EQ(difference(world, buffer.rank(), got), "")
            << "rank " << buffer.rank() << " of " << world.shape.to_string();
      },
      options);
}

void expect_combine(const World& world, const HomewardShape& shape, const std::vector<SumOrder>& orders,
                    const Options& options) {
  SCOPED_TRACE(world.shape.to_string());
  const Homeward home = homeward(world, shape);
  std::vector<std::vector<oracle::Combined>> expected;
  for (const SumOrder& order : orders)
    expected.push_back(oracle::combine(world.exchange, world.expected, home.ranks, order));
  run_ranks(
      world.shape.ranks, world.config(),
      [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        const DispatchOutput sent = dispatch(buffer, world.input(rank), world.shape.low_latency);
        for (std::size_t i = 0; i < orders.size(); ++i) {
          CombineInput input = combine_input(home, rank, sent.handle, orders[i]);
          for (const bool at_once : {false, true}) {
            if (at_once && !world.shape.low_latency) continue;
            input.at_once = at_once;
            const CombineOutput got = combine(buffer, input, world.shape.low_latency);
            EXPECT_EQ(difference(expected[i][rank], got), "")
                << "rank " << rank << ", " << to_string(orders[i]) << (at_once ? ", at once" : "") << ", of "
                << world.shape.to_string();
          }
        }
      },
      options);
}

}  // namespace deep_ep::test
