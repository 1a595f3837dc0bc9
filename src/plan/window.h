// SPDX-License-Identifier: MIT
// A rank's window: the memory that its peers map and write. One place sizes and places every region; all ranks compute
// the same.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/config.h"
#include "plan/align.h"
#include "plan/macros.h"

namespace deep_ep::plan {

/// How many operations a rank may be ahead of what a peer has finished: the depth of the rings of words, announcements
/// and replies. One low-latency ticket may thus stay open across this many other operations.
inline constexpr int kOperationsInFlight = 16;

/// Words that peers write here, one set per (operation modulo kOperationsInFlight, peer). Each holds (epoch << 32 |
/// value) and only ever grows in epoch, so nothing is ever cleared. docs/protocol.md says who waits for which.
struct Words {
  std::uint64_t announced;  // the peer's call and counts lie in its announcement
  std::uint64_t replied;    // the peer said where its output begins
  std::uint64_t arrived;    // all that the peer sends in this operation is here; value: how much
  std::uint64_t finished;   // the peer has read all that it reads from this window in this operation
};

/// Offsets from the window's base.
//   [ doorbell | per peer: released, excluded | per operation and peer: words | announcements | replies | per ticket:
//   flags, lines (GPUs only) | low-latency slots | arena ]
struct WindowLayout {
  int num_ranks = 0;
  int num_tickets = 0;
  int max_slots = 0;

  std::size_t doorbell_at = 0;
  std::size_t released_at = 0;
  std::size_t excluded_at = 0;
  std::size_t words_at = 0;
  std::size_t announcements_at = 0;
  std::size_t replies_at = 0;
  std::size_t flags_at = 0;
  std::size_t lines_at = 0;
  std::size_t low_latency_at = 0;
  std::size_t arena_at = 0;
  std::size_t total_bytes = 0;

  std::size_t announcement_bytes = 0;
  std::size_t reply_bytes = 0;
  std::size_t low_latency_ticket_bytes = 0;
  std::size_t flags_of_ticket = 0;
  std::size_t line_bytes_of_ticket = 0;
  std::size_t arena_bytes = 0;

  static constexpr std::size_t kLine = 64;               // one cache line per word that one peer writes
  static constexpr std::size_t kAnnouncementHead = 512;  // fixed part: signature, offsets, the text of a refusal
  static constexpr std::size_t kReplyHead = 64;
  static constexpr std::size_t kPage = 4096;

  static WindowLayout place(const Config& config, int num_ranks, std::size_t arena_bytes);

  EP_HOST_DEVICE std::size_t released(int peer) const { return released_at + kLine * peer; }
  EP_HOST_DEVICE std::size_t excluded(int peer) const { return excluded_at + kLine * peer; }
  EP_HOST_DEVICE std::size_t words(std::uint64_t epoch, int peer) const { return words_at + kLine * pair(epoch, peer); }
  EP_HOST_DEVICE std::size_t announcement(std::uint64_t epoch, int peer) const {
    return announcements_at + announcement_bytes * pair(epoch, peer);
  }
  EP_HOST_DEVICE std::size_t reply(std::uint64_t epoch, int peer) const {
    return replies_at + reply_bytes * pair(epoch, peer);
  }
  EP_HOST_DEVICE std::size_t low_latency(int ticket) const {
    return low_latency_at + low_latency_ticket_bytes * ticket;
  }
  /// u32 each: the operation whose part has arrived. Nothing else ever lies there.
  EP_HOST_DEVICE std::size_t flags(int ticket) const { return flags_at + 4 * flags_of_ticket * ticket; }
  /// Small batches, plan/lines.h. Nothing else ever lies there.
  EP_HOST_DEVICE std::size_t lines(int ticket) const { return lines_at + line_bytes_of_ticket * ticket; }

 private:
  EP_HOST_DEVICE std::size_t pair(std::uint64_t epoch, int peer) const {
    return epoch % kOperationsInFlight * num_ranks + peer;
  }
};
static_assert(sizeof(Words) <= WindowLayout::kLine);

/// Config::arena_bytes, or its default for a machine with this much memory.
std::size_t arena_bytes_of(const Config& config, int num_ranks, std::size_t machine_bytes);

/// Memory of this machine.
std::size_t machine_bytes();

}  // namespace deep_ep::plan
