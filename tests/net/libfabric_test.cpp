// SPDX-License-Identifier: MIT
// The libfabric engine over providers that every machine has. Both ends in one thread, and ranks as processes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>

#include "deep_ep/error.h"
#include "net/engines.h"
#include "net/fabric_ends.h"
#include "net/proxy_ranks.h"
#include "ranks.h"

namespace deep_ep::net {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr std::size_t kBytes = 20000;
constexpr int kPuts = 64;

// Why this machine cannot run a test of the provider; empty where it can. A skip is said aloud, never counted as
// passed.
std::string missing(const std::string& name) {
  NetworkConfig settings;
  settings.provider = name;
  try {
    (void)available_providers(settings);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

struct Way {
  std::string provider;
  std::size_t immediate_bytes;  // 0: a message after each delivered put
};

std::string name_of(const ::testing::TestParamInfo<Way>& info) {
  std::string name = info.param.provider + "_" + std::to_string(info.param.immediate_bytes);
  std::replace_if(
      name.begin(), name.end(), [](char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

std::unique_ptr<Fabric> open(const Way& way, int rank, int num_ranks, std::uint64_t job) {
  EngineInput input{.rank = rank, .num_ranks = num_ranks, .job = job, .settings = {}};
  input.settings.provider = way.provider;
  input.settings = input.settings.with_environment();
  input.most_immediate_bytes = way.immediate_bytes;
  return open_engine(input);
}

std::vector<End> ends_of(const Way& way, int num_ranks, std::size_t bytes = kPuts * kBytes) {
  std::vector<End> ends;
  for (int rank = 0; rank < num_ranks; ++rank) ends.emplace_back(open(way, rank, num_ranks, 77), bytes);
  connect_all(ends);
  return ends;
}

class LibfabricTest : public ::testing::TestWithParam<Way> {};

TEST_P(LibfabricTest, every_notice_comes_once_and_after_the_bytes_of_its_put) {
  if (const std::string why = missing(GetParam().provider); !why.empty()) GTEST_SKIP() << why;
  auto ends = ends_of(GetParam(), 2);
  EXPECT_EQ(ends[0].fabric->report().capabilities.immediate_bytes, GetParam().immediate_bytes);
  Completions completions;
  for (std::size_t i = 0; i < ends[0].memory.size(); ++i) ends[0].memory[i] = static_cast<std::byte>(i * 7 + i / 251);
  int checked = 0;
  ends[1].when_notice = [&](int source, const Notice& notice) {
    EXPECT_EQ(source, 0);
    const std::size_t at = (notice.epoch * kNumChannels + notice.channel) * kBytes;
    EXPECT_EQ(std::memcmp(ends[1].memory.data() + at, ends[0].memory.data() + at, kBytes), 0);
    ++checked;
  };
  for (std::uint32_t i = 0; i < kPuts; ++i) {
    const Notice notice{static_cast<std::uint8_t>(i % kNumChannels), i / kNumChannels};
    ASSERT_TRUE(turn_until(ends, [&] { return ends[0].put(1, i * kBytes, i * kBytes, kBytes, notice, &completions); }));
  }
  ASSERT_TRUE(turn_until(ends, [&] { return completions.done == kPuts && checked == kPuts; }));
  turn(ends, 20);
  EXPECT_EQ(checked, kPuts);
  EXPECT_TRUE(ends[0].fabric->is_idle());
  EXPECT_EQ(ends[0].fabric->bytes_in_flight(), 0u);
  EXPECT_EQ(ends[1].fabric->counters().refused, 0u) << ends[1].fabric->counters().last_refusal;
}

TEST_P(LibfabricTest, messages_of_any_length_come_whole_from_all_to_all) {
  if (const std::string why = missing(GetParam().provider); !why.empty()) GTEST_SKIP() << why;
  constexpr int kRanks = 3, kMessages = 100;
  auto ends = ends_of(GetParam(), kRanks, 64);
  std::vector<std::byte> text(kMaxMessageBytes);
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<std::byte>(i % 249);
  for (End& end : ends) {
    end.when_message = [&](int, std::uint32_t epoch, std::span<const std::byte> payload) {
      EXPECT_EQ(payload.size(), epoch == 99 ? kMaxMessageBytes : epoch * 13);
      EXPECT_TRUE(std::equal(payload.begin(), payload.end(), text.begin()));
    };
  }
  for (std::uint32_t i = 0; i < kMessages; ++i) {
    const std::span payload(text.data(), i == 99 ? kMaxMessageBytes : i * 13);
    for (End& end : ends)
      for (int peer = 0; peer < kRanks; ++peer)
        ASSERT_TRUE(turn_until(ends, [&] { return end.fabric->message({peer, i, payload}); }));
  }
  const auto all_here = [](const End& end) { return end.messages == kRanks * kMessages && end.fabric->is_idle(); };
  EXPECT_TRUE(turn_until(ends, [&] { return std::all_of(ends.begin(), ends.end(), all_here); }));
}

TEST_P(LibfabricTest, memory_is_refused_before_admission_and_beyond_its_end) {
  if (const std::string why = missing(GetParam().provider); !why.empty()) GTEST_SKIP() << why;
  const auto fabric = open(GetParam(), 0, 1, 5);
  std::byte memory[64];
  EXPECT_THROW(fabric->register_memory({memory, sizeof memory}), Error);
  fabric->connect(std::vector<Blob>{fabric->address()});
  const int region = fabric->register_memory({memory, sizeof memory});
  const int again = fabric->register_memory({memory, sizeof memory});
  EXPECT_NE(fabric->region_key(region), fabric->region_key(again)) << "keys are random";
  const int remote = fabric->import_region(0, fabric->region_key(region));
  EXPECT_THROW(fabric->put({0, region, 1, remote, 0, 64, std::nullopt, nullptr}), Error);
  EXPECT_THROW(fabric->put({0, region, 0, remote, 1, 64, std::nullopt, nullptr}), Error);
  EXPECT_THROW(fabric->put({1, region, 0, remote, 0, 64, std::nullopt, nullptr}), Error);
}

TEST_P(LibfabricTest, closing_with_work_under_way_ends_it) {
  if (const std::string why = missing(GetParam().provider); !why.empty()) GTEST_SKIP() << why;
  auto ends = ends_of(GetParam(), 2);
  Completions completions;
  int started = 0;
  for (int i = 0; i < 8; ++i) started += ends[0].put(1, 0, 0, kBytes, Notice{0, 0}, &completions) ? 1 : 0;
  ends[0].fabric->close();
  EXPECT_EQ(completions.done + completions.failed, static_cast<std::uint64_t>(started));
}

// Not over shm: of endpoints in one process, one that closes takes memory away that its neighbours' threads still read
// (libfabric 1.17). Between processes, for which shm is made, each has a mapping of its own.
class LibfabricThreadsTest : public LibfabricTest {};

TEST_P(LibfabricThreadsTest, proxies_exchange_puts_and_messages_and_close_after_a_flush) {
  if (const std::string why = missing(GetParam().provider); !why.empty()) GTEST_SKIP() << why;
  constexpr int kRanks = 3, kRounds = 20;
  constexpr std::size_t kPiece = 4096;
  std::vector<std::unique_ptr<Fabric>> fabrics;
  for (int rank = 0; rank < kRanks; ++rank) fabrics.push_back(open(GetParam(), rank, kRanks, 91));
  std::vector<ProxyRank> ranks(kRanks);
  start_proxies(ranks, std::move(fabrics));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      ProxyRank& self = ranks[rank];
      for (std::uint32_t epoch = 1; epoch <= kRounds; ++epoch) {
        self.proxy->set_epoch(epoch);
        std::memset(self.memory.data() + rank * kPiece, static_cast<int>(epoch * 8 + rank), kPiece);
        const auto byte = static_cast<std::byte>(epoch);
        for (int peer = 0; peer < kRanks; ++peer) {
          if (peer == rank) continue;
          EXPECT_TRUE(self.proxy->put(put_to(peer, 1, epoch, rank * kPiece, kPiece), soon()));
          self.proxy->message({peer, epoch, {&byte, 1}});
        }
        for (int peer = 0; peer < kRanks; ++peer) {
          if (peer == rank) continue;
          EXPECT_TRUE(wait_for([&] { return self.notices(peer, 1, epoch) == 1; }));
          const auto* here = reinterpret_cast<const std::uint8_t*>(self.memory.data()) + peer * kPiece;
          EXPECT_EQ(std::count(here, here + kPiece, static_cast<std::uint8_t>(epoch * 8 + peer)),
                    static_cast<std::ptrdiff_t>(kPiece));
        }
        // Nobody writes again before all have looked: messages of the next round say so.
        EXPECT_TRUE(wait_for([&] { return self.proxy->completed(1, epoch) == kRanks - 1; }));
        for (int peer = 0; peer < kRanks; ++peer)
          if (peer != rank) self.proxy->message({peer, epoch, {}});
        EXPECT_TRUE(wait_for([&] { return self.copy(&ProxyRank::messages_).size() >= 2u * epoch * (kRanks - 1); }));
      }
      EXPECT_TRUE(self.proxy->flush(soon()));
      self.proxy->close();
      EXPECT_EQ(self.proxy->counters().refused, 0u) << self.proxy->counters().last_refusal;
    });
  }
  for (auto& thread : threads) thread.join();
}

INSTANTIATE_TEST_SUITE_P(Ways, LibfabricThreadsTest,
                         ::testing::Values(Way{"tcp;ofi_rxm", 8}, Way{"tcp;ofi_rxm", 4}, Way{"tcp;ofi_rxm", 0}),
                         name_of);

INSTANTIATE_TEST_SUITE_P(Ways, LibfabricTest,
                         ::testing::Values(Way{"tcp;ofi_rxm", 8}, Way{"tcp;ofi_rxm", 4}, Way{"tcp;ofi_rxm", 0},
                                           Way{"shm", 8}, Way{"shm", 0}),
                         name_of);

TEST(libfabric, settings_that_a_provider_does_not_apply_are_said_so) {
  if (const std::string why = missing("tcp"); !why.empty()) GTEST_SKIP() << why;
  NetworkConfig settings;
  settings.provider = "tcp;ofi_rxm";
  settings.service_level = 3;
  settings.traffic_class = 104;
  settings.adaptive_routing = 1;
  const auto fabric = open_engine({.rank = 0, .num_ranks = 1, .job = 1, .settings = settings.with_environment()});
  const FabricReport& report = fabric->report();
  ASSERT_EQ(report.knobs.size(), 4u);
  for (int i = 0; i < 3; ++i) EXPECT_THAT(report.knobs[i].state, StartsWith("not applied: tcp;ofi_rxm")) << i;
  EXPECT_EQ(report.knobs[3].state, "applied");
  EXPECT_THAT(report.to_string(), HasSubstr("service_level = 3: not applied: tcp;ofi_rxm"));
  EXPECT_THAT(report.to_string(), HasSubstr("network.interface = "));
}

TEST(libfabric, an_unknown_provider_or_interface_is_refused_with_what_there_is) {
  if (const std::string why = missing("tcp"); !why.empty()) GTEST_SKIP() << why;
  const auto refusal_of = [](const std::string& provider, const std::string& interface) -> std::string {
    NetworkConfig settings;
    settings.provider = provider;
    settings.interface = interface;
    try {
      const auto names = available_providers(settings);
      NetworkConfig chosen = settings;
      chosen.provider = names.at(0);
      (void)open_engine({.rank = 0, .num_ranks = 1, .job = 1, .settings = chosen});
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(refusal_of("carrier pigeon", ""), HasSubstr("'carrier pigeon' is not among"));
  EXPECT_THAT(refusal_of("tcp", "nowhere0"), HasSubstr("'nowhere0' is not among"));
  EXPECT_EQ(refusal_of("tcp", "127.0.0.1"), "");
}

/// Ranks as processes, each of which writes into all others.
void expect_exchange_of_processes(const std::string& provider) {
  constexpr int kRanks = 3;
  const auto body = [provider](int rank, const std::shared_ptr<Bootstrap>& group, test::Blackboard&) {
    NetworkConfig settings;
    settings.provider = provider;
    End end(open_fabric(*group, settings.with_environment(), 20s), kRanks * kBytes);
    end.region = end.fabric->register_memory({end.memory.data(), end.memory.size()});
    const auto keys = group->all_gather(end.fabric->region_key(end.region), 20s);
    for (int peer = 0; peer < kRanks; ++peer) end.remote[peer] = end.fabric->import_region(peer, keys[peer]);
    const std::size_t at = static_cast<std::size_t>(rank) * kBytes;
    std::fill_n(end.memory.begin() + at, kBytes, static_cast<std::byte>(rank + 1));
    Completions completions;
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer == rank) continue;
      EXPECT_TRUE(end.turn_until([&] { return end.put(peer, at, at, kBytes, {1, 1}, &completions); }));
    }
    EXPECT_TRUE(end.turn_until([&] {
      int here = 1;
      for (int peer = 0; peer < kRanks; ++peer) here += end.arrivals.count(peer, {1, 1}) == 1;
      return here == kRanks && completions.done == kRanks - 1;
    }));
    for (std::size_t i = 0; i < end.memory.size(); ++i)
      ASSERT_EQ(end.memory[i], static_cast<std::byte>(i / kBytes + 1)) << "byte " << i << " at rank " << rank;
    // Nobody leaves while another still waits for what he sent: progress is made by both ends.
    EXPECT_TRUE(end.turn_until([&] { return end.fabric->is_idle(); }));
    const std::byte done{1};
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer == rank) continue;
      EXPECT_TRUE(end.turn_until([&] { return end.fabric->message({peer, 0, {&done, 1}}); }));
    }
    EXPECT_TRUE(end.turn_until([&] { return end.messages == kRanks - 1 && end.fabric->is_idle(); }));
    (void)group->all_gather({}, 20s);
  };
  test::Processes processes(kRanks, body);
  EXPECT_THAT(processes.wait(), ::testing::Each(0));
}

TEST(libfabric, processes_exchange_over_tcp) {
  if (const std::string why = missing("tcp"); !why.empty()) GTEST_SKIP() << why;
  expect_exchange_of_processes("tcp");
}

TEST(libfabric, processes_exchange_over_shm) {
  if (const std::string why = missing("shm"); !why.empty()) GTEST_SKIP() << why;
  expect_exchange_of_processes("shm");
}

/// Two ranks as processes, one of which is killed.
void expect_death_is_noticed(const std::string& provider) {
  const auto body = [provider](int rank, const std::shared_ptr<Bootstrap>& group, test::Blackboard& board) {
    NetworkConfig settings;
    settings.provider = provider;
    End end(open_fabric(*group, settings.with_environment(), 20s), kBytes);
    end.region = end.fabric->register_memory({end.memory.data(), kBytes});
    const auto keys = group->all_gather(end.fabric->region_key(end.region), 20s);
    for (int peer = 0; peer < 2; ++peer) end.remote[peer] = end.fabric->import_region(peer, keys[peer]);
    if (rank == 1) {
      EXPECT_TRUE(end.turn_until([&] { return end.arrivals.count(0, {1, 1}) == 1; }));
      EXPECT_TRUE(std::all_of(end.memory.begin(), end.memory.end(), [](std::byte b) { return b == std::byte{42}; }));
      board.progress[1] = 1;
      board.progress[1].notify_all();
      end.turn_until([] { return false; }, 20s);  // is killed here
      return;
    }
    std::fill(end.memory.begin(), end.memory.end(), std::byte{42});
    Completions completions;
    std::uint64_t puts = 0;
    EXPECT_TRUE(end.turn_until([&] { return end.put(1, 0, 0, kBytes, {1, 1}, &completions); }));
    ++puts;
    EXPECT_TRUE(end.turn_until([&] { return board.progress[1] == 1; }));
    board.progress[0] = 1;
    board.progress[0].notify_all();
    EXPECT_TRUE(end.turn_until([&] {
      if (puts < 1000 && end.put(1, 0, 0, kBytes, {1, 1}, &completions)) ++puts;
      return !end.failed.empty();
    }));
    EXPECT_EQ(end.failed, std::vector<int>{1});
    // The others of a larger group would go on; what was on its way to the dead is counted.
    EXPECT_TRUE(end.turn_until([&] { return completions.done + completions.failed == puts; }));
    EXPECT_GT(completions.failed, 0u);
    end.fabric->close();
  };
  test::Processes processes(2, body);
  ASSERT_TRUE(test::Blackboard::wait_for(processes.board().progress[0], 1));
  processes.kill_rank(1);
  EXPECT_EQ(processes.wait()[0], 0);
}

TEST(libfabric, a_killed_process_is_reported_by_name_over_tcp) {
  if (const std::string why = missing("tcp"); !why.empty()) GTEST_SKIP() << why;
  expect_death_is_noticed("tcp");
}

}  // namespace
}  // namespace deep_ep::net
