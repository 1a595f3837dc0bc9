// SPDX-License-Identifier: MIT
// The raw network: what src/net gets out of a libfabric provider between two ranks, nothing of dispatch in it. The
// limit beside which exchanges between nodes are measured (bench/internode.py). Two processes of this machine by
// default; or one rank each where RANK, WORLD_SIZE and MASTER_ADDR are set: then each rank of the first half has a
// partner in the second, and all pairs are busy at once.
#include <fmt/core.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "bench/free_port.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"
#include "net/arrivals.h"
#include "net/fabric.h"

namespace deep_ep::bench {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

struct Command {
  std::string provider = "tcp";
  std::string interface;
  std::size_t most_bytes = 4 << 20;
  std::size_t window_bytes = 16 << 20;  // under way at once
  double seconds = 0.4;                 // per size and measurement
  std::size_t there = 0, back = 0;      // not 0: this exchange alone
  std::string out;
};

class Counter final : public net::Receiver {
 public:
  void on_notice(int, const net::Notice&) override { ++notices; }
  void on_message(int, std::uint32_t, std::span<const std::byte>) override { ++messages; }
  void on_peer_failed(int peer, const std::string& reason) override {
    throw Error(ErrorCode::kSystem, fmt::format("rank {}: {}", peer, reason));
  }
  std::uint64_t notices = 0, messages = 0;
};

/// One of a pair of ranks.
class Rank {
 public:
  Rank(const Command& command, std::shared_ptr<Bootstrap> group)
      : command_(command), group_(std::move(group)), memory_(2 * command.most_bytes) {
    NetworkConfig settings;
    settings.provider = command.provider;
    settings.interface = command.interface;
    fabric_ = net::open_fabric(*group_, settings.with_environment(), 30s);
    region_ = fabric_->register_memory({memory_.data(), memory_.size()});
    const int half = group_->num_ranks() / 2;
    peer_ = group_->rank() < half ? group_->rank() + half : group_->rank() - half;
    const auto keys = group_->all_gather(fabric_->region_key(region_), 30s);
    remote_ = fabric_->import_region(peer_, keys[peer_]);
  }

  const net::FabricReport& report() const { return fabric_->report(); }

  nlohmann::json measure(std::size_t bytes) {
    const double one_way = ping_pong(bytes) / 2;
    const double rate = stream(bytes);
    return {{"bytes", bytes}, {"one_way_us", one_way * 1e6}, {"gb_per_s", rate * 1e-9}};
  }

  // Both partners send at once, so many bytes and then so many: what a dispatch and a combine move, without them.
  nlohmann::json there_and_back() {
    std::vector<double> times;
    const auto deadline = Clock::now() + std::chrono::duration<double>(command_.seconds);
    for (std::uint64_t more = 1; more != 0; more = agree(Clock::now() < deadline)) {
      const auto start = Clock::now();
      for (const std::size_t bytes : {command_.there, command_.back}) {
        put(bytes);
        // The partner puts as often as we do; and what we send leaves only while we turn.
        turn_until([&] { return counter_.notices >= puts_ && ended() == puts_; });
      }
      times.push_back(slowest(std::chrono::duration<double>(Clock::now() - start).count()));
    }
    std::sort(times.begin(), times.end());
    return {{"there_bytes", command_.there},
            {"back_bytes", command_.back},
            {"pairs", group_->num_ranks() / 2},
            {"n", times.size()},
            {"median_us", times[times.size() / 2] * 1e6}};
  }

 private:
  void put(std::size_t bytes) {
    const net::Put put{peer_, region_, 0, remote_, command_.most_bytes, bytes, net::Notice{}, &completions_};
    while (!fabric_->put(put)) fabric_->progress(counter_);
    ++puts_;
  }

  template <typename Ready>
  void turn_until(const Ready& ready) {
    const auto deadline = Clock::now() + 60s;
    while (!ready()) {
      // Where ranks share cores, spinning takes the peer's time.
      if (!fabric_->progress(counter_)) std::this_thread::yield();
      if (Clock::now() > deadline) throw Error(ErrorCode::kSystem, "the peer does not answer");
    }
  }

  std::uint64_t ended() const { return completions_.done + completions_.failed; }
  bool is_first() const { return group_->rank() < peer_; }

  // Both ranks leave at the same time, and agree on how often to repeat: rank 0 says it.
  std::uint64_t agree(std::uint64_t value) {
    Bootstrap::Blob blob(sizeof value);
    std::memcpy(blob.data(), &value, sizeof value);
    const auto all = group_->all_gather(blob, 60s);
    std::memcpy(&value, all[0].data(), sizeof value);
    return value;
  }

  double slowest(double seconds) {
    Bootstrap::Blob blob(sizeof seconds);
    std::memcpy(blob.data(), &seconds, sizeof seconds);
    for (const auto& one : group_->all_gather(blob, 60s)) {
      double theirs = 0;
      std::memcpy(&theirs, one.data(), sizeof theirs);
      seconds = std::max(seconds, theirs);
    }
    return seconds;
  }

  double round_trips(std::size_t bytes, std::uint64_t times) {
    agree(0);
    const std::uint64_t before = counter_.notices;
    const auto start = Clock::now();
    for (std::uint64_t i = 1; i <= times; ++i) {
      if (is_first()) put(bytes);
      turn_until([&] { return counter_.notices >= before + i; });
      if (!is_first()) put(bytes);
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    turn_until([&] { return ended() == puts_; });
    return seconds / static_cast<double>(times);
  }

  // Seconds of a round trip.
  double ping_pong(std::size_t bytes) {
    const double guess = round_trips(bytes, 50);
    return round_trips(
        bytes, agree(std::clamp<std::uint64_t>(static_cast<std::uint64_t>(command_.seconds / guess), 10, 100000)));
  }

  // Bytes per second in one direction.
  double one_way(std::size_t bytes, std::uint64_t times) {
    agree(0);
    const std::uint64_t before = counter_.notices;
    const auto start = Clock::now();
    if (is_first()) {
      for (std::uint64_t i = 0; i < times; ++i) {
        turn_until([&] { return fabric_->bytes_in_flight() + bytes <= std::max(command_.window_bytes, bytes); });
        put(bytes);
      }
      turn_until([&] { return counter_.notices == before + 1; });  // rank 1 has them all
    } else {
      turn_until([&] { return counter_.notices == before + times; });
      put(bytes);
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    turn_until([&] { return ended() == puts_; });
    return static_cast<double>(bytes * times) / seconds;
  }

  double stream(std::size_t bytes) {
    const double guess = one_way(bytes, 32) / static_cast<double>(bytes);
    return one_way(bytes,
                   agree(std::clamp<std::uint64_t>(static_cast<std::uint64_t>(command_.seconds * guess), 16, 1000000)));
  }

  const Command& command_;
  const std::shared_ptr<Bootstrap> group_;
  std::vector<std::byte> memory_;  // the first half is sent, the second received
  std::unique_ptr<net::Fabric> fabric_;
  Counter counter_;
  net::Completions completions_;
  std::uint64_t puts_ = 0;
  int region_ = -1, peer_ = -1, remote_ = -1;
};

void write(const Command& command, const nlohmann::json& report) {
  if (command.there > 0) fmt::print("{}\n", report["exchange"].dump());
  if (!command.out.empty()) std::ofstream(command.out) << report.dump(1) << '\n';
}

int run(const Command& command, const TcpRendezvous& where) {
  Rank rank(command, tcp_group(where));
  nlohmann::json report = {{"provider", rank.report().capabilities.provider},
                           {"interface", rank.report().interface},
                           {"immediate_bytes", rank.report().capabilities.immediate_bytes},
                           {"sizes", nlohmann::json::array()}};
  if (command.there > 0) {
    report["exchange"] = rank.there_and_back();
    if (where.rank == 0) write(command, report);
    return 0;
  }
  if (where.rank == 0) fmt::print("{}{:>10} {:>12} {:>10}\n", rank.report().to_string(), "bytes", "one way us", "GB/s");
  for (std::size_t bytes = 16; bytes <= command.most_bytes; bytes *= 4) {
    const nlohmann::json line = rank.measure(bytes);
    report["sizes"].push_back(line);
    if (where.rank == 0)
      fmt::print("{:>10} {:>12.1f} {:>10.3f}\n", bytes, line["one_way_us"].get<double>(),
                 line["gb_per_s"].get<double>());
  }
  if (where.rank == 0) write(command, report);
  return 0;
}

int run_both(const Command& command) {
  TcpRendezvous where = TcpRendezvous::from_environment();
  if (where.num_ranks > 1 && where.num_ranks % 2 == 0) return run(command, where);
  where.port = free_port();
  where.num_ranks = 2;
  const pid_t child = fork();
  where.rank = child == 0 ? 1 : 0;
  const int code = run(command, where);
  if (child == 0) _exit(code);
  int status = 0;
  waitpid(child, &status, 0);
  return code != 0 || status != 0 ? 1 : 0;
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  deep_ep::bench::Command command;
  CLI::App app("Ping-pong and one-way streams of puts with notices over a libfabric provider, between pairs of ranks");
  app.add_option("--provider", command.provider, "libfabric provider, as Config::network.provider")
      ->capture_default_str();
  app.add_option("--interface", command.interface, "network interface or address");
  app.add_option("--most-bytes", command.most_bytes, "largest put")->capture_default_str();
  app.add_option("--window-bytes", command.window_bytes, "bytes under way at once in a stream")->capture_default_str();
  app.add_option("--seconds", command.seconds, "for each size and measurement")->capture_default_str();
  app.add_option("--there", command.there, "bytes that both ranks of a pair put at once; instead of all sizes");
  app.add_option("--back", command.back, "and then back");
  app.add_option("--out", command.out, "JSON file");
  CLI11_PARSE(app, argc, argv);
  if (command.there > 0) command.most_bytes = std::max({command.there, command.back, std::size_t{16}});
  if (command.there > 0 && command.back == 0) command.back = command.there;
  try {
    return deep_ep::bench::run_both(command);
  } catch (const std::exception& error) {
    fmt::print(stderr, "fabric_raw: {}\n", error.what());
    return 1;
  }
}
