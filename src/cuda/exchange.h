// SPDX-License-Identifier: MIT
// What host code and kernels of the CUDA backend share: the structs in a window, in a rank's own device memory, in
// pinned host memory, and what every kernel is told. docs/protocol.md lists who writes what when.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"
#include "net/kernel_end.h"
#include "plan/divisor.h"
#include "plan/output.h"
#include "plan/window.h"

namespace deep_ep::cuda {

inline constexpr int kRefusalBytes = 256;

/// A call as its peers see it; counts follow at kAnnouncementHead: i32 tokens to each rank, i32 rows for each of the
/// receiver's slots.
struct Announcement {
  std::int64_t signature[Signature::kNumFields];
  std::uint64_t x_at, weights_at;  // combine: where rows and weights lie in the sender's window
  std::int64_t rows;               // so many
  // Combine, to a far rank on our rail: how many tokens we shall ask it for, and how their rows are added.
  std::int64_t requests;
  SumOrder order;
  bool factors;
  std::int64_t bad_selection;  // dispatch refused on the device: which entry of topk_idx, and what it holds
  std::int64_t bad_expert;
  char refusal[kRefusalBytes];
};
static_assert(sizeof(Announcement) <= plan::WindowLayout::kAnnouncementHead);

/// Values of the word `announced`.
enum Announced : std::uint32_t { kSame = 0, kBadExpert = 1, kRefusedByHost = 2 };

/// Where a receiver's output begins; first rows of the sender's selections in each slot follow at kReplyHead.
struct Reply {
  enum Verdict : std::uint64_t { kAccepted, kArenaTooSmall, kMoreThanMaxRows, kSlotTooSmall };
  std::uint64_t verdict;
  std::uint64_t needed, there;
  std::uint64_t block_at;
  std::int64_t rows, arrivals;
  std::int64_t first_arrival;
};
static_assert(sizeof(Reply) <= plan::WindowLayout::kReplyHead);

/// What went wrong first. Written by a kernel into pinned memory, read by the host once `kind` is set.
struct Fault {
  enum Kind : std::uint32_t {
    kNone,
    kTimeout,
    kDiffers,
    kBadId,
    kRefused,
    kNoRoom,
    kTooManyRows,
    kFullSlot,
    kGaveUp,
    kStray
  };
  std::uint32_t kind;
  std::int32_t phase;  // Operation
  std::int32_t peer;
  std::int32_t field;  // kDiffers: of the signature
  std::uint64_t epoch;
  // kDiffers: ours, theirs. kNoRoom, kTooManyRows, kFullSlot: needed, there. kBadId: at, expert. kStray: past the
  // last that is awaited, last
  std::int64_t expected, seen;
  std::int64_t num_topk, num_experts;  // of the call
  char refusal[kRefusalBytes];
};

/// Pinned host memory that kernels write and the host polls.
struct Mailbox {
  std::uint64_t counted;  // serial number of the last call whose rows are counted
  std::int64_t rows, arrivals;
  std::uint64_t completed;  // serial number of the last call whose last kernel has ended
  Fault fault;
};

/// What a rank tells each peer of itself, in the line `released` of its window.
struct Progress {
  std::uint64_t released;  // every operation up to this one is finished here: its places may be used again
  std::uint64_t sent;      // nothing is written for operations up to this one any more
};
static_assert(sizeof(Progress) <= plan::WindowLayout::kLine);

/// A rank's own words in device memory. Kernels of one buffer run one after the other, so only blocks of one kernel
/// meet here; the last block of an operation leaves counters at zero.
struct State {
  std::uint64_t epoch;  // operations begun; advanced on the device, so that graphs replay
  // By operation modulo kOperationsInFlight: the last one there that has ended, and the last that ended without all of
  // its data. Low-latency operations may end in any order.
  std::uint64_t ended[plan::kOperationsInFlight];
  std::uint64_t abandoned[plan::kOperationsInFlight];
  std::uint64_t released;      // as Progress says
  std::uint64_t deadline;      // of an operation of several kernels: the first one leaves it to the others
  std::uint32_t blocks_begun;  // low latency: the last block to have read `epoch` advances it
  std::uint64_t fault_epoch;   // the last operation that reported a fault: one record per operation
  std::uint32_t failed;        // the last operation that failed, its low bits
  std::uint32_t barrier;
  std::uint32_t blocks_done;
  std::uint32_t tickets[2];     // dispatch: taken by warps that write nearby or everywhere; by those that write far
  std::uint64_t bad_selection;  // 0: none, else 1 + lowest index in topk_idx
  std::int64_t rows, arrivals;  // notify -> dispatch
  std::int32_t full_slot_rows;  // kPadded: rows of a slot that would get more than it has room for; 0: none
};

struct Peer {
  std::byte* window;          // as this rank maps it. Far: pinned memory that stands for its control part
  std::byte* inbox;           // where the peer writes for us: our window. Far: pinned memory that the link fills
  std::int32_t active;        // not masked
  std::int32_t same_device;   // writes there do not cross a link
  std::int32_t far;           // shares no memory with us: what we write there goes with a signal, or a put
  std::int32_t inbox_region;  // far: numbers, in commands, of its forwarding slots
  std::int32_t slots_region;  // and of its low-latency slots
};

/// Commands that kernels have written, in device memory.
struct Pushed {
  unsigned long long commands;
  /// Low-latency puts, by operation modulo kOperationsInFlight: epoch << 32 | count.
  unsigned long long puts[plan::kOperationsInFlight];
};

/// Forwarding slots as this rank's kernels have used them, in device memory; compared with net::PeerWords.
struct SlotUse {
  std::uint32_t taken[plan::kForwardSlots];  // how often we took each slot of the peer
  std::uint32_t seen[plan::kForwardSlots];   // how many of the peer's chunks we took out of each of ours
};

/// What a dispatch has passed on for a far source, in device memory; its last block clears it.
struct PassedOn {
  std::uint32_t units;    // delivered
  std::uint32_t awaited;  // of the streams whose last chunk has come
  std::uint32_t streams;  // so many of these
  std::uint32_t all;      // everything is delivered, and our node knows
};

/// The way to far ranks (net/link.h), as kernels see it. Pinned host memory, where nothing else is said.
struct Far {
  net::KernelEnd* end = nullptr;     // null: there are no far ranks
  Pushed* pushed = nullptr;          // device memory
  PassedOn* passed_on = nullptr;     // device memory, [num_ranks]
  SlotUse* slot_use = nullptr;       // device memory, [num_ranks]
  std::byte* chunks = nullptr;       // chunks on their way, by rank and slot
  const std::byte* inbox = nullptr;  // chunks that have come, likewise
  std::size_t slot_bytes = 0;
  std::byte* staging = nullptr;  // low-latency data on its way, by ticket and rank
  std::byte* slots = nullptr;    // low-latency data that has come, by ticket
  std::int32_t chunk_region = 0, staging_region = 0;
};

/// What kernels count, in device memory; Statistics says what each number means.
struct Counters {
  Statistics::Peer* peers;       // [num_ranks]
  std::uint64_t* rows_per_slot;  // [max_slots]
  std::uint64_t* puts_while_packing;
};

/// What every kernel is told.
struct Common {
  State* state;
  Mailbox* mailbox;
  Counters counters;
  const Peer* peers;  // [num_ranks]
  Far far;
  plan::WindowLayout layout;
  plan::Divisor tickets;  // layout.num_tickets
  int rank;
  int num_ranks;
  Operation operation;
  std::uint64_t timeout_ns;
  std::uint64_t serial;
  std::int64_t signature[Signature::kNumFields];
};

}  // namespace deep_ep::cuda
