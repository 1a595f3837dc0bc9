// SPDX-License-Identifier: MIT
// A rank of another node dies or falls silent: every survivor hears who it was, soon, and opens again without it.
#include <gtest/gtest.h>

#include <csignal>
#include <functional>
#include <ostream>
#include <thread>

#include "exchange.h"
#include "internode/networks.h"

namespace deep_ep::test {
namespace {

using Clock = std::chrono::steady_clock;

// Who dies, and where. In {1, 3} the last rank is on nobody's rail: others hear of it only by being told.
struct Death {
  std::vector<int> nodes;
  int victim;
  int ranks() const { return Nodes{"", nodes}.ranks(); }
  Death without() const {
    Death rest = *this;
    --rest.nodes.back();
    return rest;
  }
};
void PrintTo(const Death& death, std::ostream* out) {
  *out << "rank " << death.victim << " of nodes of " << testing::PrintToString(death.nodes);
}
const std::vector<Death> kDeaths = {{{4, 4}, 6}, {{1, 3}, 3}};

struct Scene {
  Scene(const char* network, const Death& death)
      : world(shape(network, death)), smaller(shape(network, death.without())) {}

  static Shape shape(const char* network, const Death& death) {
    Shape s = between({"", death.nodes});
    s.network = network;
    s.tokens = 32;
    s.hidden = 256;
    return s;
  }
  World world, smaller;
  Homeward home = homeward(world, {});
  std::vector<oracle::Combined> sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
};

void exchange(AnyBuffer& buffer, const Scene& scene) {
  const int rank = buffer.rank();
  const auto sent = buffer.dispatch(scene.world.input(rank));
  EXPECT_EQ(difference(scene.world, rank, sent), "");
  EXPECT_EQ(
      difference(scene.sums[rank], buffer.combine(combine_input(scene.home, rank, sent.handle, SumOrder::by_rank()))),
      "");
}

Outcome exchange_for_ever(AnyBuffer& buffer, const Scene& scene, std::atomic<int>& progress) {
  return outcome_of([&] {
    for (;;) {
      exchange(buffer, scene);
      ++progress;
    }
  });
}

void expect_named(const Outcome& outcome, int victim) {
  EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
  ASSERT_TRUE(outcome.wait.has_value()) << outcome.message;
  EXPECT_EQ(outcome.wait->peer, victim) << outcome.message;
}

TEST(InternodeFaults, a_rank_that_dies_is_named_by_all_in_its_node_and_beyond) {
  for (const Death& death : kDeaths) {
    const Scene scene("loopback", death);
    Barrier ready(death.ranks());
    const auto start = Clock::now();
    const auto outcomes = run_threads(death.ranks(), [&](int rank, std::shared_ptr<Bootstrap> group) {
      Config config = scene.world.config();
      config.timeout = 20s;
      const auto buffer = AnyBuffer::open(std::move(group), config);
      exchange(*buffer, scene);
      ready.wait();
      if (rank == death.victim) return net::LoopbackNetwork::latest()->kill(rank);
      const Outcome outcome = outcome_of([&] { exchange(*buffer, scene); });
      expect_named(outcome, death.victim);
      EXPECT_TRUE(outcome.wait && outcome.wait->peer_gone) << outcome.message;
    });
    for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
    EXPECT_LT(Clock::now() - start, 15s);  // before the deadline: they know
  }
}

TEST(InternodeFaults, a_rank_that_does_not_call_is_named_at_the_deadline) {
  const Death absence{{4, 4}, 5};
  const Scene scene("loopback", absence);
  Barrier all_have_come(absence.ranks());  // whoever comes late, on a busy machine, would be named with good reason
  Barrier done(absence.ranks());
  const auto outcomes = run_threads(absence.ranks(), [&](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = scene.world.config();
    config.timeout = kSanitized ? 8000ms : 3000ms;
    const auto buffer = AnyBuffer::open(std::move(group), config);
    exchange(*buffer, scene);
    all_have_come.wait();
    const Outcome outcome = rank == absence.victim ? Outcome() : outcome_of([&] { exchange(*buffer, scene); });
    done.wait();
    if (rank != absence.victim) expect_named(outcome, absence.victim);
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
}

// Two nodes of one rank each, between which nothing gets through from some moment on.
void expect_both_name_each_other(const std::function<void(int rank)>& before_the_last_call) {
  const World world(Scene::shape("loopback", {{1, 1}, -1}));
  const auto outcomes = run_threads(2, [&](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = world.config();
    config.timeout = kSanitized ? 4000ms : 1500ms;
    const auto buffer = AnyBuffer::open(std::move(group), config);
    before_the_last_call(rank);
    expect_named(outcome_of([&] { buffer->dispatch(world.input(rank)); }), 1 - rank);
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
}

TEST(InternodeFaults, a_network_that_loses_every_packet_ends_calls_at_the_deadline_and_names_the_peer) {
  net::LoopbackNetwork::set_faults({.seed = 5, .drop = 1.0});
  expect_both_name_each_other([](int) {});
  net::LoopbackNetwork::set_faults({});
}

TEST(InternodeFaults, a_cut_link_ends_calls_at_the_deadline_and_names_the_peer_behind_it) {
  Barrier cut(2);
  expect_both_name_each_other([&](int rank) {
    if (rank == 0) net::LoopbackNetwork::latest()->cut(0, 1);
    cut.wait();
  });
}

// Survivors name the rank, close, and open again without it.
void survive(int rank, const Death& death, std::shared_ptr<Bootstrap> group, Blackboard& board, const Scene& scene) {
  Config config = scene.world.config();
  config.timeout = on_cuda() ? 15s : 5s;
  auto buffer = AnyBuffer::open(std::move(group), config);
  expect_named(exchange_for_ever(*buffer, scene, board.progress[rank]), death.victim);
  buffer->close();

  TcpRendezvous where;
  where.port = board.port;
  where.rank = rank < death.victim ? rank : rank - 1;
  where.num_ranks = death.ranks() - 1;
  where.generation = 1;
  const auto again = AnyBuffer::open(tcp_group(where), scene.smaller.config());
  EXPECT_EQ(difference(scene.smaller, again->rank(), again->dispatch(scene.smaller.input(again->rank()))), "");
}

class InternodeDeath : public testing::TestWithParam<Death> {};
INSTANTIATE_TEST_SUITE_P(Processes, InternodeDeath, testing::ValuesIn(kDeaths));

TEST_P(InternodeDeath, of_a_process_is_named_and_the_others_open_again) {
  const Death& death = GetParam();
  const Scene scene("tcp", death);
  Processes processes(death.ranks(), [&](int rank, std::shared_ptr<Bootstrap> group, Blackboard& board) {
    survive(rank, death, std::move(group), board, scene);
  });
  // Processes that share a GPU take turns on it.
  ASSERT_TRUE(Blackboard::wait_for(processes.board().progress[death.victim], on_cuda() ? 1 : 3));
  processes.kill_rank(death.victim);
  std::vector<int> expected(death.ranks(), 0);
  expected[death.victim] = 128 + SIGKILL;
  EXPECT_EQ(processes.wait(), expected);
}

}  // namespace
}  // namespace deep_ep::test
