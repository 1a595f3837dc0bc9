// SPDX-License-Identifier: MIT
// One rank's end of the network in memory. Packets lie at their target's port until the target calls progress(); only
// then are a put's bytes read from the source's memory, so that a source that reuses them too early is found out.
#include "net/loopback.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "check.h"
#include "net/loopback_network.h"
#include "net/wire.h"

namespace deep_ep::net {

namespace loopback {

namespace {

class Endpoint final : public Fabric {
 public:
  Endpoint(std::shared_ptr<Network> network, int rank)
      : network_(std::move(network)),
        rank_(rank),
        gate_(network_->job, rank, network_->num_ranks),
        imported_(network_->num_ranks),
        arrived_(network_->num_ranks),
        failures_(network_->num_ranks),
        in_flight_(network_->num_ranks) {
    report_.capabilities = {"loopback", network_->faults.immediate_bytes, true};
    report_.interface = "memory of this process";
  }
  ~Endpoint() override { close(); }
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  int rank() const override { return rank_; }
  int num_ranks() const override { return network_->num_ranks; }
  const FabricReport& report() const override { return report_; }
  Blob address() const override { return Blob(1, static_cast<std::byte>(rank_)); }

  void connect(std::span<const Blob> addresses) override {
    require_eq(static_cast<int>(addresses.size()), num_ranks(), "addresses == num_ranks");
    connected_ = true;
  }

  int register_memory(const Memory& memory) override {
    require(connected_, "register_memory before connect: nobody is admitted yet");
    std::lock_guard lock(port().mutex);
    const auto region = static_cast<int>(port().regions.size());
    const std::uint64_t key = scramble(
        network_->job ^ scramble(static_cast<std::uint64_t>(rank_) << 32 | static_cast<std::uint64_t>(region)));
    port().regions.push_back({memory.base, memory.bytes, key});
    own_.push_back({memory.base, memory.bytes, key});
    return region;
  }

  void unregister_memory(int region) override {
    std::lock_guard lock(port().mutex);
    own(region) = Region{};
    port().regions.at(static_cast<std::size_t>(region)) = Region{};
  }

  Blob region_key(int region) const override {
    const Region& mine = own_.at(static_cast<std::size_t>(region));
    const RegionKey key{static_cast<std::uint64_t>(region), mine.bytes, mine.key};
    Blob blob(sizeof key);
    std::memcpy(blob.data(), &key, sizeof key);
    return blob;
  }

  int import_region(int peer, std::span<const std::byte> key) override {
    require(peer >= 0 && peer < num_ranks(), "import_region: peer {} of {}", peer, num_ranks());
    require_eq(key.size(), sizeof(RegionKey), "import_region: bytes of the key");
    std::memcpy(&imported_[peer].emplace_back(), key.data(), key.size());
    return static_cast<int>(imported_[peer].size()) - 1;
  }

  bool put(const Put& put) override {
    require(put.peer >= 0 && put.peer < num_ranks(), "put: peer {} of {}", put.peer, num_ranks());
    const Region& mine = own(put.region);
    require(put.bytes > 0 && put.at <= mine.bytes && put.bytes <= mine.bytes - put.at,
            "put: {} bytes at {} of a region of {}", put.bytes, put.at, mine.bytes);
    auto& keys = imported_[put.peer];
    require(put.remote_region >= 0 && put.remote_region < static_cast<int>(keys.size()),
            "put: remote region {} of {} of rank {}", put.remote_region, keys.size(), put.peer);
    const RegionKey& key = keys[put.remote_region];
    require(put.remote_at <= key.bytes && put.bytes <= key.bytes - put.remote_at,
            "put: {} bytes at {} of rank {}'s region of {}", put.bytes, put.remote_at, put.peer, key.bytes);
    require(!put.notice || put.notice->channel < kNumChannels, "put: channel {} of {}", put.notice->channel,
            kNumChannels);
    if (failures_[put.peer]) {
      if (put.completions != nullptr) put.completions->failed.fetch_add(1, std::memory_order_release);
      return true;
    }
    Packet packet;
    packet.source = rank_;
    packet.target = put.peer;
    packet.from = mine.base + put.at;
    packet.bytes = put.bytes;
    packet.region = key;
    packet.to = put.remote_at;
    packet.completions = put.completions;
    if (put.notice) packet.word = gate_.seal(put.peer, *put.notice, word_bytes());
    if (!network_->send(std::move(packet))) return false;
    ++counters_.puts;
    counters_.put_bytes += put.bytes;
    in_flight_[put.peer] += put.bytes;
    ++under_way_;
    return true;
  }

  bool message(const Message& message) override {
    require(message.peer >= 0 && message.peer < num_ranks(), "message: peer {} of {}", message.peer, num_ranks());
    require(message.payload.size() <= kMaxMessageBytes, "message: {} bytes, at most {}", message.payload.size(),
            kMaxMessageBytes);
    if (failures_[message.peer]) return true;
    Packet packet;
    packet.source = rank_;
    packet.target = message.peer;
    packet.wire = gate_.seal(message.peer, message.epoch, message.payload);
    if (!network_->send(std::move(packet))) return false;
    ++counters_.messages;
    ++under_way_;
    return true;
  }

  bool progress(Receiver& receiver) override {
    std::vector<Packet> landed, lost;
    std::vector<Ack> acks;
    std::vector<std::pair<int, std::string>> failures;
    {
      std::lock_guard lock(port().mutex);
      if (port().dead) return false;
      ++port().step;
      take_due(landed, lost);
      acks.swap(port().acks);
      failures.swap(port().failures);
    }
    for (const Packet& packet : landed) network_->acknowledge(packet, false);
    for (const Packet& packet : lost) network_->acknowledge(packet, true);
    for (const Ack& ack : acks) complete(ack);
    for (const Packet& packet : landed) hand_out(packet, receiver);
    for (const auto& [peer, reason] : failures) {
      if (failures_[peer]) continue;
      failures_[peer] = reason;
      receiver.on_peer_failed(peer, reason);
    }
    return !landed.empty() || !acks.empty() || !failures.empty();
  }

  void set_epoch(std::uint32_t epoch) override { gate_.set_epoch(epoch); }
  int wait_fd() const override { return network_->ports[rank_].bell.fd(); }
  bool prepare_wait() override {
    std::lock_guard lock(port().mutex);
    port().bell.silence();
    const auto may_come = [this](const Packet& packet) {
      return packet.source < 0 || !network_->link(packet.source, rank_).is_cut;
    };
    return std::none_of(port().arriving.begin(), port().arriving.end(), may_come) && port().acks.empty() &&
           port().failures.empty();
  }

  const std::optional<std::string>& peer_failure(int peer) const override { return failures_.at(peer); }

  void give_up(int peer, const std::string& reason) override {
    if (failures_.at(peer)) return;
    failures_[peer] = reason;
    std::vector<Packet> lost;
    {
      std::lock_guard lock(network_->ports[peer].mutex);
      auto& packets = network_->ports[peer].arriving;
      const auto others = std::stable_partition(packets.begin(), packets.end(),
                                                [&](const Packet& packet) { return packet.source != rank_; });
      lost.assign(std::make_move_iterator(others), std::make_move_iterator(packets.end()));
      packets.erase(others, packets.end());
    }
    for (const Packet& packet : lost) network_->acknowledge(packet, true);
    std::lock_guard lock(port().mutex);
    std::erase_if(port().arriving, [&](const Packet& packet) { return packet.source == peer; });
  }

  std::uint64_t bytes_in_flight() const override {
    return std::accumulate(in_flight_.begin(), in_flight_.end(), std::uint64_t{0});
  }
  std::uint64_t bytes_in_flight_to(int peer) const override { return in_flight_.at(peer); }
  bool is_idle() const override { return under_way_ == 0; }

  FabricCounters counters() const override {
    FabricCounters counters = counters_;
    counters.refused = gate_.refused();
    counters.duplicates = gate_.duplicates();
    counters.last_refusal = gate_.last_refusal();
    return counters;
  }

  void close() override { network_->end(rank_, "it has left"); }

 private:
  Port& port() { return network_->ports[rank_]; }
  std::size_t word_bytes() const { return network_->faults.immediate_bytes; }

  Region& own(int region) {
    require(region >= 0 && region < static_cast<int>(own_.size()) && own_[region].base != nullptr,
            "region {} is not registered", region);
    return own_[region];
  }

  // Under the port's lock: a source that closes waits for it, so its memory is there while we read.
  void take_due(std::vector<Packet>& landed, std::vector<Packet>& lost) {
    std::vector<Packet>& packets = port().arriving;
    std::vector<Packet> stay;
    for (Packet& packet : packets) {
      const bool may_come = packet.source < 0 || !network_->link(packet.source, rank_).is_cut;
      if (!may_come || packet.due >= port().step) {
        stay.push_back(std::move(packet));
        continue;
      }
      const bool begins = packet.source >= 0 && packet.left == packet.bytes;
      if (begins && !arrived_[packet.source].take(packet.sequence)) {
        gate_.count_duplicate();
        continue;
      }
      if (packet.bytes > 0 && target_of(packet) == nullptr) {
        lost.push_back(std::move(packet));
        continue;
      }
      (land(packet) ? landed : stay).push_back(std::move(packet));
    }
    packets.swap(stay);
  }

  // Null where this rank has taken its memory back: a NIC would refuse the key.
  std::byte* target_of(const Packet& packet) {
    const auto& regions = port().regions;
    if (packet.region.region >= regions.size() || regions[packet.region.region].key != packet.region.key)
      return nullptr;
    return regions[packet.region.region].base + packet.to;
  }

  // Copies the last piece that is left; returns whether all is here.
  bool land(Packet& packet) {
    if (packet.left == 0) return true;
    const std::size_t first = network_->faults.tear && packet.left == packet.bytes ? packet.bytes / 2 : 0;
    std::memcpy(target_of(packet) + first, packet.from + first, packet.left - first);
    packet.left = first;
    packet.due += 1;
    return first == 0;
  }

  void complete(const Ack& ack) {
    in_flight_[ack.target] -= ack.bytes;
    --under_way_;
    if (ack.completions == nullptr) return;
    // Release: whoever sees the count may write the bytes again, which the network has read.
    (ack.failed ? ack.completions->failed : ack.completions->done).fetch_add(1, std::memory_order_release);
  }

  void hand_out(const Packet& packet, Receiver& receiver) {
    if (packet.word) {
      if (const auto opened = gate_.open(*packet.word, word_bytes())) {
        ++counters_.notices;
        receiver.on_notice(opened->source, opened->notice);
      }
    } else if (packet.bytes == 0) {
      if (const auto opened = gate_.open(packet.wire)) {
        ++counters_.messages_received;
        receiver.on_message(opened->source, opened->epoch, opened->payload);
      }
    }
  }

  const std::shared_ptr<Network> network_;
  const int rank_;
  Gate gate_;
  FabricReport report_;
  FabricCounters counters_;
  std::vector<Region> own_;
  std::vector<std::vector<RegionKey>> imported_;  // [peer]
  std::vector<SequenceWindow> arrived_;           // packets, by source
  std::vector<std::optional<std::string>> failures_;
  std::vector<std::uint64_t> in_flight_;  // bytes of puts, by peer
  std::uint64_t under_way_ = 0;           // puts and messages
  bool connected_ = false;
};

}  // namespace

std::unique_ptr<Fabric> Network::open(int rank) {
  require(rank >= 0 && rank < num_ranks, "rank {} of {}", rank, num_ranks);
  return std::make_unique<Endpoint>(shared_from_this(), rank);
}

}  // namespace loopback

namespace {

// Networks of this process by job, while an endpoint keeps them.
struct Registry {
  std::mutex mutex;
  LoopbackFaults faults;
  std::map<std::uint64_t, std::weak_ptr<LoopbackNetwork>> networks;
  std::weak_ptr<LoopbackNetwork> latest;
};

Registry& registry() {
  static Registry registry;
  return registry;
}

}  // namespace

std::shared_ptr<LoopbackNetwork> LoopbackNetwork::create(int num_ranks, const LoopbackFaults& faults,
                                                         std::uint64_t job) {
  require(num_ranks >= 1, "num_ranks must be at least 1: {}", num_ranks);
  require(faults.immediate_bytes == 4 || faults.immediate_bytes == 8, "immediate_bytes must be 4 or 8: {}",
          faults.immediate_bytes);
  return std::make_shared<loopback::Network>(num_ranks, faults, job);
}

std::shared_ptr<LoopbackNetwork> LoopbackNetwork::of_job(std::uint64_t job, int num_ranks) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  std::erase_if(all.networks, [](const auto& entry) { return entry.second.expired(); });
  auto network = all.networks[job].lock();
  if (!network) {
    network = create(num_ranks, all.faults, job);
    all.networks[job] = all.latest = network;
  }
  return network;
}

void LoopbackNetwork::set_faults(const LoopbackFaults& faults) {
  std::lock_guard lock(registry().mutex);
  registry().faults = faults;
}

std::shared_ptr<LoopbackNetwork> LoopbackNetwork::latest() {
  std::lock_guard lock(registry().mutex);
  return registry().latest.lock();
}

}  // namespace deep_ep::net
