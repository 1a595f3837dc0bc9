// SPDX-License-Identifier: MIT
// The proxy thread over the in-memory network: workers hand over puts, receivers count them.
#include "net/proxy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "deep_ep/error.h"
#include "net/loopback.h"
#include "net/proxy_ranks.h"

namespace deep_ep::net {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;
using Clock = Proxy::Clock;

/// Ranks with proxies on an in-memory network.
struct Cluster {
  explicit Cluster(int num_ranks, const LoopbackFaults& faults = {}, const ProxyOptions& options = {})
      : network(LoopbackNetwork::create(num_ranks, faults)), ranks(num_ranks) {
    std::vector<std::unique_ptr<Fabric>> fabrics;
    for (int rank = 0; rank < num_ranks; ++rank) fabrics.push_back(network->open(rank));
    start_proxies(ranks, std::move(fabrics), options);
  }

  std::shared_ptr<LoopbackNetwork> network;
  std::vector<ProxyRank> ranks;
};

TEST(proxy, puts_of_several_workers_arrive_counted_under_every_fault_that_loses_nothing) {
  LoopbackFaults faults;
  faults.max_delay = 6;
  faults.tear = true;
  faults.duplicate = 0.2;
  faults.immediate_bytes = 4;
  constexpr int kRanks = 3, kWorkers = 3, kPuts = 20;
  constexpr std::size_t kBytes = 64;
  Cluster cluster(kRanks, faults);
  for (std::uint32_t epoch = 1; epoch <= 10; ++epoch) {
    std::vector<std::thread> workers;
    for (int rank = 0; rank < kRanks; ++rank) {
      cluster.ranks[rank].proxy->set_epoch(epoch);
      for (int worker = 0; worker < kWorkers; ++worker) {
        workers.emplace_back([&, rank, worker] {
          ProxyRank& self = cluster.ranks[rank];
          for (int i = 0; i < kPuts; ++i) {
            // Everybody owns a piece of everybody's memory; the bytes say who wrote them, and when.
            const std::size_t at = ((rank * kWorkers + worker) * kPuts + i) * kBytes;
            std::memset(self.memory.data() + at, static_cast<int>(epoch * 16 + rank), kBytes);
            for (int peer = 0; peer < kRanks; ++peer) {
              if (peer == rank) continue;
              EXPECT_TRUE(self.proxy->put(put_to(peer, 2, epoch, at, kBytes), soon()));
            }
          }
        });
      }
    }
    for (auto& worker : workers) worker.join();
    for (int rank = 0; rank < kRanks; ++rank) {
      ProxyRank& self = cluster.ranks[rank];
      for (int peer = 0; peer < kRanks; ++peer) {
        if (peer == rank) continue;
        ASSERT_TRUE(wait_for([&] { return self.notices(peer, 2, epoch) == kWorkers * kPuts; }));
        const std::byte* from = self.memory.data() + peer * kWorkers * kPuts * kBytes;
        const std::byte expected{static_cast<unsigned char>(epoch * 16 + peer)};
        EXPECT_TRUE(std::all_of(from, from + kWorkers * kPuts * kBytes, [&](std::byte b) { return b == expected; }));
      }
      // The source may be written again, which the next epoch does.
      ASSERT_TRUE(wait_for([&] { return self.proxy->completed(2, epoch) == kWorkers * kPuts * (kRanks - 1); }));
    }
  }
  for (ProxyRank& rank : cluster.ranks) {
    EXPECT_TRUE(rank.proxy->flush(soon()));
    EXPECT_EQ(rank.proxy->bytes_in_flight(), 0u);
    EXPECT_EQ(rank.proxy->counters().refused, 0u);
    EXPECT_EQ(rank.proxy->completed(2, 10 - 16), 0u);
    EXPECT_GT(rank.completions_, 0);
  }
}

TEST(proxy, messages_come_whole_and_flush_waits_for_their_delivery) {
  LoopbackFaults faults;
  faults.max_delay = 50;
  Cluster cluster(2, faults);
  const std::string text(kMaxMessageBytes, 'x');
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  for (int i = 0; i < 20; ++i) cluster.ranks[0].proxy->message({1, 3, {first, text.size()}});
  EXPECT_TRUE(cluster.ranks[0].proxy->flush(soon()));
  cluster.ranks[0].proxy->close();  // right away: nothing may be lost
  ASSERT_TRUE(wait_for([&] { return cluster.ranks[1].copy(&ProxyRank::messages_).size() == 20; }));
  for (const auto& [source, epoch, got] : cluster.ranks[1].copy(&ProxyRank::messages_)) {
    EXPECT_EQ(source, 0);
    EXPECT_EQ(epoch, 3u);
    EXPECT_EQ(got, text);
  }
  EXPECT_THROW(cluster.ranks[1].proxy->message({0, 0, {first, kMaxMessageBytes + 1}}), Error);
  EXPECT_THROW(cluster.ranks[1].proxy->message({2, 0, {}}), Error);
}

TEST(proxy, a_peer_that_was_seen_off_gets_what_was_said_before_and_nothing_more) {
  LoopbackFaults faults;
  faults.max_delay = 50;
  Cluster cluster(3, faults);
  Proxy& proxy = *cluster.ranks[0].proxy;
  for (std::uint32_t epoch = 1; epoch <= 5; ++epoch) proxy.message({1, epoch, {}});
  proxy.see_off(1);
  for (std::uint32_t epoch = 6; epoch <= 9; ++epoch)
    for (int peer : {1, 2}) proxy.message({peer, epoch, {}});
  EXPECT_TRUE(proxy.flush(soon()));
  ASSERT_TRUE(wait_for([&] { return cluster.ranks[2].copy(&ProxyRank::messages_).size() == 4; }));
  const auto got = cluster.ranks[1].copy(&ProxyRank::messages_);
  EXPECT_EQ(got.size(), 5u);
  for (const auto& [source, epoch, text] : got) EXPECT_LE(epoch, 5u);
}

TEST(proxy, a_peer_that_takes_nothing_does_not_hold_up_the_others) {
  ProxyOptions options;
  options.bytes_in_flight = 4096;
  Cluster cluster(3, {}, options);
  Proxy& proxy = *cluster.ranks[0].proxy;
  cluster.network->cut(0, 1);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(proxy.put(put_to(1, 0, 1, 0, 1024), soon()));
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(proxy.put(put_to(2, 0, 1, 0, 1024), soon()));
  EXPECT_TRUE(wait_for([&] { return cluster.ranks[2].notices(0, 0, 1) == 100; }));
  EXPECT_EQ(cluster.ranks[1].notices(0, 0, 1), 0);
  EXPECT_LE(proxy.bytes_in_flight(), options.bytes_in_flight);
  EXPECT_GT(proxy.bytes_in_flight(), 0u);
  EXPECT_FALSE(proxy.flush(Clock::now() + 20ms));  // the deadline ends it
  cluster.network->mend(0, 1);
  EXPECT_TRUE(proxy.flush(soon()));
  EXPECT_TRUE(wait_for([&] { return cluster.ranks[1].notices(0, 0, 1) == 100; }));
}

TEST(proxy, a_killed_peer_and_one_given_up_end_what_waits_for_them) {
  Cluster cluster(3);
  Proxy& proxy = *cluster.ranks[0].proxy;
  cluster.network->cut(0, 1);
  cluster.network->cut(0, 2);
  for (int peer : {1, 2})
    for (int i = 0; i < 5; ++i) ASSERT_TRUE(proxy.put(put_to(peer, 1, 1, 0, 64), soon()));
  cluster.network->kill(1);
  EXPECT_TRUE(wait_for([&] { return cluster.ranks[0].copy(&ProxyRank::failures_).size() == 1; }));
  EXPECT_EQ(cluster.ranks[0].copy(&ProxyRank::failures_)[0].first, 1);
  proxy.give_up(2, "rank 1 said so");
  EXPECT_TRUE(proxy.flush(soon()));
  EXPECT_EQ(proxy.completed(1, 1), 10u);
  EXPECT_EQ(cluster.ranks[0].copy(&ProxyRank::failures_).size(), 1u);  // what we said ourselves is no news
  EXPECT_TRUE(proxy.put(put_to(2, 1, 1, 0, 64), soon()));
  EXPECT_TRUE(wait_for([&] { return proxy.completed(1, 1) == 11; }));
}

TEST(proxy, a_network_that_breaks_down_is_the_loss_of_every_peer) {
  Cluster cluster(3);
  ProxyRank& self = cluster.ranks[0];
  self.throws_at_message = true;
  const std::byte one{1};
  cluster.ranks[1].proxy->message({0, 0, {&one, 1}});
  ASSERT_TRUE(wait_for([&] { return self.copy(&ProxyRank::failures_).size() == 3; }));
  EXPECT_EQ(self.copy(&ProxyRank::failures_)[2], (std::pair<int, std::string>{2, "thrown by a test"}));
  // It goes on for those who wait: everything towards a lost peer has ended.
  EXPECT_TRUE(self.proxy->put(put_to(2, 1, 1, 0, 64), soon()));
  EXPECT_TRUE(wait_for([&] { return self.proxy->completed(1, 1) == 1; }));
  EXPECT_TRUE(self.proxy->flush(soon()));
}

TEST(proxy, what_can_never_succeed_is_refused_or_reported) {
  Cluster cluster(2);
  ProxyRank& self = cluster.ranks[0];
  EXPECT_THROW(self.proxy->put(put_to(2, 0, 0, 0, 64), soon()), Error);
  EXPECT_THROW(self.proxy->put(put_to(1, 16, 0, 0, 64), soon()), Error);
  EXPECT_THROW(self.proxy->put(put_to(1, 0, 0, 8, 64), soon()), Error);
  EXPECT_THROW(self.proxy->put(put_to(1, 0, 0, 0, 0), soon()), Error);
  // Only the proxy knows how long regions are.
  ASSERT_TRUE(self.proxy->put(put_to(1, 0, 1, kRegionBytes, 64), soon()));
  EXPECT_TRUE(wait_for([&] { return self.copy(&ProxyRank::bad_commands_).size() == 1; }));
  EXPECT_THAT(self.copy(&ProxyRank::bad_commands_)[0], HasSubstr("64 bytes at 65536 of a region of 65536"));
  EXPECT_TRUE(wait_for([&] { return self.proxy->completed(0, 1) == 1; }));
}

TEST(proxy, has_a_core_from_the_last_one_down_where_each_worker_and_each_proxy_has_one) {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  EXPECT_EQ(proxy_core(0, 1, cores), -1);  // all are the workers'
  EXPECT_EQ(proxy_core(0, cores, 1), -1);
  EXPECT_EQ(proxy_core(0, 1, cores - 1), cores - 1);
  if (cores >= 4) {
    EXPECT_EQ(proxy_core(1, 2, 1), cores - 2);
  }
}

TEST(proxy, a_queue_that_nobody_rings_for_is_polled) {
  Cluster cluster(2);
  const auto memory = std::make_unique<FifoMemory>();
  cluster.ranks[0].proxy->add_device_fifo(*memory);
  FifoWriter writer(*memory);  // as a kernel: it cannot ring
  for (std::uint32_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(writer.push(put_to(1, 3, 1, 0, 64)));
    ASSERT_TRUE(wait_for([&] { return cluster.ranks[1].notices(0, 3, 1) == static_cast<int>(i) + 1; }));
  }
  cluster.ranks[0].proxy->close();
}

}  // namespace
}  // namespace deep_ep::net
