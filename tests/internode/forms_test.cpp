// SPDX-License-Identifier: MIT
// What is special about rows that cross between nodes: how many bytes, how few slots, which networks, who is left out.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

// Dispatches and combines in both ways of crossing, and compares with the oracle.
void exchange(AnyBuffer& buffer, const World& world, const Homeward& home,
              const std::vector<std::vector<oracle::Combined>>& sums, const std::vector<SumOrder>& orders) {
  const int rank = buffer.rank();
  const auto sent = buffer.dispatch(world.input(rank));
  EXPECT_EQ(difference(world, rank, sent), "") << "rank " << rank << " of " << world.shape.to_string();
  for (std::size_t i = 0; i < orders.size(); ++i)
    EXPECT_EQ(difference(sums[i][rank], buffer.combine(combine_input(home, rank, sent.handle, orders[i]))), "")
        << "rank " << rank << ", " << to_string(orders[i]) << ", of " << world.shape.to_string();
}

void expect_exchange(const World& world, const std::set<int>& absent = {}) {
  const std::vector<SumOrder> orders = {SumOrder::by_rank(), SumOrder::by_rank_and_node()};
  const Homeward home = homeward(world, {.hidden = world.shape.hidden});
  std::vector<std::vector<oracle::Combined>> sums;
  for (const SumOrder& order : orders)
    sums.push_back(oracle::combine(world.exchange, world.expected, home.ranks, order));
  const auto outcomes = run_threads(world.shape.ranks, [&](int rank, std::shared_ptr<Bootstrap> group) {
    const auto buffer = AnyBuffer::open(std::move(group), world.config());
    if (absent.contains(rank)) return;
    for (int gone : absent) buffer->set_masked(gone, true);
    for (int repeat = 0; repeat < 3; ++repeat) exchange(*buffer, world, home, sums, orders);
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
}

TEST(Internode, hands_the_network_each_token_once_for_each_node_and_two_percent_more_at_most) {
  Shape s = between({"2x2x2", {2, 2, 2}});
  s.hidden = 7168;
  s.topk = 8;
  s.experts = 48;
  s.tokens = 64;
  s.fp8 = Fp8Options{};
  const World world(s);
  const std::size_t payload = 7168 + 4 * 56 + 8 * 8 + 4 * 8;  // row, scales, ids, weights
  run_threads(s.ranks, [&](int rank, std::shared_ptr<Bootstrap> group) {
    const auto buffer = AnyBuffer::open(std::move(group), world.config());
    buffer->dispatch(world.input(rank));
    std::uint64_t handed = 0;
    for (const auto& peer : buffer->statistics().peers) handed += peer.network_bytes;
    const std::int32_t* dst = world.expected[rank].dst_rank.data();
    std::uint64_t crossings = 0;
    for (std::int64_t token = 0; token < world.expected[rank].num_tokens; ++token) {
      std::set<int> nodes;
      for (int k = 0; k < s.topk; ++k)
        if (const int to = dst[token * s.topk + k]; to >= 0 && to / 2 != rank / 2) nodes.insert(to / 2);
      crossings += nodes.size();
    }
    EXPECT_GE(handed, crossings * payload * 95 / 100) << "rank " << rank;
    EXPECT_LE(handed, crossings * payload * 102 / 100) << "rank " << rank;
    buffer->reset_statistics();
    EXPECT_EQ(buffer->statistics().peers[(rank + 2) % 6].network_bytes, 0u);
  });
}

// On hosts workers pack, on GPUs a kernel does.
TEST(Internode, puts_leave_while_rows_are_still_packed) {
  for (const char* network : {"loopback", "tcp"}) {
    Shape s = between({"1+1", {1, 1}});
    s.network = network;
    s.hidden = 512;
    s.tokens = 300;
    s.uneven_tokens = false;
    s.percent_missing = 0;
    s.slot_bytes = 4096;  // three rows: many more chunks than there are slots
    const World world(s);
    run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
      EXPECT_EQ(buffer.statistics().puts_while_packing, 0u);
      EXPECT_EQ(difference(world, buffer.rank(), buffer.dispatch(world.input(buffer.rank()))), "");
      EXPECT_GT(buffer.statistics().puts_while_packing, 0u);
    });
  }
}

TEST(Internode, waits_for_free_slots_however_few_rows_fit) {
  for (const OutputLayout layout : kLayouts) {
    const RoughLoopback network(23);
    Shape s = between({"2+2", {2, 2}});
    s.layout = layout;
    s.hidden = 512;
    s.tokens = 150;
    s.topk = 4;
    s.slot_bytes = 4096;
    expect_exchange(World(s));
  }
}

TEST(Internode, refuses_rows_that_no_slot_holds_and_works_on) {
  Shape s = between({"1+1", {1, 1}});
  s.slot_bytes = 4096;
  s.hidden = 64;
  const World small(s);
  s.hidden = 4096;
  const World wide(s);
  run_ranks(s.ranks, small.config(), [&](AnyBuffer& buffer) {
    const Outcome outcome = outcome_of([&] { buffer.dispatch(wide.input(buffer.rank())); });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_NE(outcome.message.find("forward_slot_bytes"), std::string::npos) << outcome.message;
    EXPECT_EQ(difference(small, buffer.rank(), buffer.dispatch(small.input(buffer.rank()))), "");
  });
}

TEST(Internode, goes_on_without_ranks_that_are_left_out_whether_others_reach_a_node_through_them_or_not) {
  for (const std::set<int>& absent : {std::set<int>{0}, {3}, {0, 1}, {2}}) {
    Shape s = between({"2+2", {2, 2}});
    World world(s);
    world.exchange.masked.assign(4, false);
    for (int rank : absent) world.exchange.masked[rank] = true;
    world.expect_again();
    expect_exchange(world, absent);
  }
}

TEST(Internode, opens_over_libfabric_with_ranks_as_threads) {
  for (const Nodes& nodes : {kNodes[0], kNodes[2]}) {
    Shape s = between(nodes);
    s.network = "tcp";
    s.hidden = 1024;
    expect_exchange(World(s));
  }
}

TEST(Internode, refuses_ranks_that_want_different_networks) {
  Shape s = between({"1+1", {1, 1}});
  const World world(s);
  const auto outcomes = run_threads(2, [&](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = world.config();
    if (rank == 1) config.network.provider = "";
    Buffer::open(std::move(group), config);
  });
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_NE(outcome.message.find("network.provider"), std::string::npos) << outcome.message;
  }
}

}  // namespace
}  // namespace deep_ep::test
