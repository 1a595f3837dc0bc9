// SPDX-License-Identifier: MIT
// One rank's end of a fabric with a piece of registered memory, as tests use it.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "net/arrivals.h"
#include "net/fabric.h"

namespace deep_ep::net {

class End final : public Receiver {
 public:
  End(std::unique_ptr<Fabric> opened, std::size_t bytes)
      : fabric(std::move(opened)), memory(bytes), arrivals(fabric->num_ranks()), remote(fabric->num_ranks(), -1) {}
  End(End&&) = default;

  void on_notice(int source, const Notice& notice) override {
    arrivals.add(source, notice);
    if (when_notice) when_notice(source, notice);
  }
  void on_message(int source, std::uint32_t epoch, std::span<const std::byte> payload) override {
    ++messages;
    if (when_message) when_message(source, epoch, payload);
  }
  void on_peer_failed(int peer, const std::string&) override { failed.push_back(peer); }

  bool put(int peer, std::uint64_t at, std::uint64_t remote_at, std::size_t bytes, const Notice& notice,
           Completions* completions) {
    return fabric->put({peer, region, at, remote[peer], remote_at, bytes, notice, completions});
  }

  /// Makes progress until `ready` holds; false after `limit`.
  template <typename Ready>
  bool turn_until(const Ready& ready, std::chrono::seconds limit = std::chrono::seconds(20)) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!ready()) {
      if (!fabric->progress(*this)) std::this_thread::yield();
      if (std::chrono::steady_clock::now() > deadline) return false;
    }
    return true;
  }

  std::unique_ptr<Fabric> fabric;
  std::vector<std::byte> memory;
  Arrivals arrivals;
  int region = -1;
  std::vector<int> remote;  // the peers' regions
  int messages = 0;
  std::vector<int> failed;
  std::function<void(int, const Notice&)> when_notice;
  std::function<void(int, std::uint32_t, std::span<const std::byte>)> when_message;
};

/// Connects ends that live in this thread, registers their memory and exchanges the keys.
inline void connect_all(std::vector<End>& ends) {
  std::vector<Blob> addresses, keys;
  for (End& end : ends) addresses.push_back(end.fabric->address());
  for (End& end : ends) {
    end.fabric->connect(addresses);
    end.region = end.fabric->register_memory({end.memory.data(), end.memory.size()});
    keys.push_back(end.fabric->region_key(end.region));
  }
  for (End& end : ends)
    for (std::size_t peer = 0; peer < ends.size(); ++peer)
      end.remote[peer] = end.fabric->import_region(static_cast<int>(peer), keys[peer]);
}

/// So many rounds of progress on all ends.
inline void turn(std::vector<End>& ends, int rounds) {
  for (int i = 0; i < rounds; ++i)
    for (End& end : ends) end.fabric->progress(end);
}

template <typename Ready>
bool turn_until(std::vector<End>& ends, const Ready& ready, std::chrono::seconds limit = std::chrono::seconds(20)) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!ready()) {
    turn(ends, 1);
    if (std::chrono::steady_clock::now() > deadline) return false;
  }
  return true;
}

}  // namespace deep_ep::net
