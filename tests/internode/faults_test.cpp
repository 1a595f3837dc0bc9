// SPDX-License-Identifier: MIT
// A rank of another node dies or falls silent: every survivor hears who it was, soon, and opens again without it.
#include <gtest/gtest.h>

#include <csignal>
#include <thread>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRanks = 8;

struct Scene {
  explicit Scene(const char* network) : world(shape(network, kRanks, {4, 4})), smaller(shape(network, 7, {4, 3})) {}

  static Shape shape(const char* network, int ranks, std::vector<int> nodes) {
    Shape s = between({"", std::move(nodes)});
    s.ranks = ranks;
    s.network = network;
    s.tokens = 32;
    s.hidden = 256;
    return s;
  }
  World world, smaller;
  Homeward home = homeward(world, {});
  std::vector<oracle::Combined> sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
};

void exchange(Buffer& buffer, const Scene& scene) {
  const int rank = buffer.rank();
  const auto sent = buffer.dispatch(scene.world.input(rank));
  EXPECT_EQ(difference(scene.world, rank, sent), "");
  EXPECT_EQ(
      difference(scene.sums[rank], buffer.combine(combine_input(scene.home, rank, sent.handle, SumOrder::by_rank()))),
      "");
}

Outcome exchange_for_ever(Buffer& buffer, const Scene& scene, std::atomic<int>& progress) {
  return outcome_of([&] {
    for (;;) {
      exchange(buffer, scene);
      ++progress;
    }
  });
}

TEST(InternodeFaults, a_rank_that_dies_is_named_by_all_in_its_node_and_beyond) {
  constexpr int kVictim = 6;
  const Scene scene("loopback");
  Barrier ready(kRanks);
  const auto start = Clock::now();
  const auto outcomes = run_threads(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = scene.world.config();
    config.timeout = 20s;
    const auto buffer = Buffer::open(std::move(group), config);
    exchange(*buffer, scene);
    ready.wait();
    if (rank == kVictim) {
      net::LoopbackNetwork::latest()->kill(kVictim);
      return;
    }
    const Outcome outcome = outcome_of([&] { exchange(*buffer, scene); });
    EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
    ASSERT_TRUE(outcome.wait.has_value()) << outcome.message;
    EXPECT_EQ(outcome.wait->peer, kVictim) << outcome.message;
    EXPECT_TRUE(outcome.wait->peer_gone) << outcome.message;
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
  EXPECT_LT(Clock::now() - start, 15s);  // before the deadline: they know
}

TEST(InternodeFaults, a_rank_that_does_not_call_is_named_at_the_deadline) {
  constexpr int kAbsent = 5;
  const Scene scene("loopback");
  const auto outcomes = run_threads(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = scene.world.config();
    config.timeout = kSanitized ? 4000ms : 1500ms;
    const auto buffer = Buffer::open(std::move(group), config);
    exchange(*buffer, scene);
    if (rank == kAbsent) return std::this_thread::sleep_for(2 * config.timeout);
    const Outcome outcome = outcome_of([&] { exchange(*buffer, scene); });
    EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
    ASSERT_TRUE(outcome.wait.has_value()) << outcome.message;
    EXPECT_EQ(outcome.wait->peer, kAbsent) << outcome.message;
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
}

// Survivors name the rank, close, and open again without it.
void survive(int rank, int victim, std::shared_ptr<Bootstrap> group, Blackboard& board, const Scene& scene) {
  Config config = scene.world.config();
  config.timeout = 5000ms;
  auto buffer = Buffer::open(std::move(group), config);
  const Outcome outcome = exchange_for_ever(*buffer, scene, board.progress[rank]);
  EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
  ASSERT_TRUE(outcome.wait.has_value()) << outcome.message;
  EXPECT_EQ(outcome.wait->peer, victim) << outcome.message;
  buffer->close();

  TcpRendezvous where;
  where.port = board.port;
  where.rank = rank < victim ? rank : rank - 1;
  where.num_ranks = kRanks - 1;
  where.generation = 1;
  const auto again = Buffer::open(tcp_group(where), scene.smaller.config());
  EXPECT_EQ(difference(scene.smaller, again->rank(), again->dispatch(scene.smaller.input(again->rank()))), "");
}

void expect_survival(int signal, int victim) {
  const Scene scene("tcp");
  Processes processes(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
    survive(rank, victim, std::move(group), board, scene);
  });
  ASSERT_TRUE(Blackboard::wait_for(processes.board().progress[victim], 3));
  ::kill(processes.pid(victim), signal);
  // The victim of SIGSTOP is woken when the others have gone on without it.
  std::vector<int> codes;
  if (signal == SIGKILL) {
    codes = processes.wait();
    EXPECT_EQ(codes[victim], 128 + SIGKILL);
  } else {
    codes = processes.wait(40s);
    EXPECT_EQ(codes[victim], -1);  // did not end by itself
  }
  codes[victim] = 0;
  EXPECT_EQ(codes, std::vector<int>(kRanks, 0)) << "rank " << victim << " got signal " << signal;
}

TEST(InternodeFaults, a_killed_process_is_named_and_the_others_open_again) { expect_survival(SIGKILL, 6); }

}  // namespace
}  // namespace deep_ep::test
