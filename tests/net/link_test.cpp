// SPDX-License-Identifier: MIT
// A link as kernels use it: host threads stand for them here, and write commands and read counts as kernels do.
#include "net/link.h"

#include <gtest/gtest.h>

#include <cstring>

#include "net/proxy_ranks.h"
#include "ranks.h"

namespace deep_ep::net {
namespace {

Config two_nodes() {
  Config config;
  config.max_experts = 8;
  config.ranks_per_node = {1, 1};
  config.arena_bytes = 1 << 16;
  config.low_latency.max_tokens_per_rank = 4;
  config.low_latency.row_bytes = 256;
  config.low_latency.num_topk = 2;
  config.forward_slot_bytes = 4096;
  config.network.provider = "loopback";
  return config;
}

// One rank: what a backend with kernels gives its link.
struct Kernels {
  Kernels(Bootstrap& group, const Config& config)
      : rank(group.rank()),
        topology(plan::Topology::from(config.ranks_per_node, group.num_ranks())),
        layout(plan::WindowLayout::place(config, group.num_ranks(), config.arena_bytes)),
        control(plan::FarMemory::mirror_bytes(layout)),
        slots(layout.low_latency_ticket_bytes * static_cast<std::size_t>(layout.num_tickets)),
        memory(untouched_pages(KernelEnd::bytes(group.num_ranks()))),
        end(reinterpret_cast<KernelEnd*>(memory.get())),
        writer(end->commands),
        link({.group = group,
              .config = config,
              .topology = topology,
              .layout = layout,
              .control = control.data(),
              .low_latency = slots.data(),
              .doorbell = doorbell,
              .kernels = end}) {}

  std::uint64_t load(std::size_t at) {
    return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(control.data() + at)).load(std::memory_order_acquire);
  }
  std::uint64_t word(Flag flag, std::uint64_t epoch, int writer_rank) {
    return load(place_of(layout, flag, epoch, writer_rank));
  }
  void begin(std::uint64_t epoch) { std::atomic_ref(end->commands.epoch).store(epoch, std::memory_order_relaxed); }
  void send(int flag, std::uint32_t epoch, std::uint32_t value, std::size_t payload = 0, std::uint32_t puts = 0) {
    ASSERT_TRUE(writer.push(Signal{
        .peer = 1 - rank, .flag = flag, .epoch = epoch, .value = value, .puts = puts, .payload_bytes = payload}));
  }

  const int rank;
  const plan::Topology topology;
  const plan::WindowLayout layout;
  std::vector<std::byte> control, slots;
  const std::shared_ptr<std::byte> memory;
  KernelEnd* const end;
  FifoWriter writer;
  Doorbell doorbell;
  Link link;  // last: its thread uses what is above
};

void with_two_ranks(const std::function<void(Kernels&, const std::function<void()>& meet)>& body) {
  const Config config = two_nodes();
  for (const test::Outcome& outcome : test::run_threads(2, [&](int, const std::shared_ptr<Bootstrap>& group) {
         Kernels kernels(*group, config);
         body(kernels, [&] { group->all_gather({}, config.open_timeout); });
       }))
    EXPECT_FALSE(outcome.failed) << outcome.message;
}

TEST(link, signals_of_kernels_are_flags_of_the_peer_with_what_they_publish) {
  with_two_ranks([](Kernels& k, const auto& meet) {
    const int peer = 1 - k.rank;
    for (std::uint32_t epoch = 1; epoch <= 40; ++epoch) {
      k.begin(epoch);
      const std::size_t at = k.layout.announcement(epoch, k.rank), payload = plan::WindowLayout::kAnnouncementHead;
      std::memset(k.link.mirror(peer) + at, static_cast<int>(epoch + static_cast<std::uint32_t>(k.rank)), payload);
      k.send(static_cast<int>(Flag::kAnnounced), epoch, 7, payload);
      ASSERT_TRUE(wait_for([&] { return k.word(Flag::kAnnounced, epoch, peer) == (std::uint64_t{epoch} << 32 | 7); }));
      const std::byte* const came = k.control.data() + k.layout.announcement(epoch, peer);
      for (std::size_t i = 0; i < payload; ++i)
        ASSERT_EQ(came[i], static_cast<std::byte>(epoch + static_cast<std::uint32_t>(peer)));
      k.send(static_cast<int>(Flag::kReleased), epoch, epoch - 1, 0, epoch);
      ASSERT_TRUE(wait_for([&] {
        return k.word(Flag::kReleased, 0, peer) >= epoch - 1 && k.load(k.layout.released(peer) + 8) >= epoch;
      }));
      meet();
    }
  });
}

TEST(link, a_signal_waits_for_the_puts_that_it_stands_behind_and_they_are_counted_as_left) {
  with_two_ranks([](Kernels& k, const auto& meet) {
    const int peer = 1 - k.rank;
    k.begin(1);
    constexpr std::size_t kBytes = 64;
    constexpr std::uint32_t kPuts = 20;
    std::memset(k.link.low_latency(peer, 0), 40 + k.rank, kBytes * kPuts);
    k.send(static_cast<int>(Flag::kArrived), 1, 0, 0, kPuts);
    for (std::uint32_t i = 0; i < kPuts; ++i) {
      EXPECT_EQ(k.word(Flag::kArrived, 1, peer) >> 32, 0u) << i;
      meet();
      ASSERT_TRUE(k.writer.push(Command{.peer = peer,
                                        .region = k.link.low_latency_region(),
                                        .remote_region = k.link.slots_region_of(peer),
                                        .channel = kDataChannel,
                                        .epoch = 1,
                                        .at = k.link.low_latency_at(peer, 0) + i * kBytes,
                                        .remote_at = i * kBytes,
                                        .bytes = kBytes}));
    }
    ASSERT_TRUE(wait_for([&] { return k.word(Flag::kArrived, 1, peer) >> 32 == 1; }));
    for (std::size_t i = 0; i < kBytes * kPuts; ++i) ASSERT_EQ(k.slots[i], static_cast<std::byte>(40 + peer));
    EXPECT_TRUE(wait_for([&] {
      return std::atomic_ref(k.end->left[1]).load(std::memory_order_acquire) == (std::uint64_t{1} << 32 | kPuts);
    }));
    meet();
  });
}

TEST(link, chunks_are_counted_where_they_land_and_slots_where_they_are_free_again) {
  with_two_ranks([](Kernels& k, const auto& meet) {
    const int peer = 1 - k.rank;
    PeerWords& words = k.end->peers()[peer];
    constexpr int kSlot = 3;
    const std::size_t at = static_cast<std::size_t>(peer * plan::kForwardSlots + kSlot) * k.link.slot_bytes();
    const std::size_t there = static_cast<std::size_t>(k.rank * plan::kForwardSlots + kSlot) * k.link.slot_bytes();
    for (std::uint32_t epoch = 1; epoch <= 5; ++epoch) {
      k.begin(epoch);
      plan::ChunkHead head;
      head.epoch = epoch;
      head.bytes = 128;
      std::memset(k.link.chunk(peer, kSlot), 0, head.bytes);
      std::memcpy(k.link.chunk(peer, kSlot), &head, sizeof head);
      ASSERT_TRUE(k.writer.push(Command{.peer = peer,
                                        .region = k.link.chunk_region(),
                                        .remote_region = k.link.inbox_region_of(peer),
                                        .channel = kSlot,
                                        .epoch = epoch,
                                        .at = at,
                                        .remote_at = there,
                                        .bytes = 128}));
      ASSERT_TRUE(
          wait_for([&] { return std::atomic_ref(words.landed[kSlot]).load(std::memory_order_acquire) == epoch; }));
      plan::ChunkHead came;
      std::memcpy(&came, k.link.inbox() + at, sizeof came);
      EXPECT_EQ(came.epoch, epoch);
      EXPECT_EQ(std::atomic_ref(words.free_again[kSlot]).load(std::memory_order_relaxed), epoch - 1);
      meet();
      k.send(kCreditSignal, epoch, kSlot);
      ASSERT_TRUE(
          wait_for([&] { return std::atomic_ref(words.free_again[kSlot]).load(std::memory_order_acquire) == epoch; }));
      meet();
    }
  });
}

}  // namespace
}  // namespace deep_ep::net
