// SPDX-License-Identifier: MIT
// One rank's way to the ranks that share no memory with it. Flags, with what they publish, go as messages and are
// stored into memory of the owner's there, laid out as its window, so that whoever waits, waits as for a neighbour.
// Rows go as puts: into forwarding slots, or into low-latency slots. Host threads call it, or kernels write commands
// for it.
//
// Nothing that arrives is ordered. A flag names how many pieces of message and how many puts it stands behind, and is
// stored only when all of them are here.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "deep_ep/bootstrap.h"
#include "deep_ep/config.h"
#include "net/arrivals.h"
#include "net/control_message.h"
#include "net/doorbell.h"
#include "net/kernel_end.h"
#include "net/proxy.h"
#include "plan/forwarding.h"
#include "plan/topology.h"
#include "plan/window.h"

namespace deep_ep::net {

/// Ordinary memory whose pages exist once touched. Throws kSystem.
std::shared_ptr<std::byte> untouched_pages(std::size_t bytes);

/// What a link must know of its rank.
struct LinkInput {
  Bootstrap& group;
  const Config& config;
  const plan::Topology& topology;
  const plan::WindowLayout& layout;
  // The link outlives none of these.
  std::byte* control;            // where flags are stored, with what they publish: as the control part of our window
  std::byte* low_latency;        // where low-latency data lands: as the low-latency slots of our window
  Doorbell& doorbell;            // rung after each store; we sleep on it too
  KernelEnd* kernels = nullptr;  // where kernels are to send
  int proxy_core = -1;           // for the thread that moves it all; -1: where the system likes
  std::shared_ptr<std::byte> (*memory)(std::size_t bytes) = untouched_pages;  // to send from, and to receive in
};

/// A piece of low-latency data, by its place in the slots of one ticket.
struct LowLatencyPut {
  std::uint64_t epoch = 0;
  std::size_t at = 0;
  std::size_t bytes = 0;
  Deadline deadline;
};

/// A chunk that lies in one of our slots.
struct LandedChunk {
  int source = -1;
  int slot = -1;
  plan::ChunkHead head;
};

class Link final : private ProxyReceiver {
 public:
  /// Opens the network. Collective.
  explicit Link(const LinkInput& input);
  ~Link() override;
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  /// Whether a rank is reached only by this link.
  bool reaches(int peer) const { return !topology_.same_node(rank_, peer); }

  // Flags
  // -------------------------------------------------------------------------------------------------------------------
  /// Memory that stands for the control part of a peer's window: what is written there goes with the flag that
  /// publishes it.
  std::byte* mirror(int peer) const { return mirrors_.get() + mirror_bytes_ * static_cast<std::size_t>(peer); }
  /// Sends a flag, and `payload` of the peer's mirror (announcement or reply) before it. `puts`: of low-latency data,
  /// made in this operation, that the flag stands behind.
  void publish(int peer, const FlagMessage& flag, std::span<const std::byte> payload = {});

  // Forwarding slots
  // -------------------------------------------------------------------------------------------------------------------
  std::size_t slot_bytes() const { return slot_bytes_; }
  /// A free slot at a peer for a chunk of this stream, now ours to fill; -1: none.
  int take_slot(int peer, plan::Stream stream);
  bool has_slot(int peer, plan::Stream stream) const;
  /// One that was taken is not needed after all.
  void leave_slot(int peer, int slot);
  /// Where the chunk for that slot is put together.
  std::byte* chunk(int peer, int slot) const { return staging_.get() + slot_at(peer, slot); }
  /// Sends it off.
  void put_chunk(int peer, int slot, const plan::ChunkHead& head, Deadline deadline);
  /// Chunks of this operation that the network has read from their slots.
  std::uint64_t chunks_left(std::uint64_t epoch) const;
  /// Chunks of an operation that have come since the last call. Those of older ones are given back unread.
  std::vector<LandedChunk> landed(std::uint64_t epoch);
  bool has_landed(std::uint64_t epoch) const;
  const std::byte* bytes_of(const LandedChunk& chunk) const { return inbox_.get() + slot_at(chunk.source, chunk.slot); }
  /// Their slots are free again for their sources, each of which is told once.
  void give_back(std::span<const LandedChunk> chunks);

  // Low latency
  // -------------------------------------------------------------------------------------------------------------------
  /// Memory that stands for a peer's low-latency slots of one ticket.
  std::byte* low_latency(int peer, int ticket) const {
    return low_latency_staging_.get() + low_latency_at(peer, ticket);
  }
  /// Sends what lies there to the same place in the peer's slots. Offset and bytes are multiples of 16.
  void put_low_latency(int peer, int ticket, const LowLatencyPut& put);
  /// How many such puts an operation made in all; and whether their bytes have left, so that the memory is free again.
  void note_low_latency(std::uint64_t epoch, std::uint64_t puts);
  bool low_latency_has_left(std::uint64_t epoch) const;

  // Kernels
  // -------------------------------------------------------------------------------------------------------------------
  /// What they send from is the mirrors, and low_latency(). The numbers that commands need:
  int chunk_region() const { return staging_region_; }
  int inbox_region_of(int peer) const { return peer_inbox_[peer]; }
  const std::byte* inbox() const { return inbox_.get(); }
  int low_latency_region() const { return low_latency_region_; }
  int slots_region_of(int peer) const { return peer_slots_[peer]; }
  /// Where low_latency(peer, ticket) lies in that region.
  std::size_t low_latency_at(int peer, int ticket) const {
    return (static_cast<std::size_t>(ticket) * static_cast<std::size_t>(num_ranks_) + static_cast<std::size_t>(peer)) *
           layout_.low_latency_ticket_bytes;
  }

  // Life and death
  // -------------------------------------------------------------------------------------------------------------------
  /// The operation that this rank is in.
  void begin(std::uint64_t epoch) { proxy_->set_epoch(static_cast<std::uint32_t>(epoch)); }
  /// A rank that is known to have ended, whoever found out; -1: none. `ignored`: ranks that are left out.
  int dead_rank(const std::vector<char>& ignored) const;
  bool dead(int peer) const { return state_[peer].load(std::memory_order_acquire) == kDead; }
  /// This rank found out; everybody else is told.
  void report_dead(int peer, const std::string& how);

  /// The network, its settings, and what was refused.
  std::string describe() const;

  /// Calls all of `ranks` and gives each a moment to answer, which needs nothing of it but that it runs. `suspect`
  /// where that one is silent, else another one that is; -1: all have answered.
  int silent_rank(int suspect, const std::vector<int>& ranks);

  /// Bytes handed to the network in puts, by peer.
  std::uint64_t put_bytes(int peer) const { return put_bytes_[peer].load(std::memory_order_relaxed); }

 private:
  enum State : int { kThere, kLeft, kDead };

  // A flag that is on its way to us.
  struct Expected {
    FlagMessage message;
    std::uint32_t pieces = 0, pieces_here = 0;  // pieces == 0: none has come
  };

  std::size_t slot_at(int peer, int slot) const {
    return (static_cast<std::size_t>(peer) * plan::kForwardSlots + static_cast<std::size_t>(slot)) * slot_bytes_;
  }
  int free_slot(int peer, plan::Stream stream) const;
  void open_network(const LinkInput& input);

  void on_notice(int source, const Notice& notice) override;
  void on_message(int source, std::uint32_t epoch, std::span<const std::byte> payload) override;
  void on_peer_failed(int peer, const std::string& reason) override;
  void on_bad_command(const std::string& why) override;
  void on_completed(std::uint32_t channels) override;
  void on_signal(const Signal& signal) override;
  void take_flag(int source, const ControlHead& head, std::span<const std::byte> payload);
  bool take_payload(int source, const ControlHead& head, std::span<const std::byte> payload);
  void store_if_complete(int source, const Expected& flag);
  void store(int source, Flag flag, std::uint64_t epoch, std::uint64_t value);
  void store_at(std::size_t at, std::uint64_t value);
  void take_chunk(int source, int slot, std::uint32_t epoch);
  void take_credit(int source, std::uint32_t slots);
  Expected& expected(int source, std::uint64_t epoch, Flag flag) {
    const auto at = (static_cast<std::size_t>(source) * plan::kOperationsInFlight + epoch % plan::kOperationsInFlight);
    return expected_[at * kNumFlags + static_cast<std::size_t>(flag)];
  }
  void say_goodbye();
  void send(int peer, const ControlHead& head);
  void send_credit(int peer, std::uint32_t slots);
  bool mark_dead(int peer);

  const int rank_, num_ranks_;
  const plan::Topology& topology_;
  const plan::WindowLayout& layout_;
  std::byte* const control_;
  std::byte* const low_latency_;
  Doorbell& doorbell_;
  KernelEnd* const kernels_;
  const plan::FarMemory memory_;
  const std::size_t slot_bytes_;
  const std::size_t mirror_bytes_;
  const std::shared_ptr<std::byte> mirrors_, staging_, inbox_, low_latency_staging_;

  std::vector<std::atomic<int>> state_;                // [num_ranks]
  std::vector<std::atomic<bool>> knows_we_leave_;      // [num_ranks]
  std::vector<std::atomic<bool>> slot_free_;           // [num_ranks * kForwardSlots] at peers
  std::vector<std::atomic<std::uint64_t>> put_bytes_;  // [num_ranks]
  std::atomic<std::uint64_t> roll_calls_{0};
  std::vector<std::atomic<std::uint64_t>> answered_;  // [num_ranks] the latest of our calls that each answered
  std::vector<Expected> expected_;                    // proxy thread only
  Arrivals arrivals_;                                 // proxy thread only

  mutable std::mutex landed_mutex_;
  std::vector<LandedChunk> landed_;

  std::vector<int> peer_inbox_, peer_slots_;  // regions of the peers
  int staging_region_ = -1, low_latency_region_ = -1;
  std::array<std::atomic<std::uint64_t>, plan::kOperationsInFlight> low_latency_puts_{};  // epoch << 32 | puts
  std::latch open_{1};            // what arrives earlier waits, on the proxy's thread
  std::unique_ptr<Proxy> proxy_;  // last: its thread ends before what it uses
};

}  // namespace deep_ep::net
