// SPDX-License-Identifier: MIT
// A rank that is stopped past everybody's deadline, in the middle of whatever it is doing, and continued later: the
// others mask it and go on, and nothing that they hold or receive is harmed.
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <thread>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4;
constexpr int kStalled = 1;
constexpr int kDone = 1 << 20;
constexpr int kKept = 6;  // outputs that each survivor holds on to

Shape busy() {
  Shape s;
  s.ranks = kRanks;
  s.tokens = 32;
  s.hidden = 512;
  return s;
}

struct Scene {
  World all{busy()};
  World without = all.without({false, true, false, false});
  Homeward all_home = homeward(all, {}), home = homeward(without, {});
  std::vector<oracle::Combined> all_sums =
      oracle::combine(all.exchange, all.expected, all_home.ranks, SumOrder::by_rank());
  std::vector<oracle::Combined> sums =
      oracle::combine(without.exchange, without.expected, home.ranks, SumOrder::by_rank());
};

// Until a call fails, as it must when the others are gone.
Outcome exchange_for_ever(AnyBuffer& buffer, const Scene& scene, std::atomic<int>& progress) {
  const int rank = buffer.rank();
  return outcome_of([&] {
    for (;;) {
      const auto sent = buffer.dispatch(scene.all.input(rank));
      EXPECT_EQ(difference(scene.all, rank, sent), "");
      const auto got = buffer.combine(combine_input(scene.all_home, rank, sent.handle, SumOrder::by_rank()));
      EXPECT_EQ(difference(scene.all_sums[rank], got), "");
      ++progress;
    }
  });
}

// One may have given up a call later than another, who got what the stalled rank still sent. From here on all make the
// same calls again: those that are behind make up for it by calls that they refuse.
void fall_into_step(AnyBuffer& buffer, Blackboard& board) {
  constexpr int kHere = 100000;
  board.progress[buffer.rank()] = kHere + static_cast<int>(buffer.statistics().operations);
  int most = 0;
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == kStalled) continue;
    if (!Blackboard::wait_for(board.progress[rank], kHere)) throw std::runtime_error("a survivor did not come");
    most = std::max(most, board.progress[rank] - kHere);
  }
  for (auto calls = static_cast<int>(buffer.statistics().operations); calls < most; ++calls)
    buffer.plain().refuse(Operation::kDispatch, "to fall into step");
}

void go_on(AnyBuffer& buffer, const Scene& scene, Blackboard& board) {
  const int rank = buffer.rank();
  std::vector<DispatchOutput> kept;
  const auto exchange = [&] {
    const auto sent = buffer.dispatch(scene.without.input(rank));
    EXPECT_EQ(difference(scene.without, rank, sent), "");
    const auto got = buffer.combine(combine_input(scene.home, rank, sent.handle, SumOrder::by_rank()));
    EXPECT_EQ(difference(scene.sums[rank], got), "");
    if (kept.size() < kKept) kept.push_back(sent);
  };
  for (int i = 0; i < 2 * kKept; ++i) exchange();
  board.progress[rank] = kDone;  // the stalled one is let go once everybody is here
  if (!Blackboard::wait_for(board.go, 1)) throw std::runtime_error("the stalled rank was not continued");
  for (int i = 0; i < 40; ++i) exchange();
  std::this_thread::sleep_for(200ms);
  for (const DispatchOutput& output : kept) EXPECT_EQ(difference(scene.without, rank, output), "");
}

class StalledAfter : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Exchanges, StalledAfter, testing::Values(1, 7));

TEST_P(StalledAfter, harms_no_output_of_the_others_when_it_continues) {
  const Scene scene;
  Processes processes(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
    Config config = scene.all.config();
    config.timeout = 1500ms;
    auto buffer = AnyBuffer::open(std::move(group), config);
    const Outcome outcome = exchange_for_ever(*buffer, scene, board.progress[rank]);
    EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
    if (rank == kStalled) return;
    buffer->set_masked(kStalled, true);
    fall_into_step(*buffer, board);
    go_on(*buffer, scene, board);
  });
  Blackboard& board = processes.board();
  ASSERT_TRUE(Blackboard::wait_for(board.progress[kStalled], GetParam()));
  ::kill(processes.pid(kStalled), SIGSTOP);
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == kStalled) continue;
    ASSERT_TRUE(Blackboard::wait_for(board.progress[rank], kDone));
  }
  ::kill(processes.pid(kStalled), SIGCONT);
  board.go = 1;
  EXPECT_EQ(processes.wait(), std::vector<int>(kRanks, 0));
}

}  // namespace
}  // namespace deep_ep::test
