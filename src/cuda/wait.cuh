// SPDX-License-Identifier: MIT
// Waiting on the device: every wait has a deadline, and the first that passes it leaves one record for the host.
#pragma once

#include "cuda/counters.cuh"
#include "cuda/exchange.h"
#include "cuda/ptx.cuh"

namespace deep_ep::cuda {

/// One operation as a thread sees it. Functions that are not inlined take it by value: what has an address lives in
/// memory, and would be read again, with the kernel's parameters that it leads to, behind every fence and every line
/// that is looked at; a fence has just emptied the cache.
struct Now {
  const Common& common;
  std::uint64_t epoch;
  std::uint64_t deadline;

  __device__ explicit Now(const Common& given) : Now(given, given.state->epoch + 1) {}
  __device__ Now(const Common& given, std::uint64_t number)
      : common(given), epoch(number), deadline(ptx::nanoseconds() + given.timeout_ns) {}
  /// In one of several kernels of an operation: all have the deadline of the first, which keeps it for them.
  enum class Kernel { kFirst, kLater };
  __device__ Now(const Common& given, Kernel kernel)
      : common(given),
        epoch(given.state->epoch + 1),
        deadline(kernel == Kernel::kLater ? given.state->deadline : ptx::nanoseconds() + given.timeout_ns) {}
  __device__ void keep_deadline() const {
    if (blockIdx.x == 0 && threadIdx.x == 0) common.state->deadline = deadline;
  }

  __device__ std::byte* window(int of) const { return common.peers[of].window; }
  __device__ bool active(int peer) const { return common.peers[peer].active != 0; }
  // Where nobody is far that is known without a look at memory.
  __device__ bool far(int peer) const { return common.far.end != nullptr && common.peers[peer].far != 0; }
  /// Where `writer` writes for `owner`; one of them is this rank.
  __device__ std::byte* control(int owner, int writer) const {
    if (common.far.end == nullptr || owner != common.rank) return common.peers[owner].window;
    return common.peers[writer].inbox;
  }
  /// Words, announcement and reply that `writer` writes in the window of `owner`.
  __device__ plan::Words& words(int owner, int writer) const {
    return *reinterpret_cast<plan::Words*>(control(owner, writer) + common.layout.words(epoch, writer));
  }
  __device__ Announcement& announcement(int owner, int writer) const {
    return *reinterpret_cast<Announcement*>(control(owner, writer) + common.layout.announcement(epoch, writer));
  }
  __device__ std::int32_t* announced_tokens(int owner, int writer) const {
    return reinterpret_cast<std::int32_t*>(control(owner, writer) + common.layout.announcement(epoch, writer) +
                                           plan::WindowLayout::kAnnouncementHead);
  }
  __device__ std::int32_t* announced_rows(int owner, int writer) const {
    return announced_tokens(owner, writer) + common.num_ranks;
  }
  __device__ Reply& reply(int owner, int writer) const {
    return *reinterpret_cast<Reply*>(control(owner, writer) + common.layout.reply(epoch, writer));
  }
  __device__ std::int32_t* reply_first_rows(int owner, int writer) const {
    return reinterpret_cast<std::int32_t*>(control(owner, writer) + common.layout.reply(epoch, writer) +
                                           plan::WindowLayout::kReplyHead);
  }
  __device__ Progress& progress(int owner, int writer) const {
    return *reinterpret_cast<Progress*>(control(owner, writer) + common.layout.released(writer));
  }
  __device__ std::uint64_t* released(int owner, int writer) const { return &progress(owner, writer).released; }
};

/// Marks the operation as failed; the first to say so in an operation writes the record, unless an older one still
/// waits for the host.
__device__ __noinline__ inline void report(Now now, Fault::Kind kind, int peer, std::int64_t expected,
                                           std::int64_t seen, int field = 0, const char* refusal = nullptr) {
  atomicExch(&now.common.state->failed, static_cast<std::uint32_t>(now.epoch));
  const auto epoch = static_cast<unsigned long long>(now.epoch);
  if (atomicExch(reinterpret_cast<unsigned long long*>(&now.common.state->fault_epoch), epoch) == epoch) return;
  volatile Fault& fault = now.common.mailbox->fault;
  if (fault.kind != Fault::kNone) return;
  fault.phase = static_cast<std::int32_t>(now.common.operation);
  fault.peer = peer;
  fault.field = field;
  fault.epoch = now.epoch;
  fault.expected = expected;
  fault.seen = seen;
  fault.num_topk = now.common.signature[Signature::kTopk];
  fault.num_experts = now.common.signature[Signature::kExperts];
  for (int i = 0; i < kRefusalBytes; ++i) fault.refusal[i] = refusal != nullptr ? refusal[i] : '\0';
  ptx::fence_system();  // the record, then the mark that it is there
  fault.kind = kind;
}

/// Some block has reported a failure of this operation.
__device__ inline bool has_failed(const Now& now) {
  return ptx::load_acquire(&now.common.state->failed) == static_cast<std::uint32_t>(now.epoch);
}

/// The same where an acquire has come before, and a fence comes next: nobody waits for it alone.
__device__ inline bool has_failed_relaxed(const Now& now) {
  return ptx::load_relaxed_system(&now.common.state->failed) == static_cast<std::uint32_t>(now.epoch);
}

/// Between nodes: a rank that takes part is known to have ended. Everybody may wait for it, through whomever.
__device__ __noinline__ inline bool somebody_died(Now now) {
  net::KernelEnd& end = *now.common.far.end;
  if (ptx::load_acquire_system(&end.deaths) == 0) return false;
  for (int peer = 0; peer < now.common.num_ranks; ++peer)
    if (now.active(peer) && __ldcv(&end.peers()[peer].dead) != 0) return true;
  return false;
}

/// Whoever has looked so often waits no longer: the deadline has passed, or somebody has died. Looked for seldom,
/// because it lies in the host's memory.
inline constexpr int kLooksBetweenDeaths = 256;
__device__ inline bool is_over(const Now& now, int looks) {
  if (ptx::nanoseconds() > now.deadline) return true;
  return looks % kLooksBetweenDeaths == 0 && now.common.far.end != nullptr && somebody_died(now);
}

/// Waits until the epoch of a word in our own window has come; its value then, or nothing after the deadline. The
/// acquire pairs with publish(). `count_for`: the peer that the wait is counted for, or -1: another block counts it.
__device__ inline bool await(const Now& now, const std::uint64_t* word, std::uint32_t& value, int count_for) {
  std::uint64_t seen = ptx::load_acquire_system(word);
  if (seen >> 32 < now.epoch) {
    const std::uint64_t start = ptx::nanoseconds();
    for (int looks = 1; seen >> 32 < now.epoch && !is_over(now, looks); ++looks) seen = ptx::load_acquire_system(word);
    if (count_for >= 0) count_wait(now.common, count_for, ptx::nanoseconds() - start);
    if (seen >> 32 < now.epoch) return false;
  }
  value = static_cast<std::uint32_t>(seen);
  return true;
}

/// Where every block waits for a peer, the first one counts.
__device__ inline int counted_once(int peer) { return blockIdx.x == 0 ? peer : -1; }

/// Writes a word in a peer's window. Release: whoever acquires it sees what this thread wrote and what it acquired.
__device__ inline void publish(const Now& now, std::uint64_t* word, std::uint32_t value) {
  ptx::store_release_system(word, now.epoch << 32 | value);
}

/// The same behind a fence of the whole system that this thread has made.
__device__ inline void publish_fenced(const Now& now, std::uint64_t* word, std::uint32_t value) {
  ptx::store_relaxed_system(word, now.epoch << 32 | value);
}

/// The same for two words at once: the fence before them makes both stores releases, and is waited for once.
__device__ inline void publish(const Now& now, std::uint64_t* first, std::uint32_t value, std::uint64_t* second,
                               std::uint32_t second_value) {
  ptx::fence_system();
  publish_fenced(now, first, value);
  publish_fenced(now, second, second_value);
}

/// The operation that used our places in the peers' windows last, `depth` operations ago; 0: none.
__device__ inline std::uint64_t place_before(const Now& now, int depth) {
  return now.epoch > static_cast<std::uint64_t>(depth) ? now.epoch - depth : 0;
}

/// One thread: the peer has left that operation.
__device__ __noinline__ inline bool await_room(Now now, int peer, int depth = plan::kOperationsInFlight) {
  const std::uint64_t needed = place_before(now, depth);
  std::uint64_t seen = 0;
  for (int looks = 1; (seen = ptx::load_acquire_system(now.released(now.common.rank, peer))) < needed; ++looks) {
    if (is_over(now, looks)) {
      report(now, Fault::kTimeout, peer, static_cast<std::int64_t>(needed), static_cast<std::int64_t>(seen));
      return false;
    }
  }
  return true;
}

/// One thread: the first field of the peer's call that is not ours, or -1. All are read before any is looked at.
__device__ __forceinline__ int differing_field(const Now& now, const Announcement& theirs) {
  int differs = -1;
#pragma unroll
  for (int field = Signature::kNumFields - 1; field >= 0; --field)
    if (theirs.signature[field] != now.common.signature[field]) differs = field;
  return differs;
}

/// One thread: the call that the peer has announced is ours.
__device__ __noinline__ inline bool is_same_call(Now now, int peer, std::uint32_t value) {
  const Announcement& theirs = now.announcement(now.common.rank, peer);
  if (value == kBadExpert) {
    report(now, Fault::kBadId, peer, theirs.bad_selection, theirs.bad_expert);
    return false;
  }
  if (value == kRefusedByHost) {
    report(now, Fault::kRefused, peer, 0, 0, 0, theirs.refusal);
    return false;
  }
  const int differs = differing_field(now, theirs);
  if (differs < 0) return true;
  report(now, Fault::kDiffers, peer, now.common.signature[differs], theirs.signature[differs], differs);
  return false;
}

/// One thread: the peer's announcement has come and its call is ours.
__device__ inline bool await_same_call(const Now& now, int peer) {
  std::uint32_t value = 0;
  if (!await(now, &now.words(now.common.rank, peer).announced, value, counted_once(peer))) {
    report(now, Fault::kTimeout, peer, 1, 0);
    return false;
  }
  return is_same_call(now, peer, value);
}

/// All blocks of the grid meet. Every thread calls it; false after the deadline. They are resident together (the grid
/// is at most the SMs that this rank may take), so only a foreign kernel that holds SMs can delay it.
__device__ inline bool grid_barrier(const Now& now) {
  __syncthreads();  // orders this block's writes before thread 0's release
  __shared__ bool met;
  if (threadIdx.x == 0) {
    std::uint32_t* count = &now.common.state->barrier;
    ptx::add_acquire_release(count, 1);
    met = true;
    while (ptx::load_acquire(count) < gridDim.x) {
      if (ptx::nanoseconds() <= now.deadline) continue;
      report(now, Fault::kTimeout, now.common.rank, gridDim.x, 0);
      met = false;
      break;
    }
  }
  __syncthreads();
  return met;
}

/// Every thread calls it at the end of its block's work; true in the block that is last. What the blocks wrote before
/// is then released by whatever that block publishes: each block's writes are ordered by the block barrier before
/// thread 0's system fence and its acquire-release addition, and that chain is transitive.
__device__ inline bool last_block(const Now& now) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::fence_system();
    last = ptx::add_acquire_release(&now.common.state->blocks_done, 1) + 1 == gridDim.x;
  }
  __syncthreads();
  return last;
}

}  // namespace deep_ep::cuda
