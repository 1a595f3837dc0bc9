// SPDX-License-Identifier: MIT
// Ranks as processes that share memory: the same results, bit for bit, as the oracle has and ranks as threads give.
#include <gtest/gtest.h>

#include <cstdlib>

#include "exchange.h"

namespace deep_ep::test {
namespace {

struct Case {
  World world;
  Homeward home;
  std::vector<oracle::Combined> sums;
  explicit Case(const Shape& shape)
      : world(shape),
        home(homeward(world, {})),
        sums(oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank())) {}
};

void exchange(AnyBuffer& buffer, const Case& c) {
  const int rank = buffer.rank();
  const auto sent = dispatch(buffer, c.world.input(rank), c.world.shape.low_latency);
  EXPECT_EQ(difference(c.world, rank, sent), "") << "rank " << rank << " " << c.world.shape.to_string();
  const auto got =
      combine(buffer, combine_input(c.home, rank, sent.handle, SumOrder::by_rank()), c.world.shape.low_latency);
  EXPECT_EQ(difference(c.sums[rank], got), "") << "rank " << rank << " " << c.world.shape.to_string();
}

class ProcessRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, ProcessRanks, testing::Values(1, 2, 4, 8));

TEST_P(ProcessRanks, give_the_results_of_the_oracle_in_every_layout) {
  std::vector<Case> all;
  for (const auto layout : {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded}) {
    for (const bool low_latency : {false, true}) {
      Shape s;
      s.ranks = GetParam();
      s.layout = layout;
      s.low_latency = low_latency;
      all.emplace_back(s);
    }
  }
  Processes processes(GetParam(), [&](int, std::shared_ptr<Bootstrap> group, Blackboard&) {
    const auto buffer = AnyBuffer::open(std::move(group), all[1].world.config());
    for (int repeat = 0; repeat < 3; ++repeat) {
      for (const Case& c : all) exchange(*buffer, c);
    }
  });
  EXPECT_EQ(processes.wait(), std::vector<int>(GetParam(), 0));
}

// A GPU's arena begins with 64 MiB of pages: what comes later must be mapped by the peers, who are other processes.
TEST(ProcessRanks, hold_more_outputs_than_an_arena_has_pages_at_first) {
  Shape s;
  s.ranks = 2;
  s.hidden = 4096;
  s.tokens = 512;
  s.uneven_tokens = false;
  s.topk = 2;
  s.experts = 2;
  s.percent_missing = 0;
  const Case c(s);
  Config config = c.world.config();
  config.arena_bytes = std::size_t{256} << 20;
  Processes processes(s.ranks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard&) {
    const auto buffer = AnyBuffer::open(std::move(group), config);
    std::vector<DispatchOutput> kept;  // 8 MiB each
    for (int i = 0; i < 12; ++i) kept.push_back(buffer->dispatch(c.world.input(rank)));
    for (const DispatchOutput& output : kept) EXPECT_EQ(difference(c.world, rank, output), "");
    EXPECT_EQ(buffer->statistics().copied_out_bytes, 0u);
    EXPECT_GT(buffer->statistics().arena_bytes_high_water, std::size_t{64} << 20);
  });
  EXPECT_EQ(processes.wait(), std::vector<int>(s.ranks, 0));
}

// A GPU's memory can be shared in several ways; where one is not to be had, every rank says so, naming it.
class ProcessRanksBy : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Sharing, ProcessRanksBy, testing::Values("descriptor", "ipc", "fabric"));

TEST_P(ProcessRanksBy, give_the_same_results_or_say_why_not) {
  std::vector<Case> all;
  for (const bool low_latency : {false, true}) {
    Shape s;
    s.ranks = 2;
    s.layout = OutputLayout::kByExpert;
    s.low_latency = low_latency;
    all.emplace_back(s);
  }
  ::setenv("DEEP_EP_CUDA_SHARING", GetParam(), 1);
  Processes processes(2, [&](int, std::shared_ptr<Bootstrap> group, Blackboard&) {
    std::unique_ptr<AnyBuffer> buffer;
    const Outcome opened = outcome_of([&] { buffer = AnyBuffer::open(std::move(group), all[1].world.config()); });
    if (opened.failed) {
      EXPECT_STREQ(GetParam(), "fabric");
      EXPECT_NE(opened.message.find("fabric"), std::string::npos) << opened.message;
      return;
    }
    for (const Case& c : all) exchange(*buffer, c);
  });
  ::unsetenv("DEEP_EP_CUDA_SHARING");
  EXPECT_EQ(processes.wait(), std::vector<int>(2, 0));
}

TEST(ProcessRanks, meet_over_tcp_in_any_order) {
  Shape s;
  s.ranks_per_node = {2};
  const Case c(s);
  Processes processes(s.ranks, [&](int rank, std::shared_ptr<Bootstrap>, Blackboard& board) {
    if (rank == 0 && !Blackboard::wait_for(board.go, 1)) throw std::runtime_error("rank 0 was not let go");
    TcpRendezvous where;
    where.port = board.port;
    where.rank = rank;
    where.num_ranks = s.ranks;
    if (rank == 3) board.go = 1;
    exchange(*AnyBuffer::open(tcp_group(where), c.world.config()), c);
  });
  EXPECT_EQ(processes.wait(), std::vector<int>(s.ranks, 0));
}

}  // namespace
}  // namespace deep_ep::test
