// SPDX-License-Identifier: MIT
// The in-memory network under every fault that it can have.
#include "net/loopback.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <thread>

#include "deep_ep/error.h"
#include "net/arrivals.h"
#include "net/fabric_ends.h"
#include "net/wire.h"

namespace deep_ep::net {
namespace {

using ::testing::HasSubstr;

constexpr int kPuts = 300;
constexpr std::size_t kBytes = 96;

std::vector<End> ends_of(LoopbackNetwork& network, int num_ranks, std::size_t bytes = kPuts * kBytes) {
  std::vector<End> ends;
  for (int rank = 0; rank < num_ranks; ++rank) ends.emplace_back(network.open(rank), bytes);
  connect_all(ends);
  return ends;
}

LoopbackFaults faults(int max_delay, bool tear, double duplicate, double drop, std::size_t immediate_bytes) {
  LoopbackFaults all;
  all.seed = 7;
  all.max_delay = max_delay;
  all.tear = tear;
  all.duplicate = duplicate;
  all.drop = drop;
  all.immediate_bytes = immediate_bytes;
  return all;
}

class LoopbackFaultsTest : public ::testing::TestWithParam<LoopbackFaults> {};

TEST_P(LoopbackFaultsTest, every_notice_comes_once_and_after_the_bytes_of_its_put) {
  const auto network = LoopbackNetwork::create(2, GetParam());
  auto ends = ends_of(*network, 2);
  Completions completions;
  std::iota(reinterpret_cast<std::uint8_t*>(ends[0].memory.data()),
            reinterpret_cast<std::uint8_t*>(ends[0].memory.data()) + kPuts * kBytes, std::uint8_t{1});
  int checked = 0;
  // One channel and epoch per put, so that a notice says which bytes must be there.
  ends[1].when_notice = [&](int source, const Notice& notice) {
    EXPECT_EQ(source, 0);
    const std::size_t at = (notice.epoch * kNumChannels + notice.channel) * kBytes;
    EXPECT_EQ(std::memcmp(ends[1].memory.data() + at, ends[0].memory.data() + at, kBytes), 0);
    ++checked;
  };
  for (std::uint32_t i = 0; i < kPuts; ++i) {
    const Notice notice{static_cast<std::uint8_t>(i % kNumChannels), i / kNumChannels};
    ASSERT_TRUE(ends[0].put(1, i * kBytes, i * kBytes, kBytes, notice, &completions));
  }
  ASSERT_TRUE(turn_until(ends, [&] { return completions.done == kPuts && checked == kPuts; }));
  turn(ends, 100);  // time for what comes twice
  EXPECT_EQ(checked, kPuts);
  EXPECT_EQ(ends[0].fabric->bytes_in_flight(), 0u);
  EXPECT_EQ(ends[1].fabric->counters().duplicates > 0, GetParam().duplicate > 0);
  EXPECT_EQ(ends[1].fabric->counters().refused, 0u);
}

INSTANTIATE_TEST_SUITE_P(Faults, LoopbackFaultsTest,
                         ::testing::Values(faults(0, false, 0, 0, 8), faults(20, false, 0, 0, 8),
                                           faults(20, true, 0, 0, 4), faults(20, true, 0.3, 0, 8),
                                           faults(5, true, 1, 0, 4), faults(5, false, 0.5, 0, 8)));

TEST(loopback, delay_makes_packets_overtake_each_other_in_the_same_way_for_the_same_seed) {
  const auto order_of = [](std::uint64_t seed) {
    LoopbackFaults delays = faults(30, false, 0, 0, 8);
    delays.seed = seed;
    const auto network = LoopbackNetwork::create(2, delays);
    auto ends = ends_of(*network, 2);
    std::vector<int> order;
    ends[1].when_message = [&](int, std::uint32_t, std::span<const std::byte> payload) {
      order.push_back(static_cast<int>(payload[0]));
    };
    for (int i = 0; i < 50; ++i) {
      const std::byte payload{static_cast<unsigned char>(i)};
      EXPECT_TRUE(ends[0].fabric->message({1, 0, {&payload, 1}}));
    }
    EXPECT_TRUE(turn_until(ends, [&] { return order.size() == 50; }));
    return order;
  };
  const std::vector<int> first = order_of(3);
  EXPECT_FALSE(std::is_sorted(first.begin(), first.end()));
  EXPECT_EQ(order_of(3), first);
  EXPECT_NE(order_of(4), first);
}

TEST(loopback, a_dropped_packet_never_comes_and_its_sender_does_not_know) {
  const auto network = LoopbackNetwork::create(2, faults(3, false, 0, 0.25, 8));
  auto ends = ends_of(*network, 2);
  Completions completions;
  for (std::size_t i = 0; i < kPuts; ++i)
    ASSERT_TRUE(ends[0].put(1, i * kBytes, i * kBytes, kBytes, Notice{1, 5}, &completions));
  turn(ends, 100);
  EXPECT_EQ(completions.done, static_cast<std::uint64_t>(kPuts));
  EXPECT_GT(ends[1].arrivals.count(0, {1, 5}), kPuts / 2u);
  EXPECT_LT(ends[1].arrivals.count(0, {1, 5}), kPuts * 9u / 10);
}

TEST(loopback, a_killed_rank_is_reported_once_to_each_survivor_and_its_puts_end) {
  const auto network = LoopbackNetwork::create(3, faults(5, false, 0, 0, 8));
  auto ends = ends_of(*network, 3);
  Completions completions;
  for (std::size_t i = 0; i < 10; ++i) ASSERT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{}, &completions));
  network->kill(1);
  turn(ends, 20);
  for (int survivor : {0, 2}) {
    EXPECT_EQ(ends[survivor].failed, std::vector<int>{1});
    ASSERT_TRUE(ends[survivor].fabric->peer_failure(1));
    EXPECT_EQ(*ends[survivor].fabric->peer_failure(1), "its process has ended");
    EXPECT_FALSE(ends[survivor].fabric->peer_failure(survivor == 0 ? 2 : 0));
  }
  EXPECT_EQ(completions.failed, 10u);
  EXPECT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{}, &completions));  // taken, and lost
  EXPECT_TRUE(ends[0].fabric->message({1, 0, {}}));
  EXPECT_EQ(completions.failed, 11u);
  ASSERT_TRUE(ends[0].put(2, 0, 0, kBytes, Notice{2, 1}, nullptr));  // the others go on
  EXPECT_TRUE(turn_until(ends, [&] { return ends[2].arrivals.count(0, {2, 1}) == 1; }));
}

TEST(loopback, a_cut_link_is_silent_and_carries_on_when_it_is_mended) {
  const auto network = LoopbackNetwork::create(2);
  auto ends = ends_of(*network, 2);
  network->cut(0, 1);
  Completions completions;
  ASSERT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{0, 1}, &completions));
  turn(ends, 50);
  EXPECT_EQ(completions.done + completions.failed, 0u);
  EXPECT_EQ(ends[1].arrivals.count(0, {0, 1}), 0u);
  EXPECT_TRUE(ends[0].failed.empty());
  network->mend(0, 1);
  EXPECT_TRUE(turn_until(ends, [&] { return completions.done == 1 && ends[1].arrivals.count(0, {0, 1}) == 1; }));
}

TEST(loopback, a_peer_that_is_given_up_frees_what_waits_for_it) {
  const auto network = LoopbackNetwork::create(2);
  auto ends = ends_of(*network, 2);
  network->cut(0, 1);
  Completions completions;
  ASSERT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{0, 1}, &completions));
  ends[0].fabric->give_up(1, "rank 2 says so");
  turn(ends, 3);
  EXPECT_EQ(completions.failed, 1u);
  EXPECT_EQ(ends[0].fabric->bytes_in_flight(), 0u);
  EXPECT_EQ(*ends[0].fabric->peer_failure(1), "rank 2 says so");
}

TEST(loopback, memory_is_refused_before_admission_and_beyond_its_end) {
  const auto network = LoopbackNetwork::create(1);
  const auto fabric = network->open(0);
  std::byte memory[64];
  EXPECT_THROW(fabric->register_memory({memory, sizeof memory}), Error);
  fabric->connect(std::vector<Blob>(1));
  const int region = fabric->register_memory({memory, sizeof memory});
  const int remote = fabric->import_region(0, fabric->region_key(region));
  const auto put = [&](std::uint64_t at, std::uint64_t remote_at, std::size_t bytes) {
    return fabric->put({0, region, at, remote, remote_at, bytes, std::nullopt, nullptr});
  };
  EXPECT_TRUE(put(0, 0, 64));
  EXPECT_THROW(put(1, 0, 64), Error);
  EXPECT_THROW(put(0, 1, 64), Error);
  EXPECT_THROW(put(0, ~0ull, 2), Error);
  EXPECT_THROW(put(0, 0, 0), Error);
  EXPECT_THROW(fabric->import_region(0, {}), Error);
  EXPECT_THROW(fabric->import_region(1, fabric->region_key(region)), Error);
}

TEST(loopback, a_put_into_memory_that_was_taken_back_fails_at_its_source_only) {
  const auto network = LoopbackNetwork::create(2);
  auto ends = ends_of(*network, 2);
  Completions completions;
  ASSERT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{0, 1}, &completions));
  ends[1].fabric->unregister_memory(ends[1].region);
  turn(ends, 5);
  EXPECT_EQ(completions.failed, 1u);
  EXPECT_EQ(ends[1].arrivals.count(0, {0, 1}), 0u);
}

TEST(loopback, a_full_queue_says_so_and_takes_more_later) {
  LoopbackFaults shallow;
  shallow.queue_depth = 4;
  const auto network = LoopbackNetwork::create(2, shallow);
  auto ends = ends_of(*network, 2);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{}, nullptr));
  EXPECT_FALSE(ends[0].put(1, 0, 0, kBytes, Notice{}, nullptr));
  EXPECT_FALSE(ends[0].fabric->message({1, 0, {}}));
  turn(ends, 2);
  EXPECT_TRUE(ends[0].put(1, 0, 0, kBytes, Notice{}, nullptr));
}

TEST(loopback, ranks_on_threads_exchange_under_every_fault_that_loses_nothing) {
  constexpr int kRanks = 4;
  const auto network = LoopbackNetwork::create(kRanks, faults(8, true, 0.2, 0, 4));
  auto ends = ends_of(*network, kRanks);
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      End& end = ends[rank];
      Completions completions;
      for (std::uint32_t epoch = 1; epoch <= 20; ++epoch) {
        end.fabric->set_epoch(epoch);
        for (int peer = 0; peer < kRanks; ++peer) {
          const std::size_t at = static_cast<std::size_t>(rank) * kBytes;
          // Into the second half of the memory: a source is nobody's target.
          EXPECT_TRUE(end.put(peer, at, at + kRanks * kBytes, kBytes, Notice{3, epoch}, &completions));
        }
        const auto all_here = [&] {
          for (int peer = 0; peer < kRanks; ++peer)
            if (end.arrivals.count(peer, {3, epoch}) == 0) return false;
          return completions.done == epoch * kRanks;
        };
        EXPECT_TRUE(end.turn_until(all_here));
      }
      ++ready;
      end.turn_until([&] { return ready == kRanks; });
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace
}  // namespace deep_ep::net
