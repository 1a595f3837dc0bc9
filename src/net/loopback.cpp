// SPDX-License-Identifier: MIT
// Packets lie in a queue at their target's port until the target calls progress(); only then are a put's bytes read
// from the source's memory, so that a source that reuses them too early is found out.
#include "net/loopback.h"

#include <fmt/format.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "check.h"
#include "net/wire.h"

namespace deep_ep::net {

namespace {

std::uint64_t scramble(std::uint64_t x) {
  x += 0x9e37'79b9'7f4a'7c15;
  x = (x ^ x >> 30) * 0xbf58'476d'1ce4'e5b9;
  x = (x ^ x >> 27) * 0x94d0'49bb'1331'11eb;
  return x ^ x >> 31;
}

struct RegionKey {
  std::uint64_t region = 0, bytes = 0, key = 0;
};

struct Packet {
  int source = -1;  // -1: injected
  int target = -1;
  std::uint64_t sequence = 0;
  std::uint64_t due = 0;  // step of the target
  // A put
  const std::byte* from = nullptr;
  RegionKey region;  // of the target
  std::uint64_t to = 0;
  std::size_t bytes = 0;
  std::size_t left = 0;  // of the bytes, from their beginning, that have not landed
  Completions* completions = nullptr;
  std::optional<std::uint64_t> word;
  // A message
  Blob wire;
  // Where the network delivers it twice: whether either copy has been acknowledged.
  std::shared_ptr<std::atomic<bool>> acknowledged;
};

/// A put or a message (0 bytes) that has ended, on its way back to its source.
struct Ack {
  int target;
  Completions* completions;
  std::size_t bytes;
  bool failed;
};

struct Region {
  std::byte* base = nullptr;  // null: no more
  std::size_t bytes = 0;
  std::uint64_t key = 0;
};

/// A descriptor that is readable from a ring until it is silenced.
class Bell {
 public:
  Bell() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (event_ < 0) throw Error(ErrorCode::kSystem, fmt::format("eventfd: {}", std::strerror(errno)));
  }
  ~Bell() { ::close(event_); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  int fd() const { return event_; }
  void ring() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(event_, &one, sizeof one);
  }
  void silence() {
    std::uint64_t rings;
    [[maybe_unused]] const auto taken = ::read(event_, &rings, sizeof rings);
  }

 private:
  int event_;
};

/// What one rank has on the network. Two ports are never locked together.
struct Port {
  std::mutex mutex;
  Bell bell;                      // rung with every packet, acknowledgement and failure that is put here
  std::atomic<bool> dead{false};  // killed or closed; set under the lock
  std::uint64_t step = 0;
  std::vector<Packet> arriving;
  std::vector<Ack> acks;
  std::vector<std::pair<int, std::string>> failures;
  std::vector<Region> regions;
};

struct Link {
  std::atomic<bool> is_cut{false};
  std::atomic<std::uint64_t> packets{0};
};

class Network final : public LoopbackNetwork, public std::enable_shared_from_this<Network> {
 public:
  Network(int num_ranks, const LoopbackFaults& faults, std::uint64_t job)
      : num_ranks(num_ranks), faults(faults), job(job), ports(num_ranks), links(num_ranks * num_ranks) {}

  std::unique_ptr<Fabric> open(int rank) override;

  void kill(int rank) override { end(rank, "its process has ended"); }
  void cut(int a, int b) override { link(a, b).is_cut = link(b, a).is_cut = true; }
  void mend(int a, int b) override {
    link(a, b).is_cut = link(b, a).is_cut = false;
    ports[a].bell.ring();
    ports[b].bell.ring();
  }

  void inject_message(int target, std::span<const std::byte> wire) override {
    Packet packet;
    packet.wire.assign(wire.begin(), wire.end());
    std::lock_guard lock(ports[target].mutex);
    ports[target].arriving.push_back(std::move(packet));
    ports[target].bell.ring();
  }

  void inject_notice(int target, std::uint64_t word) override {
    Packet packet;
    packet.word = word;
    std::lock_guard lock(ports[target].mutex);
    ports[target].arriving.push_back(std::move(packet));
    ports[target].bell.ring();
  }

  Link& link(int source, int target) { return links[source * num_ranks + target]; }

  /// Takes a rank off the network: afterwards none of its memory is read or written by others. Once more by its own
  /// close(), for what it sent while it was killed.
  void end(int rank, const std::string& reason) {
    std::vector<Packet> lost;
    bool is_news = false;
    {
      std::lock_guard lock(ports[rank].mutex);
      is_news = !ports[rank].dead.exchange(true);
      ports[rank].regions.clear();
      lost.swap(ports[rank].arriving);
    }
    for (const Packet& packet : lost) acknowledge(packet, true);
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer == rank) continue;
      std::lock_guard lock(ports[peer].mutex);
      std::erase_if(ports[peer].arriving, [&](const Packet& packet) { return packet.source == rank; });
      if (!is_news) continue;
      ports[peer].failures.emplace_back(rank, reason);
      ports[peer].bell.ring();
    }
  }

  void acknowledge(const Packet& packet, bool failed) {
    if (packet.source < 0) return;
    if (packet.acknowledged && packet.acknowledged->exchange(true)) return;
    std::lock_guard lock(ports[packet.source].mutex);
    ports[packet.source].acks.push_back({packet.target, packet.completions, packet.bytes, failed});
    ports[packet.source].bell.ring();
  }

  /// Number of the packet on its link decides its fate. Returns false where the queue is full. A target that has left
  /// fails the packet.
  bool send(Packet packet) {
    const int target = packet.target;
    if (ports[packet.source].dead) return true;
    Link& way = link(packet.source, target);
    Port& port = ports[target];
    bool failed = false, dropped = false;
    {
      std::lock_guard lock(port.mutex);
      if (port.arriving.size() >= static_cast<std::size_t>(faults.queue_depth)) return false;
      packet.sequence = ++way.packets;
      std::uint64_t dice = scramble(faults.seed ^ scramble(packet.source * 4096 + target) ^ packet.sequence << 32);
      const auto roll = [&dice] { return dice = scramble(dice); };
      const auto happens = [&roll](double share) { return static_cast<double>(roll() >> 11) * 0x1p-53 < share; };
      const auto delay = [&] { return port.step + roll() % (static_cast<std::uint64_t>(faults.max_delay) + 1); };
      failed = port.dead;
      dropped = happens(faults.drop);
      const bool twice = happens(faults.duplicate);
      packet.left = packet.bytes;
      if (twice) packet.acknowledged = std::make_shared<std::atomic<bool>>(false);
      if (!failed && !dropped) {
        port.bell.ring();
        packet.due = delay();
        port.arriving.push_back(packet);
        if (twice) {
          packet.due = delay();
          port.arriving.push_back(packet);
        }
      }
    }
    if (failed || dropped) acknowledge(packet, failed);
    return true;
  }

  const int num_ranks;
  const LoopbackFaults faults;
  const std::uint64_t job;
  std::deque<Port> ports;
  std::deque<Link> links;
};

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
    report_.capabilities = {"loopback", network_->faults.immediate_bytes, false, true};
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
    require(memory.cuda_device < 0, "register_memory: the loopback network has ordinary memory only, not GPU {}",
            memory.cuda_device);
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

  bool message(int peer, std::uint32_t epoch, std::span<const std::byte> payload) override {
    require(peer >= 0 && peer < num_ranks(), "message: peer {} of {}", peer, num_ranks());
    require(payload.size() <= kMaxMessageBytes, "message: {} bytes, at most {}", payload.size(), kMaxMessageBytes);
    if (failures_[peer]) return true;
    Packet packet;
    packet.source = rank_;
    packet.target = peer;
    packet.wire = gate_.seal(peer, epoch, payload);
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

std::unique_ptr<Fabric> Network::open(int rank) {
  require(rank >= 0 && rank < num_ranks, "rank {} of {}", rank, num_ranks);
  return std::make_unique<Endpoint>(shared_from_this(), rank);
}

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
  return std::make_shared<Network>(num_ranks, faults, job);
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
