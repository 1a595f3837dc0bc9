// SPDX-License-Identifier: MIT
// Memory and descriptors: arenas that fill up or are too small, what is left behind, several buffers at once, the
// counters.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>
#include <string>
#include <thread>

#include "exchange.h"
#include "left_behind.h"

namespace deep_ep::test {
namespace {

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(Resources, fifty_buffers_one_after_another_leave_nothing_behind) {
  Shape s;
  s.ranks = 2;
  s.tokens = 8;
  const World world(s);
  const auto cycle = [&] {
    run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) { buffer.dispatch(world.input(buffer.rank())); });
  };
  cycle();  // what a first use keeps, it keeps once
  const auto before = shared_memory_files();
  const std::size_t descriptors = names_in("/proc/self/fd").size();
  for (int i = 0; i < 50; ++i) cycle();
  EXPECT_EQ(names_in("/proc/self/fd").size(), descriptors);
  EXPECT_EQ(left_in_shared_memory(before), std::set<std::string>());
}

TEST(Resources, several_buffers_of_one_process_work_side_by_side) {
  Shape s;
  s.ranks = 3;
  const World one(s);
  s.seed = 2;
  const World two(s);
  auto second_group = in_process_group(s.ranks);
  auto third_group = in_process_group(s.ranks);
  Barrier barrier(s.ranks);
  run_ranks(s.ranks, one.config(), [&](AnyBuffer& first) {
    const int rank = first.rank();
    auto second = AnyBuffer::open(second_group[rank], two.config());
    auto third = AnyBuffer::open(third_group[rank], one.config());
    for (int i = 0; i < 4; ++i) {
      const auto a = first.dispatch(one.input(rank));
      const auto b = second->dispatch(two.input(rank));
      const auto c = third->dispatch(one.input(rank));
      EXPECT_EQ(difference(one, rank, a), "");
      EXPECT_EQ(difference(two, rank, b), "");
      EXPECT_EQ(difference(one, rank, c), "");
    }
    second->close();
    second->close();
    // Closing frees memory of a GPU, which waits for all its kernels: none may wait for a rank that is closing.
    if (on_cuda()) barrier.wait();
    EXPECT_EQ(difference(one, rank, first.dispatch(one.input(rank))), "");
  });
}

TEST(Resources, buffers_of_one_process_work_on_threads_of_their_own) {
  Shape s;
  s.ranks = 2;
  const World world(s);
  constexpr int kPairs = 3;
  Barrier all_done(kPairs * s.ranks);
  std::vector<std::thread> pairs;
  for (int i = 0; i < kPairs; ++i) {
    pairs.emplace_back([&] {
      run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
        for (int j = 0; j < 10; ++j)
          EXPECT_EQ(difference(world, buffer.rank(), buffer.dispatch(world.input(buffer.rank()))), "");
        if (on_cuda()) all_done.wait();  // as above
      });
    });
  }
  for (std::thread& pair : pairs) pair.join();
}

// 40 rows of 8 KiB from each of two ranks.
Shape heavy() {
  Shape s;
  s.ranks = 2;
  s.hidden = 4096;
  s.tokens = 40;
  s.experts = 2;
  s.topk = 2;
  s.percent_missing = 0;
  s.uneven_tokens = false;
  return s;
}

TEST(Arena, at_its_budget_results_are_copied_out_and_counted) {
  const World world(heavy());
  Config config = world.config();
  config.arena_bytes = std::size_t{4} << 20;
  run_ranks(2, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    std::vector<DispatchOutput> kept;
    for (int i = 0; i < 12; ++i) kept.push_back(buffer.dispatch(world.input(rank)));
    for (const DispatchOutput& output : kept) EXPECT_EQ(difference(world, rank, output), "");
    const Statistics statistics = buffer.statistics();
    EXPECT_GE(statistics.copied_out_bytes, 6u * 80 * 8192);
    EXPECT_LE(statistics.arena_bytes_high_water, config.arena_bytes);
    kept.clear();
    EXPECT_LT(buffer.statistics().arena_bytes_in_use, config.arena_bytes / 4);
    buffer.reset_statistics();
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
    EXPECT_EQ(buffer.statistics().copied_out_bytes, 0u);
  });
}

TEST(Arena, too_small_for_an_exchange_names_the_rank_and_both_sizes_on_every_rank) {
  World big(heavy());
  for (auto& rank : big.ranks) {
    for (std::int64_t i = 0; i < rank.x.rows() * 2; ++i)
      rank.topk_idx.set<std::int64_t>(i, i % 2 == 0 ? 1 : -1);  // all to rank 1
  }
  big.expect_again();
  Shape s = heavy();
  s.tokens = 4;
  const World small(s);
  Config config = big.config();
  config.arena_bytes = std::size_t{256} << 10;  // 80 rows of 8 KiB do not fit
  run_ranks(2, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int i = 0; i < 3; ++i) {
      const Outcome outcome = outcome_of([&] { buffer.dispatch(big.input(rank)); });
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
      EXPECT_TRUE(contains(outcome.message, "rank 1")) << outcome.message;
      EXPECT_TRUE(contains(outcome.message, "arena")) << outcome.message;
      EXPECT_TRUE(std::count_if(outcome.message.begin(), outcome.message.end(),
                                [](char c) { return c >= '0' && c <= '9'; }) >= 10)
          << "bytes needed and bytes there: " << outcome.message;
      EXPECT_EQ(difference(small, rank, buffer.dispatch(small.input(rank))), "");
    }
  });
}

TEST(Arena, allocate_says_what_is_needed_and_what_is_there) {
  Config config = small_config();
  config.arena_bytes = std::size_t{1} << 20;
  run_ranks(2, config, [&](AnyBuffer& buffer) {
    Tensor fits = buffer.allocate(DType::kFp32, {1000, 16});
    EXPECT_TRUE(fits.contiguous());
    EXPECT_EQ(fits.bytes(), 64000u);
    const std::vector<float> ones(16000, 1.0f);
    overwrite(fits, ones.data());
    EXPECT_GE(buffer.statistics().arena_bytes_in_use, 64000u);
    const Outcome outcome = outcome_of([&] { buffer.allocate(DType::kU8, {std::int64_t{8} << 20}); });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument);
    EXPECT_TRUE(contains(outcome.message, "8388608")) << outcome.message;
    buffer.close();
    EXPECT_EQ(std::memcmp(to_host(fits).data, ones.data(), fits.bytes()), 0);  // stays valid
  });
}

TEST(Statistics, count_bytes_rows_and_operations) {
  Shape s;
  s.weights = false;
  s.percent_missing = 0;
  const World world(s);
  const Homeward home = homeward(world, {});
  run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const oracle::Dispatched& e = world.expected[rank];
    const auto sent = buffer.dispatch(world.input(rank));
    Statistics after = buffer.statistics();
    EXPECT_EQ(after.operations, 1u);
    EXPECT_EQ(after.timeouts + after.refused + after.copied_out_bytes + after.staged_bytes, 0u);
    ASSERT_EQ(after.peers.size(), static_cast<std::size_t>(s.ranks));
    for (int peer = 0; peer < s.ranks; ++peer) {
      const std::uint64_t rows = static_cast<std::uint64_t>(e.tokens_between[rank * s.ranks + peer]);
      EXPECT_GE(after.peers[peer].bytes_sent, rows * 128) << "rows alone, to rank " << peer;
      EXPECT_LE(after.peers[peer].bytes_sent, rows * (128 + 4 * 8 + 16))
          << "rows, ids and their places, to rank " << peer;
    }
    ASSERT_GE(after.rows_per_slot.size(), e.slot_rows.size());
    for (std::size_t slot = 0; slot < e.slot_rows.size(); ++slot) {
      EXPECT_EQ(after.rows_per_slot[slot], static_cast<std::uint64_t>(e.slot_rows[slot]));
    }
    buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank()));
    after = buffer.statistics();
    EXPECT_EQ(after.operations, 2u);
    EXPECT_EQ(after.staged_bytes, home.ranks[rank].x.bytes.size());
    buffer.reset_statistics();
    after = buffer.statistics();
    EXPECT_EQ(after.operations + after.staged_bytes, 0u);
    EXPECT_EQ(std::accumulate(after.rows_per_slot.begin(), after.rows_per_slot.end(), std::uint64_t{0}), 0u);
  });
}

TEST(Close, may_be_called_twice_and_before_the_others_are_ready) {
  Shape s;
  s.ranks = 3;
  const World world(s);
  run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
    const auto kept = buffer.dispatch(world.input(buffer.rank()));
    if (buffer.rank() == 1) std::this_thread::sleep_for(50ms);
    buffer.close();
    buffer.close();
    EXPECT_EQ(difference(world, buffer.rank(), kept), "");
    EXPECT_EQ(outcome_of([&] { buffer.dispatch(world.input(buffer.rank())); }).code, ErrorCode::kInvalidArgument);
  });
}

}  // namespace
}  // namespace deep_ep::test
