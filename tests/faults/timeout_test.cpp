// SPDX-License-Identifier: MIT
// A rank that does not come, or comes late: the others hear who waited for whom, and nothing is spoiled.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4;
constexpr int kAbsent = 3;
constexpr auto kDeadline = 400ms;

Shape busy(std::uint64_t seed = 1, bool low_latency = false) {
  Shape s;
  s.uneven_tokens = false;
  s.percent_missing = 0;
  s.low_latency = low_latency;
  s.tokens = 12;
  s.seed = seed;
  return s;
}

void expect_timeout(const Outcome& outcome, int rank, const std::string& phase, std::uint64_t epoch) {
  EXPECT_EQ(outcome.code, ErrorCode::kTimeout) << outcome.message;
  const std::string begin = "timeout: rank " + std::to_string(rank) + " waited for rank " + std::to_string(kAbsent) +
                            " in " + phase + ", epoch " + std::to_string(epoch) + ", expected ";
  EXPECT_EQ(outcome.message.substr(0, begin.size()), begin);
  if (outcome.wait) {
    EXPECT_EQ(outcome.message,
              begin + std::to_string(outcome.wait->expected) + " seen " + std::to_string(outcome.wait->seen));
  }
  ASSERT_TRUE(outcome.wait.has_value());
  EXPECT_EQ(outcome.wait->rank, rank);
  EXPECT_EQ(outcome.wait->peer, kAbsent);
  EXPECT_EQ(outcome.wait->phase, phase);
  EXPECT_EQ(outcome.wait->epoch, epoch);
  EXPECT_LT(outcome.wait->seen, outcome.wait->expected);
}

TEST(AbsentRank, is_named_by_everybody_who_waited_in_dispatch) {
  const World world(busy());
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    buffer.dispatch(in);
    if (rank == kAbsent) return;
    in.timeout = kDeadline;
    expect_timeout(outcome_of([&] { buffer.dispatch(in); }), rank, "dispatch", 2);
    EXPECT_EQ(buffer.statistics().timeouts, 1u);
    EXPECT_GE(buffer.statistics().peers[kAbsent].wait_ns_max, 300'000'000u);
  });
}

TEST(AbsentRank, is_named_by_everybody_who_waited_in_combine) {
  const World world(busy());
  const Homeward home = homeward(world, {});
  Config config = world.config();
  config.timeout = kSanitized ? 2000ms : 500ms;
  run_ranks(kRanks, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    if (rank == kAbsent) return;
    const auto outcome =
        outcome_of([&] { buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank())); });
    expect_timeout(outcome, rank, "combine", 2);
  });
}

TEST(AbsentRank, is_named_by_everybody_who_waited_in_low_latency_calls) {
  const World world(busy(1, true));
  const Homeward home = homeward(world, {});
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    const auto sent = buffer.low_latency_dispatch(in).receive();
    if (rank == kAbsent) return;
    in.timeout = kDeadline;
    auto ticket = buffer.low_latency_dispatch(in);  // waits for nobody
    expect_timeout(outcome_of([&] { ticket.receive(); }), rank, "low_latency_dispatch", 2);
    CombineInput back = combine_input(home, rank, sent.handle, SumOrder::by_topk());
    back.timeout = kDeadline;
    expect_timeout(outcome_of([&] { buffer.low_latency_combine(back).receive(); }), rank, "low_latency_combine", 3);
  });
}

TEST(AbsentRank, survivors_close_and_open_again_without_it) {
  const World world(busy());
  Shape fewer = busy(2);
  fewer.ranks = kRanks - 1;
  const World smaller(fewer);
  auto second_group = in_process_group(kRanks - 1);
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    if (rank == kAbsent) return;
    in.timeout = kDeadline;
    expect_timeout(outcome_of([&] { buffer.dispatch(in); }), rank, "dispatch", 1);
    buffer.close();
    const auto again = AnyBuffer::open(second_group[rank], smaller.config());
    EXPECT_EQ(difference(smaller, rank, again->dispatch(smaller.input(rank))), "");
  });
}

// The others have given up operation 2 before rank 3 comes to it. Whatever it gets itself, it harms none of the later
// ones.
TEST(LateRank, spoils_no_later_operation) {
  const std::vector<World> worlds = {World(busy(1)), World(busy(2)), World(busy(3))};
  run_ranks(kRanks, worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    EXPECT_EQ(difference(worlds[0], rank, buffer.dispatch(worlds[0].input(rank))), "");
    for (int round = 0; round < 3; ++round) {
      DispatchInput in = worlds[1].input(rank);
      in.timeout = kDeadline;
      if (rank == kAbsent) std::this_thread::sleep_for(2 * kDeadline);
      const Outcome outcome = outcome_of([&] { buffer.dispatch(in); });
      if (rank != kAbsent) {
        expect_timeout(outcome, rank, "dispatch", static_cast<std::uint64_t>(4 * round + 2));
      } else {
        EXPECT_TRUE(!outcome.failed || outcome.code == ErrorCode::kTimeout) << outcome.message;
      }
      std::vector<DispatchOutput> kept;
      for (int i = 0; i < 3; ++i) kept.push_back(buffer.dispatch(worlds[i].input(rank)));
      for (int i = 0; i < 3; ++i)
        EXPECT_EQ(difference(worlds[i], rank, kept[i]), "") << "rank " << rank << " round " << round;
    }
  });
}

TEST(LateRank, spoils_no_later_combine) {
  const World world(busy(4));
  const Homeward home = homeward(world, {});
  const auto sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
    in.timeout = kDeadline;
    if (rank == kAbsent) std::this_thread::sleep_for(2 * kDeadline);
    const Outcome outcome = outcome_of([&] { buffer.combine(in); });
    if (rank != kAbsent) expect_timeout(outcome, rank, "combine", 2);
    in.timeout = 0ms;
    for (int i = 0; i < 3; ++i) EXPECT_EQ(difference(sums[rank], buffer.combine(in)), "") << "rank " << rank;
  });
}

TEST(LateRank, spoils_no_later_low_latency_call) {
  const std::vector<World> worlds = {World(busy(1, true)), World(busy(2, true))};
  run_ranks(kRanks, worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = worlds[0].input(rank);
    in.timeout = kDeadline;
    if (rank == kAbsent) std::this_thread::sleep_for(2 * kDeadline);
    const Outcome outcome = outcome_of([&] { buffer.low_latency_dispatch(in).receive(); });
    if (rank != kAbsent) expect_timeout(outcome, rank, "low_latency_dispatch", 1);
    for (int i = 0; i < 12; ++i) {  // every slot is used again
      const World& world = worlds[i % 2];
      const Outcome later = outcome_of([&] {
        EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "")
            << "rank " << rank << " call " << i;
      });
      EXPECT_FALSE(later.failed) << "rank " << rank << " call " << i << ": " << later.message;
    }
  });
}

// A late rank may find the places of its rows in outputs that their ranks have given up: nothing else lies there yet.
TEST(LateRank, writes_no_low_latency_row_where_something_else_lies) {
  Shape shape = busy(1, true);
  shape.layout = OutputLayout::kPadded;
  const World world(shape);
  Barrier barrier(kRanks);
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    in.timeout = kDeadline;
    std::vector<Tensor> others;
    if (rank != kAbsent) {
      std::int64_t bytes = 0;
      const Outcome outcome = outcome_of([&] {
        auto ticket = buffer.low_latency_dispatch(in);
        bytes = static_cast<std::int64_t>(ticket.promised()->x.bytes());
        ticket.receive();
      });
      expect_timeout(outcome, rank, "low_latency_dispatch", 1);
      for (int i = 0; i < 2; ++i) {
        Tensor memory = buffer.allocate(DType::kU8, {bytes});
        if (device::holds(memory.data)) continue;
        std::fill_n(memory.as<std::uint8_t>(), bytes, std::uint8_t{0x5a});
        others.push_back(std::move(memory));
      }
    }
    barrier.wait();
    if (rank == kAbsent) {
      EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(in).receive()), "");
    }
    barrier.wait();
    for (const Tensor& other : others)
      EXPECT_EQ(std::count(other.as<std::uint8_t>(), other.as<std::uint8_t>() + other.numel(), 0x5a), other.numel());
    in.timeout = 0ms;
    for (int i = 0; i < 6; ++i)
      EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(in).receive()), "") << "call " << i;
  });
}

}  // namespace
}  // namespace deep_ep::test
