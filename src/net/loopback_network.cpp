// SPDX-License-Identifier: MIT
#include "net/loopback_network.h"

#include <algorithm>

namespace deep_ep::net::loopback {

void Network::mend(int a, int b) {
  link(a, b).is_cut = link(b, a).is_cut = false;
  ports[a].bell.ring();
  ports[b].bell.ring();
}

void Network::inject_message(int target, std::span<const std::byte> wire) {
  Packet packet;
  packet.wire.assign(wire.begin(), wire.end());
  std::lock_guard lock(ports[target].mutex);
  ports[target].arriving.push_back(std::move(packet));
  ports[target].bell.ring();
}

void Network::inject_notice(int target, std::uint64_t word) {
  Packet packet;
  packet.word = word;
  std::lock_guard lock(ports[target].mutex);
  ports[target].arriving.push_back(std::move(packet));
  ports[target].bell.ring();
}

void Network::end(int rank, const std::string& reason) {
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

void Network::acknowledge(const Packet& packet, bool failed) {
  if (packet.source < 0) return;
  if (packet.acknowledged && packet.acknowledged->exchange(true)) return;
  std::lock_guard lock(ports[packet.source].mutex);
  ports[packet.source].acks.push_back({packet.target, packet.completions, packet.bytes, failed});
  ports[packet.source].bell.ring();
}

bool Network::send(Packet packet) {
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

}  // namespace deep_ep::net::loopback
