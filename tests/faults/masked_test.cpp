// SPDX-License-Identifier: MIT
// A rank that is left out, and taken back.
#include <gtest/gtest.h>

#include <tuple>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4;

Shape shape_of(OutputLayout layout, bool low_latency) {
  Shape s;
  s.layout = layout;
  s.low_latency = low_latency;
  s.tokens = 12;
  return s;
}

class MaskedRank : public testing::TestWithParam<std::tuple<OutputLayout, bool>> {
 protected:
  Shape shape() const { return shape_of(std::get<0>(GetParam()), std::get<1>(GetParam())); }
};

INSTANTIATE_TEST_SUITE_P(All, MaskedRank,
                         testing::Combine(testing::Values(OutputLayout::kByRank, OutputLayout::kByExpert,
                                                          OutputLayout::kPadded),
                                          testing::Bool()));

void expect_exchange(AnyBuffer& buffer, const World& world, const Homeward& home,
                     const std::vector<oracle::Combined>& sums) {
  const int rank = buffer.rank();
  const auto sent = dispatch(buffer, world.input(rank), world.shape.low_latency);
  EXPECT_EQ(difference(world, rank, sent), "") << "rank " << rank << " " << world.shape.to_string();
  const auto got =
      combine(buffer, combine_input(home, rank, sent.handle, SumOrder::by_rank()), world.shape.low_latency);
  EXPECT_EQ(difference(sums[rank], got), "") << "rank " << rank << " " << world.shape.to_string();
}

TEST_P(MaskedRank, is_skipped_by_the_others_who_go_on) {
  const World world = World(shape()).without({false, false, true, false});
  const Homeward home = homeward(world, {});
  const auto sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    if (buffer.rank() == 2) return;  // never calls anything
    buffer.set_masked(2, true);
    EXPECT_TRUE(buffer.masked(2));
    EXPECT_FALSE(buffer.masked(0));
    for (int i = 0; i < 12; ++i) expect_exchange(buffer, world, home, sums);
  });
}

// Both sides make the same calls, each without the other; then all are together again.
TEST_P(MaskedRank, is_taken_back) {
  const World all(shape());
  const World without = World(shape()).without({false, false, true, false});
  const World alone = World(shape()).without({true, true, false, true});
  const auto plan = [](const World& world) {
    Homeward home = homeward(world, {});
    auto sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
    return std::pair(std::move(home), std::move(sums));
  };
  const auto [all_home, all_sums] = plan(all);
  const auto [without_home, without_sums] = plan(without);
  const auto [alone_home, alone_sums] = plan(alone);
  Barrier barrier(kRanks);
  run_ranks(kRanks, all.config(), [&](AnyBuffer& buffer) {
    const bool apart = buffer.rank() == 2;
    expect_exchange(buffer, all, all_home, all_sums);
    barrier.wait();  // who is masked before it has received may get an error instead: see MaskedReader
    for (int r = 0; r < kRanks; ++r) {
      if (r != buffer.rank() && (r == 2) != apart) buffer.set_masked(r, true);
    }
    for (int i = 0; i < 10; ++i) {
      apart ? expect_exchange(buffer, alone, alone_home, alone_sums)
            : expect_exchange(buffer, without, without_home, without_sums);
    }
    barrier.wait();
    for (int r = 0; r < kRanks; ++r) {
      if (r != buffer.rank()) buffer.set_masked(r, false);
    }
    barrier.wait();
    for (int i = 0; i < 10; ++i) expect_exchange(buffer, all, all_home, all_sums);
  });
}

// The order of a sum is that of the ranks that take part: a node stands at the highest selection that still counts.
TEST(MaskedSums, leave_the_rank_out_in_every_order_when_its_rows_were_dispatched_before) {
  for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert}) {
    Shape s = shape_of(layout, false);
    // FP32 in three nodes: in which order two are added makes no difference, nor with few digits three.
    s.dtype = DType::kFp32;
    s.ranks = 6;
    s.ranks_per_node = {2, 2, 2};
    s.topk = 8;
    const World all(s);
    const Homeward home = homeward(all, {.dtype = DType::kFp32, .weights = layout == OutputLayout::kByExpert});
    std::vector<oracle::Dispatched> came = all.expected;
    for (oracle::Dispatched& of_rank : came)
      for (std::int32_t& to : of_rank.dst_rank) to = to == 2 ? -1 : to;
    run_ranks(s.ranks, all.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const auto sent = buffer.dispatch(all.input(rank));
      EXPECT_EQ(difference(all, rank, sent), "");
      if (rank == 2) return;
      buffer.set_masked(2, true);
      for (const SumOrder& order : all_orders()) {
        const auto sums = oracle::combine(all.exchange, came, home.ranks, order);
        EXPECT_EQ(difference(sums[rank], buffer.combine(combine_input(home, rank, sent.handle, order))), "")
            << "rank " << rank << ", " << to_string(order) << ", of " << s.to_string();
      }
    });
  }
}

// What a rank reads in others' memory is theirs again once they have masked it and gone on.
TEST(MaskedReader, notices_that_what_it_reads_may_have_been_written_over) {
  const Shape shape = shape_of(OutputLayout::kPadded, true);
  const World all(shape);
  const World without = World(shape).without({false, false, true, false});
  const Homeward home = homeward(without, {});
  const auto sums = oracle::combine(without.exchange, without.expected, home.ranks, SumOrder::by_rank());
  Barrier barrier(kRanks);
  run_ranks(kRanks, all.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    auto ticket = buffer.low_latency_dispatch(all.input(rank));
    if (rank != 2) {
      EXPECT_EQ(difference(all, rank, ticket.receive()), "");
      buffer.set_masked(2, true);
      for (int i = 0; i < 3; ++i) expect_exchange(buffer, without, home, sums);
    }
    barrier.wait();
    if (rank != 2) return;
    const Outcome outcome = outcome_of([&] { EXPECT_EQ(difference(all, rank, ticket.receive()), ""); });
    if (on_cuda() && !outcome.failed) return;  // there a receiver reads its own memory, where nobody writes any more
    EXPECT_EQ(outcome.code, ErrorCode::kTimeout);
    EXPECT_NE(outcome.message.find("rank 2 waited for rank"), std::string::npos) << outcome.message;
  });
}

// As long as the memory is not needed, a late rank still gets all of it.
TEST(MaskedReader, still_gets_what_was_sent_before_it_was_masked) {
  const Shape shape = shape_of(OutputLayout::kPadded, true);
  const World all(shape);
  Barrier barrier(kRanks);
  run_ranks(kRanks, all.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    auto ticket = buffer.low_latency_dispatch(all.input(rank));
    if (rank != 2) {
      EXPECT_EQ(difference(all, rank, ticket.receive()), "");
      buffer.set_masked(2, true);
    }
    barrier.wait();
    if (rank == 2) {
      EXPECT_EQ(difference(all, rank, ticket.receive()), "");
    }
    barrier.wait();
  });
}

class SilentRank : public testing::TestWithParam<std::tuple<OutputLayout, bool>> {
 protected:
  Shape shape() const { return shape_of(std::get<0>(GetParam()), true); }
  template <typename Input>
  static Input patiently(Input in) {
    in.mask_silent = true;
    in.timeout = kSanitized ? 3000ms : 500ms;
    in.at_once = std::get<1>(GetParam());
    return in;
  }
};

INSTANTIATE_TEST_SUITE_P(All, SilentRank,
                         testing::Combine(testing::Values(OutputLayout::kByRank, OutputLayout::kByExpert,
                                                          OutputLayout::kPadded),
                                          testing::Bool()));

TEST_P(SilentRank, is_left_out_within_the_dispatch_that_finds_it_so) {
  const World all(shape());
  const World without = World(shape()).without({false, false, true, false});
  const Homeward home = homeward(without, {});
  const auto sums = oracle::combine(without.exchange, without.expected, home.ranks, SumOrder::by_topk());
  const World found = all.finding_silent({false, false, true, false});
  Barrier barrier(kRanks);
  run_ranks(kRanks, all.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    EXPECT_EQ(difference(all, rank, dispatch(buffer, patiently(all.input(rank)), true)), "");
    barrier.wait();
    if (rank != 2) {
      const auto sent = dispatch(buffer, patiently(without.input(rank)), true);
      EXPECT_EQ(difference(found, rank, sent), "") << "rank " << rank << " " << without.shape.to_string();
      for (int peer = 0; peer < kRanks; ++peer) EXPECT_EQ(buffer.masked(peer), peer == 2) << "rank " << peer;
      const auto back = combine_input(home, rank, sent.handle, SumOrder::by_topk());
      EXPECT_EQ(difference(sums[rank], combine(buffer, patiently(back), true)), "");
      for (int i = 0; i < 10; ++i)
        EXPECT_EQ(difference(without, rank, dispatch(buffer, without.input(rank), true)), "") << "call " << i;
    }
    barrier.wait();
  });
}

TEST_P(SilentRank, is_left_out_within_the_combine_that_finds_it_so) {
  const World all(shape());
  const Homeward home = homeward(all, {});
  std::vector<oracle::Dispatched> came = all.expected;  // what rank 2 was sent is not seen again
  for (oracle::Dispatched& of_rank : came)
    for (std::int32_t& to : of_rank.dst_rank) to = to == 2 ? -1 : to;
  const auto sums = oracle::combine(all.exchange, came, home.ranks, SumOrder::by_topk());
  Barrier barrier(kRanks);
  run_ranks(kRanks, all.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = dispatch(buffer, all.input(rank), true);
    barrier.wait();
    if (rank != 2) {
      const auto back = combine_input(home, rank, sent.handle, SumOrder::by_topk());
      EXPECT_EQ(difference(sums[rank], combine(buffer, patiently(back), true)), "") << all.shape.to_string();
      EXPECT_TRUE(buffer.masked(2));
      EXPECT_EQ(difference(sums[rank], combine(buffer, back, true)), "") << "again, without waiting";
    }
    barrier.wait();
  });
}

}  // namespace
}  // namespace deep_ep::test
