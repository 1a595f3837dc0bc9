// SPDX-License-Identifier: MIT
// Ranks with proxies, as tests use them.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "net/proxy.h"

namespace deep_ep::net {

inline constexpr std::size_t kRegionBytes = 1 << 16;

inline Proxy::Clock::time_point soon() { return Proxy::Clock::now() + std::chrono::seconds(20); }

template <typename Ready>
bool wait_for(const Ready& ready) {
  for (const auto deadline = soon(); !ready(); std::this_thread::sleep_for(std::chrono::microseconds(100)))
    if (Proxy::Clock::now() > deadline) return false;
  return true;
}

/// A rank with a proxy; what arrives is counted under a mutex.
class ProxyRank final : public ProxyReceiver {
 public:
  void on_notice(int source, const Notice& notice) override {
    std::lock_guard lock(mutex_);
    ++notices_[{source, notice.channel, notice.epoch}];
  }
  void on_message(int source, std::uint32_t epoch, std::span<const std::byte> payload) override {
    if (throws_at_message) throw std::runtime_error("thrown by a test");
    std::lock_guard lock(mutex_);
    messages_.emplace_back(source, epoch, std::string(reinterpret_cast<const char*>(payload.data()), payload.size()));
  }
  void on_peer_failed(int peer, const std::string& reason) override {
    std::lock_guard lock(mutex_);
    failures_.emplace_back(peer, reason);
  }
  void on_bad_command(const std::string& why) override {
    std::lock_guard lock(mutex_);
    bad_commands_.push_back(why);
  }
  void on_completed(std::uint32_t) override { ++completions_; }

  int notices(int source, int channel, std::uint32_t epoch) {
    std::lock_guard lock(mutex_);
    return notices_[{source, channel, epoch}];
  }
  template <typename T>
  T copy(T ProxyRank::*what) {
    std::lock_guard lock(mutex_);
    return this->*what;
  }

  std::vector<std::byte> memory = std::vector<std::byte>(kRegionBytes);
  std::atomic<bool> throws_at_message{false};
  std::atomic<int> completions_{0};
  std::map<std::tuple<int, int, std::uint32_t>, int> notices_;
  std::vector<std::tuple<int, std::uint32_t, std::string>> messages_;
  std::vector<std::pair<int, std::string>> failures_;
  std::vector<std::string> bad_commands_;
  std::unique_ptr<Proxy> proxy;  // last: it ends first

 private:
  std::mutex mutex_;
};

/// Connects endpoints of this process, registers each rank's memory as its region 0, and gives them to proxies.
inline void start_proxies(std::vector<ProxyRank>& ranks, std::vector<std::unique_ptr<Fabric>> fabrics,
                          const ProxyOptions& options = {}) {
  std::vector<Blob> addresses, keys;
  for (const auto& fabric : fabrics) addresses.push_back(fabric->address());
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    fabrics[rank]->connect(addresses);
    fabrics[rank]->register_memory({ranks[rank].memory.data(), kRegionBytes});
    keys.push_back(fabrics[rank]->region_key(0));
  }
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    for (std::size_t peer = 0; peer < ranks.size(); ++peer)
      fabrics[rank]->import_region(static_cast<int>(peer), keys[peer]);
    ranks[rank].proxy = std::make_unique<Proxy>(std::move(fabrics[rank]), ranks[rank], options);
  }
}

/// From a place in region 0 to the same place in the peer's.
inline Command put_to(int peer, int channel, std::uint32_t epoch, std::uint64_t at, std::size_t bytes) {
  Command command;
  command.peer = peer;
  command.channel = channel;
  command.epoch = epoch;
  command.at = command.remote_at = at;
  command.bytes = bytes;
  return command;
}

}  // namespace deep_ep::net
