// SPDX-License-Identifier: MIT
// One rank's end of a host buffer: windows, epochs, waits, statistics. What the operations in this folder stand on.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "host/window.h"
#include "host/workers.h"
#include "net/doorbell.h"
#include "net/flag.h"
#include "net/link.h"
#include "plan/arena.h"
#include "plan/window.h"

namespace deep_ep::host {

using net::Clock;
using net::Deadline;
using net::Doorbell;
using net::Flag;
using net::LandedChunk;
using net::Link;
using net::Patience;

/// A call as its peers see it, written into each peer's window; counts follow: i32 tokens to each rank, i32 rows for
/// each of the receiver's slots.
struct Announcement {
  Signature signature;
  std::uint64_t x_at = 0;                         // combine: where its rows lie in the sender's window
  std::uint64_t weights_at = 0;                   // combine: likewise for weights that come home
  std::int64_t units = kNotOnRail;                // that the sender will put into the reader's forwarding slots
  static constexpr std::int64_t kNotOnRail = -1;  // none: another rank of the reader's node takes them
  std::int64_t rows = 0;                          // combine: that lie at x_at and weights_at
  std::int64_t tokens = 0;                        // combine: that the sender adds, as a home
  bool in_pieces = false;                         // combine: its rows come to x_at piece by piece
  SumOrder order;                                 // combine: in which the sender, as a home, adds
  bool factors = false;                           // combine: it weighs the rows
  std::int32_t first_slot_there = 0;              // low-latency dispatch: of the sender's, from which on the reader's
                                                  // rows come home (plan/home_slots.h)
  std::array<char, 312> refusal{};
};
static_assert(sizeof(Announcement) <= plan::WindowLayout::kAnnouncementHead);

/// Where a receiver's output begins; first rows of the sender's selections in each slot follow.
struct Reply {
  enum Verdict : std::uint64_t { kAccepted, kArenaTooSmall, kMoreThanMaxRows, kSlotTooSmall };
  std::uint64_t verdict = kAccepted;
  std::uint64_t needed = 0, there = 0;  // bytes or rows, where refused
  std::uint64_t block_at = 0;
  std::int64_t rows = 0, arrivals = 0;  // that the block is laid out for
  std::int64_t first_arrival = 0;       // of this sender
};
static_assert(sizeof(Reply) <= plan::WindowLayout::kReplyHead);

/// Where a rank finds itself.
struct Surroundings {
  bool needs_network = false;  // logical nodes share no memory: so configured, or because they are several machines
  int rank_here = 0;           // among the ranks of this machine
  int ranks_here = 1;
};

/// One operation in progress: its number, ring positions and deadline.
struct Epoch {
  Operation operation = Operation::kDispatch;
  std::uint64_t number = 0;
  int ticket = -1;  // low latency: which slots
  Deadline deadline;
};

class Context {
 public:
  explicit Context(const BackendInput& input);

  // Who and where
  // -----------------------------------------------------------------------------------------------------------------
  const int rank;
  const int num_ranks;
  const plan::Topology topology;
  const Config config;

  /// Of a rank of our node.
  std::byte* window(int of) const { return windows_[of]->base(); }
  /// The way to ranks that share no memory with us; null where there are none.
  Link* link() const { return link_.get(); }
  bool is_far(int peer) const { return link_ && link_->reaches(peer); }
  const plan::WindowLayout& layout() const { return layout_; }
  /// Low-latency slots of one ticket, in the owner's window or, where that is far, in memory that stands for them.
  std::byte* low_latency(int owner, int ticket) const {
    return is_far(owner) ? link_->low_latency(owner, ticket) : window(owner) + layout_.low_latency(ticket);
  }
  Announcement& announcement(int owner, std::uint64_t epoch, int writer) const {
    return *reinterpret_cast<Announcement*>(control(owner) + layout_.announcement(epoch, writer));
  }
  std::int32_t* announced_tokens(int owner, std::uint64_t epoch, int writer) const {
    return reinterpret_cast<std::int32_t*>(control(owner) + layout_.announcement(epoch, writer) +
                                           plan::WindowLayout::kAnnouncementHead);
  }
  std::int32_t* announced_rows(int owner, std::uint64_t epoch, int writer) const {
    return announced_tokens(owner, epoch, writer) + num_ranks;
  }
  Reply& reply(int owner, std::uint64_t epoch, int writer) const {
    return *reinterpret_cast<Reply*>(control(owner) + layout_.reply(epoch, writer));
  }
  std::int32_t* reply_first_rows(int owner, std::uint64_t epoch, int writer) const {
    return reinterpret_cast<std::int32_t*>(control(owner) + layout_.reply(epoch, writer) +
                                           plan::WindowLayout::kReplyHead);
  }

  // Epochs
  // ------------------------------------------------------------------------------------------------------------------------
  /// Takes the next number and waits until every peer has room for it in its rings (and slots).
  Epoch begin(Operation operation, std::chrono::milliseconds timeout);
  /// This rank reads nothing of that operation any more. Peers may then use its places again.
  void finish(const Epoch& epoch);
  /// A low-latency operation that ends without its data (timeout, dropped ticket): finished once all data has come.
  void abandon(const Epoch& epoch);

  // Flags
  // -------------------------------------------------------------------------------------------------------------------------
  /// Writes a flag in a peer's window, after everything written to that window before. Peers of other nodes get what it
  /// publishes with it: the first `payload_bytes` of our announcement or reply to them.
  void publish(int peer, Flag flag, const Epoch& epoch, std::uint32_t value, std::size_t payload_bytes = 0);
  /// That all of a low-latency operation's data for the peer is written, which took so many puts if it is far.
  void publish_low_latency(int peer, const Epoch& epoch, std::uint32_t value, std::uint64_t puts);
  /// In the place of a rank of another node, whose rows we passed on to a peer of ours.
  void publish_arrived_for(int writer, int peer, const Epoch& epoch);
  /// Waits for a flag in our own window; returns its value. Throws kTimeout: `expected` is for its message.
  std::uint32_t await(Flag flag, const Epoch& epoch, int peer, std::uint64_t expected);
  /// Likewise, until the value, which only grows in this operation, is at least `count`.
  void await_count(Flag flag, const Epoch& epoch, int peer, std::uint32_t count);
  /// Waits until `ready` holds. Where it does not, the error names `blame()`, a rank that keeps us waiting.
  void await_any(const Epoch& epoch, const std::function<bool()>& ready, const std::function<int()>& blame);
  /// The peer has left this operation, in time or not.
  bool has_released(int peer, std::uint64_t epoch) const;
  /// Throws where a peer of our node has given this operation up: what we read of its memory since may be something
  /// else. The error names whom it gave up on, where that is known.
  void require_there(const Epoch& epoch, int peer);
  /// After reading what a peer of our node keeps in its window for this operation: a peer that has masked us does not
  /// wait for us, and may have needed that memory for another. Throws then.
  void require_kept(const Epoch& epoch, int peer);
  /// Writes our announcement to every active rank. Counts, where there are any, go first, by the caller.
  void announce(const Epoch& epoch, const Announcement& announcement, std::uint32_t value = 0);
  void announce_to(int peer, const Epoch& epoch, const Announcement& announcement, std::uint32_t value = 0);
  /// Whether that announcement is there, and no refusal. `owner` and `writer` are ranks of our node, which share its
  /// memory.
  bool has_announced(int owner, const Epoch& epoch, int writer) const;
  /// Where ranks share cores: lets others run for a moment, or until `enough`. Waits for nobody.
  void let_others_come(std::chrono::microseconds moment, const std::function<bool()>& enough) const;
  /// Waits for the peer's announcement and checks that its call is the same as ours. Throws if it refused, or differs.
  void await_announcement(const Epoch& epoch, int peer, const Signature& ours);
  /// Runs `wait`, which waits for the peer until its deadline. False where it stayed silent and, `mask_silent` being
  /// set, is masked now, as is whoever else is found dead meanwhile; otherwise the error goes on.
  bool came(int peer, bool mask_silent, const std::function<void()>& wait);
  /// Ranks that take part: all but the masked ones.
  std::vector<int> active_ranks() const;
  void refuse(Operation operation, const std::string& why);
  static constexpr std::uint32_t kRefused = 1;  // value of `announced` where the peer refused

  // Memory
  // ------------------------------------------------------------------------------------------------------------------------
  plan::Arena& arena() { return *arena_; }
  /// A block for what no peer writes, until half of the arena is taken: the rest is for rows that come from peers. Then
  /// one without owner.
  plan::Arena::Block spare_block(std::size_t bytes);
  /// Memory for a result: a spare block, whose pages are warm, else ordinary memory.
  std::shared_ptr<void> output_memory(std::size_t bytes);
  Tensor output(DType dtype, std::initializer_list<std::int64_t> shape);
  /// Keeps a block until every peer has left the operation: after a timeout one may still write or read it.
  void quarantine(const Epoch& epoch, std::shared_ptr<void> block);
  /// Keeps a block that peers read until they have left the operation. For a masked one no longer than until the
  /// operation's places are needed again: see require_kept.
  void keep_for_readers(const Epoch& epoch, std::shared_ptr<void> block);

  // Work
  // --------------------------------------------------------------------------------------------------------------------------
  Workers& workers() { return *workers_; }

  void set_masked(int rank, bool masked);
  bool masked(int rank) const;
  std::vector<char> masked_ranks() const;  // [num_ranks]
  /// The peer has masked this rank: what we write there is not read, and may be in the way.
  bool excluded_by(int peer) const;

  Statistics statistics() const;
  void reset_statistics();
  template <typename Change>
  void count(const Change& change) {
    std::lock_guard lock(mutex_);
    change(statistics_);
  }

 private:
  struct Pending {
    Epoch epoch;
    enum { kOpen, kAbandoned, kDone } state = kOpen;
  };
  Doorbell& doorbell(int of) const { return *reinterpret_cast<Doorbell*>(window(of) + layout_.doorbell_at); }
  /// What we write for `owner` lies in its window, or far away in the mirror that stands for it.
  std::byte* control(int owner) const { return is_far(owner) ? link_->mirror(owner) : window(owner); }
  std::uint64_t& word(int owner, Flag flag, std::uint64_t epoch, int writer) const {
    return *reinterpret_cast<std::uint64_t*>(control(owner) + place_of(layout_, flag, epoch, writer));
  }
  void store_for_good(int peer, Flag flag, std::uint64_t value);
  void await_room(const Epoch& epoch, int peer, std::uint64_t needed);
  void await_own_room(const Epoch& epoch, std::uint64_t needed);
  void advance_released();
  bool has_arrived_or_left(const Epoch& epoch, int peer) const;
  bool everybody_is_through(const Epoch& epoch) const;
  void retire(std::uint64_t up_to);
  void sweep_kept_blocks();
  template <typename Ready>
  bool wait(const Epoch& epoch, int peer, bool& peer_gone, const Ready& ready);
  [[noreturn]] void throw_timeout(const Epoch& epoch, int peer, std::uint64_t expected, std::uint64_t seen, bool gone);
  int find_dead(int peer);

  plan::WindowLayout layout_;
  const Surroundings around_;
  std::vector<std::shared_ptr<Window>> windows_;  // null: of far ranks
  std::vector<ProcessWatch> processes_;           // of far ranks: unknown
  std::unique_ptr<Link> link_;
  std::shared_ptr<plan::Arena> arena_;
  std::unique_ptr<Workers> workers_;
  Patience patience_;

  mutable std::mutex mutex_;  // guards everything below: tickets may be received on any thread
  std::uint64_t last_epoch_ = 0;
  std::uint64_t released_ = 0;                // every operation up to this one is finished here
  std::uint64_t retired_ = 0;                 // what was kept for peers up to this one may be written over
  std::map<std::uint64_t, Pending> pending_;  // the others, by number
  using KeptBlocks = std::map<std::uint64_t, std::vector<std::shared_ptr<void>>>;  // by operation
  KeptBlocks quarantine_, read_by_peers_;
  std::vector<char> masked_;
  std::uint64_t mask_changes_ = 0;
  std::vector<std::uint64_t> network_bytes_before_;  // the statistics were reset
  Statistics statistics_;
};

/// Ends an operation that needs no data after its call, however the call ends.
class FinishAtExit {
 public:
  FinishAtExit(Context& context, const Epoch& epoch) : context_(context), epoch_(epoch) {}
  ~FinishAtExit() { context_.finish(epoch_); }
  FinishAtExit(const FinishAtExit&) = delete;
  FinishAtExit& operator=(const FinishAtExit&) = delete;

 private:
  Context& context_;
  const Epoch& epoch_;
};

}  // namespace deep_ep::host
