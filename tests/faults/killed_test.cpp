// SPDX-License-Identifier: MIT
// Ranks as processes, one of them killed: the survivors hear of it, open again without it, and nothing stays behind.
#include <gtest/gtest.h>

#include <csignal>
#include <set>
#include <string>
#include <thread>

#include "exchange.h"
#include "left_behind.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4;
constexpr int kVictim = 2;

Shape of(int ranks, bool low_latency) {
  Shape s;
  s.ranks = ranks;
  s.low_latency = low_latency;
  s.tokens = 16;
  return s;
}

struct Scene {
  explicit Scene(bool low_latency = false) : world(of(kRanks, low_latency)), smaller(of(kRanks - 1, low_latency)) {}
  World world, smaller;
  Homeward home = homeward(world, {});
  std::vector<oracle::Combined> sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
};

// Exchanges until one fails. Every result before that is right.
Outcome exchange_for_ever(AnyBuffer& buffer, const Scene& scene, std::atomic<int>& progress) {
  const int rank = buffer.rank();
  return outcome_of([&] {
    for (;;) {
      const auto sent = buffer.dispatch(scene.world.input(rank));
      EXPECT_EQ(difference(scene.world, rank, sent), "");
      const auto got = buffer.combine(combine_input(scene.home, rank, sent.handle, SumOrder::by_rank()));
      EXPECT_EQ(difference(scene.sums[rank], got), "");
      ++progress;
    }
  });
}

void survive(int rank, std::shared_ptr<Bootstrap> group, Blackboard& board, const Scene& scene) {
  Config config = scene.world.config();
  config.timeout = 2000ms;
  auto buffer = AnyBuffer::open(std::move(group), config);
  const Outcome outcome = exchange_for_ever(*buffer, scene, board.progress[rank]);
  EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
  EXPECT_TRUE(outcome.wait.has_value()) << outcome.message;
  buffer->close();

  TcpRendezvous where;
  where.port = board.port;
  where.rank = rank < kVictim ? rank : rank - 1;
  where.num_ranks = kRanks - 1;
  where.generation = 1;
  const auto again = AnyBuffer::open(tcp_group(where), scene.smaller.config());
  EXPECT_EQ(difference(scene.smaller, again->rank(), again->dispatch(scene.smaller.input(again->rank()))), "");
}

class KilledAfter : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Exchanges, KilledAfter, testing::Values(1, 5, 23));

TEST_P(KilledAfter, is_noticed_by_the_survivors_who_open_again_without_it) {
  const auto before = shared_memory_files();
  const Scene scene;
  Processes processes(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
    survive(rank, std::move(group), board, scene);
  });
  ASSERT_TRUE(Blackboard::wait_for(processes.board().progress[kVictim], GetParam()));
  processes.kill_rank(kVictim);
  EXPECT_EQ(processes.wait(), (std::vector<int>{0, 0, 128 + SIGKILL, 0}));
  EXPECT_EQ(left_in_shared_memory(before), std::set<std::string>());
}

// One exchange, after which the victim is killed; then every survivor does `then(buffer, rank)`.
template <typename Then>
void after_the_victims_end(const Scene& scene, const Then& then) {
  Processes processes(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
    Config config = scene.world.config();
    config.timeout = 3000ms;  // on a GPU it is noticed at the deadline only
    auto buffer = AnyBuffer::open(std::move(group), config);
    buffer->dispatch(scene.world.input(rank));
    ++board.progress[rank];
    if (rank == kVictim) {
      for (;;) std::this_thread::sleep_for(1s);
    }
    if (!Blackboard::wait_for(board.go, 1)) throw std::runtime_error("nobody was killed");
    then(*buffer, rank);
  });
  for (int rank = 0; rank < kRanks; ++rank) ASSERT_TRUE(Blackboard::wait_for(processes.board().progress[rank], 1));
  processes.kill_rank(kVictim);
  std::this_thread::sleep_for(50ms);
  processes.board().go = 1;
  EXPECT_EQ(processes.wait(), (std::vector<int>{0, 0, 128 + SIGKILL, 0}));
}

TEST(KilledRank, is_named_with_the_reason_that_it_ended) {
  const Scene scene;
  after_the_victims_end(scene, [&](AnyBuffer& buffer, int rank) {
    const Outcome outcome = outcome_of([&] { buffer.dispatch(scene.world.input(rank)); });
    EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
    ASSERT_TRUE(outcome.wait.has_value());
    EXPECT_EQ(outcome.wait->peer, kVictim);
    EXPECT_TRUE(outcome.wait->peer_gone) << outcome.message;
  });
}

TEST(KilledRank, may_be_masked_and_the_others_go_on) {
  const Scene scene;
  const World without = scene.world.without({false, false, true, false});
  after_the_victims_end(scene, [&](AnyBuffer& buffer, int rank) {
    buffer.set_masked(kVictim, true);
    for (int i = 0; i < 10; ++i) EXPECT_EQ(difference(without, rank, buffer.dispatch(without.input(rank))), "");
  });
}

TEST(KilledRank, is_left_out_within_a_low_latency_call_that_masks_silent_ranks) {
  const Scene scene(true);
  const World without = scene.world.without({false, false, true, false});
  const World found = scene.world.finding_silent({false, false, true, false});
  after_the_victims_end(scene, [&](AnyBuffer& buffer, int rank) {
    DispatchInput in = scene.world.input(rank);
    in.mask_silent = true;
    in.timeout = 500ms;
    EXPECT_EQ(difference(found, rank, buffer.low_latency_dispatch(in).receive()), "") << "rank " << rank;
    EXPECT_TRUE(buffer.masked(kVictim));
    for (int i = 0; i < 10; ++i)
      EXPECT_EQ(difference(without, rank, buffer.low_latency_dispatch(scene.world.input(rank)).receive()), "");
  });
}

TEST(KilledRank, all_of_them_at_once_leave_no_shared_memory) {
  const auto before = shared_memory_files();
  {
    const Scene scene;
    Processes processes(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
      auto buffer = AnyBuffer::open(std::move(group), scene.world.config());
      exchange_for_ever(*buffer, scene, board.progress[rank]);
    });
    ASSERT_TRUE(Blackboard::wait_for(processes.board().progress[0], 2));
    for (int rank = 0; rank < kRanks; ++rank) processes.kill_rank(rank);
    EXPECT_EQ(processes.wait(), std::vector<int>(kRanks, 128 + SIGKILL));
  }
  EXPECT_EQ(left_in_shared_memory(before), std::set<std::string>());
}

}  // namespace
}  // namespace deep_ep::test
