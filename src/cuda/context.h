// SPDX-License-Identifier: MIT
// One rank's end of a CUDA buffer: windows, device memory, what kernels are told, and what they report.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda/kernels.h"
#include "cuda/own_stream.h"
#include "cuda/returns.h"
#include "cuda/window.h"
#include "net/link.h"
#include "plan/arena.h"

namespace deep_ep::cuda {

/// A placement's tables in device memory.
struct DevicePlacement {
  std::shared_ptr<const Placement> placement;  // the key, kept so that its address is not reused
  std::shared_ptr<void> memory;
  std::shared_ptr<std::byte> source;  // pinned: what is copied there
  plan::PlacementView view;
  const std::int32_t* first_copy = nullptr;  // [num_ranks + 1]
  int num_copies = 0;
  int even = 0;  // so many experts on each rank, one after the other, one copy of each; 0: the tables say
};

/// One call as the host sees it.
struct Call {
  Operation operation = Operation::kDispatch;
  cudaStream_t stream = nullptr;
  bool wait = false;       // the caller gave no stream: complete before returning
  bool capturing = false;  // into a graph: nothing may be waited for
  int blocks = 1;
  std::uint64_t number = 0;  // of the operation, among this rank's calls
  std::uint64_t serial = 0;  // of its last kernel's launch
  std::chrono::milliseconds timeout{0};
};

class Context {
 public:
  explicit Context(const BackendInput& input);
  ~Context();

  const int rank;
  const int num_ranks;
  const int device;
  const plan::Topology topology;
  const Config config;

  /// Begins a call: raises what an earlier one found out late (told to the peers as a refusal), orders the stream.
  Call begin(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers);
  /// Begins work of this rank alone, which is no operation and has no epoch.
  Call begin_local(Stream stream);
  Common common(const Call& call, const Signature& signature) const;
  /// After a kernel of a call was launched: what other streams do next waits for it. Throws launch errors.
  void launched(const Call& call);
  /// After the last kernel of a call. Throws launch errors; where the call waits, what its kernels reported.
  void end(const Call& call);
  /// After a kernel that sends: as end(), but what it reported is raised when its ticket is received.
  void end_sending(const Call& call);
  /// The same call again, to receive: no operation of its own.
  Call resume(const Call& sent);
  /// Low-latency tickets, for the check that their slots are not needed before they are received.
  void open_ticket(const Call& sent) { open_tickets_.insert(sent.number); }
  void close_ticket(const Call& sent) { open_tickets_.erase(sent.number); }
  /// Held by whoever makes a call or receives a ticket: tickets may be received on any thread.
  std::recursive_mutex& calls() { return calls_; }
  /// Waits until the kernel has counted what comes; throws what it reported.
  void await_counts(const Call& call);
  void refuse(Operation operation, const std::string& why);
  /// The same for a call that has begun and cannot go on.
  void refuse(const Call& begun, const std::string& why);
  void check();
  /// Raises what a call that has ended reported.
  void raise_late() { raise_fault(); }

  /// The way to ranks that share no memory with us; null where there are none.
  const net::Link* link() const { return link_.get(); }
  const plan::WindowLayout& layout() const { return layout_; }
  std::byte* window() const { return windows_[rank]->base(); }
  plan::Arena& arena() { return *arena_; }
  /// A block of the arena; after what is in doubt was settled, if that is what it takes.
  plan::Arena::Block arena_block(std::size_t bytes, bool anywhere, const Call& call);
  plan::Arena::Block arena_block(std::size_t bytes, bool anywhere);
  /// Of what has pages already, up to `most` bytes, to be settled.
  plan::Arena::Block arena_reservation(std::size_t most);
  /// What arena_block() had at most, in one piece, where it had too little.
  std::size_t arena_room() const;
  /// Keeps a block until the call that uses it is known to have ended well.
  void keep_in_doubt(const Call& call, std::shared_ptr<void> block);
  /// The call offered its block to nobody: it may go at once.
  void not_in_doubt(const Call& call);
  /// Memory of this device that only this rank uses; ordered as the buffer's calls are: enqueued calls may still use
  /// what their host code has dropped.
  std::shared_ptr<void> local(std::size_t bytes);
  /// Owners in the hands of a caller whose work on `user` is not ordered with our calls.
  std::shared_ptr<void> lend(std::vector<std::shared_ptr<void>> owners, Stream user) {
    return returns_->lend(std::move(owners), static_cast<cudaStream_t>(user));
  }
  Tensor local_tensor(DType dtype, std::initializer_list<std::int64_t> shape);
  /// Memory for what a call gives back: of the arena while there is room, else as local(). What a captured call took
  /// goes to other captured calls alone when it is dropped: its graph may write there again.
  std::shared_ptr<void> output_memory(std::size_t bytes, const Call& call);

  /// Before the kernels of a call, in the order of its stream.
  const DevicePlacement& on_device(const std::shared_ptr<const Placement>& placement, const Call& call);
  const std::int32_t* node_of_rank() const { return nodes_; }
  std::int64_t counted_rows() const { return mailbox_->rows; }
  std::int64_t counted_arrivals() const { return mailbox_->arrivals; }
  /// [slots + 1], as slot_first_row of the handle.
  const std::int32_t* counted_first_row() const { return first_row_; }
  std::int32_t* device_first_row() const { return device_first_row_; }
  int shared_limit() const { return shared_limit_; }
  const plan::Neighbourhood& neighbourhood() const { return neighbourhood_; }
  void copy(void* dst, const void* src, std::size_t bytes, cudaMemcpyKind kind) const;

  void set_masked(int peer, bool masked);
  bool masked(int peer) const { return peers()[peer].active == 0; }
  /// For a kernel that may mask a rank by itself: from now on the device knows best who is masked.
  Peer* silencing_peers() {
    kernels_mask_ = true;
    return device_peers_;
  }
  Statistics statistics() const;
  void reset_statistics();
  /// A call with so many slots of ours: Statistics shows as many.
  void show_slots(int num_slots);
  template <typename Change>
  void count(const Change& change) {
    std::lock_guard lock(mutex_);
    change(statistics_);
  }

 private:
  struct Doubt {
    std::uint64_t serial;
    std::shared_ptr<void> block;
  };
  // A block in doubt when a fault was found. Kept until its call has ended and every peer has left it.
  struct Quarantined {
    Doubt of;
    std::optional<std::uint64_t> epoch;  // at which the call had ended; none: it has not yet
  };
  // Device memory that grows as it is needed.
  struct Slabs {
    std::size_t first;  // bytes of the first one
    std::vector<std::shared_ptr<plan::Arena>> all = {};
  };
  void place_own_memory();
  void open_windows(Bootstrap& group);
  void open_link(Bootstrap& group);
  bool is_far(int peer) const { return needs_network_ && !topology.same_node(rank, peer); }
  bool is_gone(int peer) const { return windows_[peer] ? windows_[peer]->owner_gone() : link_->dead(peer); }
  bool grow_arena(std::size_t upto);
  void prepare_kernels();
  void upload_peers();
  std::vector<Peer> peers() const;
  std::uint64_t completed() const;
  std::size_t counters_bytes() const;
  bool fault_waits() const;
  bool take_fault(Fault& fault);
  [[noreturn]] void raise(const Fault& fault);
  [[noreturn]] void raise_timeout(const Fault& fault);
  void raise_fault();
  void sweep();
  void quarantine_doubts();
  void sweep_quarantine(std::uint64_t done);
  std::shared_ptr<void> piece_of(Slabs& slabs, std::size_t bytes);
  std::shared_ptr<void> kept(std::shared_ptr<void> owner);
  Call plain_call(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers);
  void take_turn(Call& call);
  void count_launch(Call& call);
  void refuse_where_tickets_are_open(const Call& call);
  void launch_refusal(const Call& call, const std::string& why);

  plan::WindowLayout layout_;
  bool needs_network_ = false;  // logical nodes share no memory: so configured, or no fabric joins them
  std::vector<std::shared_ptr<Window>> windows_;  // null: of far ranks
  std::shared_ptr<plan::Arena> arena_;
  Slabs local_{std::size_t{32} << 20};
  Slabs tables_{std::size_t{2} << 20};           // what the host fills in mid-call: no call ever used it before
  std::shared_ptr<Returns> returns_;             // memory that callers have dropped
  bool capturing_ = false;                       // this call goes into a graph,
  std::vector<std::shared_ptr<void>> captured_;  // which then keeps all memory that the call took
  std::map<const Placement*, DevicePlacement> placements_;
  std::vector<Peer> peers_;
  Sharing sharing_ = Sharing::kDescriptor;
  std::shared_ptr<std::byte> on_device_, pinned_;  // where the next ones lie
  Peer* device_peers_ = nullptr;
  bool kernels_mask_ = false;
  std::int32_t* nodes_ = nullptr;
  State* state_ = nullptr;
  Mailbox* mailbox_ = nullptr;
  Mailbox* device_mailbox_ = nullptr;  // the same, as kernels see it
  std::int32_t* first_row_ = nullptr;  // counts that the host reads
  std::int32_t* device_first_row_ = nullptr;
  Counters counters_{};  // one piece that begins with the peers
  Far far_;
  std::optional<OwnStream> stream_;  // of calls that bring none
  std::optional<OwnStream> copies_;  // set-up copies, never part of a capture
  cudaEvent_t last_done_ = nullptr;
  cudaStream_t last_stream_ = nullptr;
  int default_blocks_ = 1, most_blocks_ = 1;
  int shared_limit_ = 0;
  bool no_pages_ = false;  // the last block that was asked for found addresses, but no memory for them
  int low_latency_blocks_ = 1;
  plan::Neighbourhood neighbourhood_;
  std::uint64_t serial_ = 0;
  std::uint64_t operations_ = 0;
  std::set<std::uint64_t> open_tickets_;  // numbers of their operations
  struct GraphMemory;                     // dropped by captured calls
  std::shared_ptr<GraphMemory> graph_memory_;
  std::recursive_mutex calls_;
  std::deque<Doubt> in_doubt_;
  std::vector<Quarantined> quarantine_;

  mutable std::mutex mutex_;
  Statistics statistics_;

  std::shared_ptr<std::byte> far_control_, far_slots_, kernel_end_;  // pinned
  net::Doorbell doorbell_;
  std::unique_ptr<net::Link> link_;  // last: its thread ends before what it uses
};

}  // namespace deep_ep::cuda
