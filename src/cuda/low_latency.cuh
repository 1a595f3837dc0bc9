// SPDX-License-Identifier: MIT
// What both low-latency kernels are made of: opening an operation, the flags of parts, sixteen bytes at a time.
#pragma once

#include "cuda/low_latency.h"
#include "cuda/progress.cuh"
#include "plan/lines.h"

namespace deep_ep::cuda {

inline constexpr int kLowLatencyWarps = 16;
inline constexpr int kLowLatencyThreads = kLowLatencyWarps * 32;

/// A thread's place in the grid. Work is spread over the blocks first: few messages get an SM each.
struct Place {
  int warp = static_cast<int>(threadIdx.x / 32);
  int lane = static_cast<int>(threadIdx.x % 32);
  int block = static_cast<int>(blockIdx.x);
  int blocks = static_cast<int>(gridDim.x);
  __device__ int warps() const { return blocks * kLowLatencyWarps; }
  /// Which blocks have something else to do: the last one tells the peers of our call and hears of theirs, the one
  /// before tells them how far we are.
  __device__ bool speaks() const { return block == blocks - 1; }
  __device__ bool tells() const { return block == (blocks > 1 ? blocks - 2 : 0); }
  /// Of this warp among all. Warps of those blocks, and of the first `busy`, come last: what they have to do first
  /// would hold up a row.
  __device__ int number(int busy = 0) const { return turn(kLowLatencyWarps, busy).of(warp); }

  /// Numbers where `warps` of each block take part.
  struct Turn {
    int first, step;  // of the block's warps
    __device__ int of(int warp) const { return first + warp * step; }
    /// How many of `warps` have a number below `units`.
    __device__ int below(int units, int warps) const {
      return units <= first ? 0 : min((units - first + step - 1) / step, warps);
    }
  };
  __device__ Turn turn(int warps, int busy = 0) const {
    const int free = blocks - busy - 2, index = block - busy;
    if (free <= 0) return {block, blocks};
    if (index >= 0 && index < free) return {index, free};
    return {free * warps + (index < 0 ? block : block - free), blocks - free};
  }
};

/// Kernel parameters are fetched line by line as they are first used, and a line that is not there is waited for. At
/// the start each warp asks for others: they come side by side.
template <class Params>
__device__ __forceinline__ void fetch_parameters(const Params& p) {
  constexpr unsigned kLine = 64, kLines = (sizeof(Params) + kLine - 1) / kLine;
  constexpr unsigned kOfWarp = (kLines + kLowLatencyWarps - 1) / kLowLatencyWarps;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(&p);
  unsigned char byte[kOfWarp];
#pragma unroll
  for (unsigned i = 0; i < kOfWarp; ++i) {  // all are asked for before the first is waited for
    const unsigned line = threadIdx.x / 32 + i * kLowLatencyWarps;
    byte[i] = line < kLines ? bytes[line * kLine] : 0;
  }
#pragma unroll
  for (unsigned i = 0; i < kOfWarp; ++i) asm volatile("" ::"r"(static_cast<unsigned>(byte[i])));
}

/// A thread's turn at what any may do: the first warps have rows to move, the last three words to say; first come
/// those before these, from the last one on.
inline constexpr int kSpeakingWarps = 3;
__device__ inline int idle_turn() {
  constexpr int kFirst = kLowLatencyThreads - 32 * kSpeakingWarps - 1;
  return (kFirst + kLowLatencyThreads - static_cast<int>(threadIdx.x)) % kLowLatencyThreads;
}

/// The peers as a block keeps them in shared memory: looked up for every row.
struct Peers {
  Peer* of;
  __device__ std::byte* window(int rank) const { return of[rank].window; }
  __device__ std::byte* inbox(int rank) const { return of[rank].inbox; }
  __device__ bool active(int rank) const { return of[rank].active != 0; }
  __device__ bool far(int rank) const { return of[rank].far != 0; }
  /// Takes part, and shares memory with us.
  __device__ bool near(int rank) const { return of[rank].active != 0 && of[rank].far == 0; }
  /// Every thread of the block, first those of the warps that have least to do; a barrier must follow.
  __device__ void load(const Common& common) const {
#pragma unroll 1
    for (int peer = idle_turn(); peer < common.num_ranks; peer += kLowLatencyThreads) of[peer] = common.peers[peer];
  }
};

__device__ __forceinline__ uint4 load16(const std::byte* at) { return __ldcg(reinterpret_cast<const uint4*>(at)); }
__device__ __forceinline__ void store16(std::byte* at, uint4 v) { *reinterpret_cast<uint4*>(at) = v; }

template <typename T>
__device__ __forceinline__ T* from_lane(T* pointer, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Operations
// ---------------------------------------------------------------------------------------------------------------------

/// How many operations lie between two uses of the same slots.
__device__ inline int slots_depth(const Common& common) {
  return common.layout.num_tickets < plan::kOperationsInFlight ? common.layout.num_tickets : plan::kOperationsInFlight;
}

// Numbers of operations are 32 bits wide.
__device__ inline int ticket_of(const Now& now) {
  const auto number = static_cast<std::uint32_t>(now.epoch);
  const plan::Divisor& tickets = now.common.tickets;
  return static_cast<int>(number - tickets.quotient(number) * tickets.by);
}

// The places of `writer` in a window, without asking where that window lies.
__device__ inline plan::Words& words_in(const Now& now, std::byte* window, int writer) {
  return *reinterpret_cast<plan::Words*>(window + now.common.layout.words(now.epoch, writer));
}
__device__ inline Announcement& announcement_in(const Now& now, std::byte* window, int writer) {
  return *reinterpret_cast<Announcement*>(window + now.common.layout.announcement(now.epoch, writer));
}
__device__ inline std::int32_t* announced_tokens_in(const Now& now, std::byte* window, int writer) {
  return reinterpret_cast<std::int32_t*>(window + now.common.layout.announcement(now.epoch, writer) +
                                         plan::WindowLayout::kAnnouncementHead);
}

/// A field of the writer's call, as a line. What else travels in the ticket's lines lies behind all ranks' calls.
__device__ inline std::byte* call_line(const Now& now, std::byte* window, int writer, int field) {
  return window + now.common.layout.lines(ticket_of(now)) + writer * plan::kCallBytes + field * plan::kLineBytes;
}

/// One warp of one block, at the start of a kernel: all that earlier kernels of this rank wrote and read is done, and
/// the peers may know. Nobody has to find out which block of a kernel is the last: the next kernel tells of this one.
__device__ inline void tell_peers(const Now& now, std::uint64_t begun, std::uint64_t needed, int lane) {
  std::uint64_t released = advance_released_by_warp(now, begun, 0, lane);
  while (released < needed && ptx::nanoseconds() <= now.deadline)
    released = advance_released_by_warp(now, begun, 0, lane);
  ptx::fence_system();
  for (int peer = lane; peer < now.common.num_ranks; peer += 32) {
    if (now.far(peer)) {
      tell_far_progress(now, peer, released, begun);
      continue;
    }
    volatile Progress& there = now.progress(peer, now.common.rank);
    there.sent = begun;
    there.released = released;
  }
  if (lane == 0) *static_cast<volatile std::uint64_t*>(&now.common.mailbox->completed) = now.common.serial - 1;
}

/// One thread: the peer has left the operation that used our places there last. `window` is our own.
__device__ inline bool has_room(const Now& now, std::byte* window, int peer, std::uint64_t needed) {
  const bool active = now.common.peers[peer].active != 0;
  if (now.common.far.end != nullptr) window = now.common.peers[peer].inbox;
  const auto* released = reinterpret_cast<const std::uint64_t*>(window + now.common.layout.released(peer));
  const bool there = ptx::load_acquire_system(released) >= needed;
  return there || !active || await_room(now, peer, slots_depth(now.common));
}

/// One warp of each block of a kernel that sends: every peer has room for us. False where one has not in time; true in
/// other warps.
__device__ inline bool have_room(const Now& now, std::byte* window, const Place& at) {
  if (at.warp != kLowLatencyWarps - 1) return true;
  const std::uint64_t needed = place_before(now, slots_depth(now.common));
  bool room = true;
  for (int peer = at.lane; peer < now.common.num_ranks; peer += 32) room = has_room(now, window, peer, needed) && room;
  if (now.common.far.end != nullptr && at.lane == 0) room = await_left(now, needed) && room;
  return room;
}

/// Every thread of a kernel that sends, before it writes to any peer; `room`: of have_room(). False where a peer has
/// none for us. Includes a block barrier. count_on() must follow.
__device__ inline bool open_operation(const Now& now, bool room, const Place& at, bool receives) {
  if (at.tells() && at.warp == kLowLatencyWarps - 2) {
    tell_peers(now, now.epoch - 1, place_before(now, slots_depth(now.common)), at.lane);
    // Known to later kernels only, and they begin when this one has ended.
    if (receives && at.lane == 0) now.common.state->ended[now.epoch % plan::kOperationsInFlight] = now.epoch;
  }
  return __syncthreads_and(room) != 0;
}

/// One thread of each block of a kernel that sends, after open_operation(): the last block that has read the number of
/// operations counts on. Takes a microsecond, in which its warp reaches no barrier.
__device__ inline void count_on(const Now& now, std::uint64_t* ticket) {
  State& state = *now.common.state;
  if (ptx::add_acquire_release(&state.blocks_begun, 1) + 1 != gridDim.x) return;
  state.blocks_begun = 0;
  state.epoch = now.epoch;
  *ticket = now.epoch;
}

/// One warp of one block of a kernel that only receives.
__device__ inline void open_receiving(const Now& now, const Place& at) {
  if (!at.tells() || at.warp != kLowLatencyWarps - 2) return;
  State& state = *now.common.state;
  tell_peers(now, state.epoch, 0, at.lane);
  if (at.lane == 0) state.ended[now.epoch % plan::kOperationsInFlight] = now.epoch;
}

/// Not all data has come: the slots are free again only when nobody writes there any more.
__device__ inline void abandon_operation(const Now& now) {
  now.common.state->abandoned[now.epoch % plan::kOperationsInFlight] = now.epoch;
}

// Calls
// ---------------------------------------------------------------------------------------------------------------------

/// A warp: our call as any peer would compare it, to be published.
__device__ inline void write_signature(const Now& now, std::byte* window, int lane) {
  Announcement& mine = announcement_in(now, window, now.common.rank);
  for (int field = lane; field < Signature::kNumFields; field += 32)
    mine.signature[field] = now.common.signature[field];
}

/// A warp: waits for a word of a peer in our window; `counts`: for the statistics too. While it waits it looks for an
/// announcement of something else, after which the word would never come.
__device__ inline bool await_word(const Now& now, int peer, const std::uint64_t* word, std::uint32_t& value,
                                  bool counts, int lane) {
  int came = 0;
  if (lane == 0) {
    std::uint64_t seen = ptx::load_acquire_system(word);
    const bool waits = seen >> 32 < now.epoch;
    const std::uint64_t start = waits && counts ? ptx::nanoseconds() : 0;
    for (int polls = 1; seen >> 32 < now.epoch; ++polls, seen = ptx::load_acquire_system(word)) {
      if (polls % 64 != 0) continue;
      const std::uint64_t call = ptx::load_acquire_system(&now.words(now.common.rank, peer).announced);
      if (call >> 32 == now.epoch && !is_same_call(now, peer, static_cast<std::uint32_t>(call))) break;
      if (!is_over(now, polls / 64)) continue;
      report(now, Fault::kTimeout, peer, 1, 0);
      break;
    }
    if (waits && counts) count_wait(now.common, peer, ptx::nanoseconds() - start);
    came = seen >> 32 >= now.epoch;
    value = static_cast<std::uint32_t>(seen);
  }
  came = __shfl_sync(kAllLanes, came, 0);
  value = __shfl_sync(kAllLanes, value, 0);
  return came != 0;
}

/// A lane's field of the peer's call, after its word has come: loaded here, compared by is_our_call().
__device__ inline std::int64_t load_field(const Now& now, std::byte* window, int peer, int lane) {
  static_assert(Signature::kNumFields <= 32);
  return lane < Signature::kNumFields ? __ldcg(&announcement_in(now, window, peer).signature[lane]) : 0;
}
__device__ inline bool is_our_call(const Now& now, int peer, std::int64_t field, int lane) {
  const bool same = lane >= Signature::kNumFields || field == now.common.signature[lane];
  if (__all_sync(kAllLanes, same)) return true;
  if (lane == 0) is_same_call(now, peer, kSame);  // says in what
  return false;
}

/// A warp: our call for a peer that shares memory with us: as lines, and as any peer would compare it.
__device__ inline void write_call(const Now& now, std::byte* window, int lane) {
  static_assert(Signature::kNumFields <= plan::kMostFields && plan::kMostFields == 32);
  write_signature(now, window, lane);
  if (lane >= Signature::kNumFields) return;
  const auto field = static_cast<std::uint64_t>(now.common.signature[lane]);
  ptx::store_whole_system(call_line(now, window, now.common.rank, lane),
                          {static_cast<std::uint32_t>(field), static_cast<std::uint32_t>(field >> 32), 0,
                           static_cast<std::uint32_t>(now.epoch)});
}

/// One thread, while it waits for a peer's call as lines: false where the peer has announced something else, after
/// which they would never come.
__device__ __noinline__ inline bool may_come(Now now, int peer) {
  const std::uint64_t call = ptx::load_acquire_system(&now.words(now.common.rank, peer).announced);
  if (call >> 32 == now.epoch && !is_same_call(now, peer, static_cast<std::uint32_t>(call))) return false;
  if (ptx::nanoseconds() <= now.deadline) return true;
  report(now, Fault::kTimeout, peer, 1, 0);
  return false;
}

/// A warp: the peer's call has come, a field for each lane, and is ours.
__device__ inline bool hear_near(const Now& now, std::byte* window, int peer, int lane) {
  const bool mine = lane < Signature::kNumFields;
  const std::byte* const at = call_line(now, window, peer, mine ? lane : 0);
  uint4 line = ptx::load_whole_system(at);
  bool waits = false, comes = true;
  std::uint64_t start = 0;
  for (int looks = 1;; ++looks, line = ptx::load_whole_system(at)) {
    if (__all_sync(kAllLanes, line.w == static_cast<std::uint32_t>(now.epoch))) break;
    if (!waits) start = ptx::nanoseconds();
    waits = true;
    if (looks % 64 != 0) continue;
    if (lane == 0) comes = may_come(now, peer);
    if (__shfl_sync(kAllLanes, static_cast<int>(comes), 0) == 0) break;
  }
  if (waits && lane == 0) count_wait(now.common, peer, ptx::nanoseconds() - start);
  if (__shfl_sync(kAllLanes, static_cast<int>(comes), 0) == 0) return false;
  const auto theirs = static_cast<std::int64_t>(std::uint64_t{line.y} << 32 | line.x);
  const unsigned differ = __ballot_sync(kAllLanes, mine && theirs != now.common.signature[lane]);
  if (lane == __ffs(differ) - 1) report(now, Fault::kDiffers, peer, now.common.signature[lane], theirs, lane);
  return differ == 0;
}

/// The same of a far peer, whose announcement comes whole.
__device__ inline bool hear_far(const Now& now, std::byte* inbox, int peer, int lane) {
  std::uint32_t value = 0;
  if (!await_word(now, peer, &words_in(now, inbox, peer).announced, value, true, lane)) return false;
  if (value == kSame) return is_our_call(now, peer, load_field(now, inbox, peer, lane), lane);
  if (lane == 0) is_same_call(now, peer, value);  // says why not
  return false;
}

/// A block: the call of each peer is ours. Where one is not, that is said, and whoever waits for what will never come
/// sees it.
__device__ inline bool hear(const Now& now, std::byte* window, const Peers& peers, const Place& at) {
  bool good = true;
  // The last warps: the first have rows to wait for.
  for (int peer = kLowLatencyWarps - 1 - at.warp; peer < now.common.num_ranks; peer += kLowLatencyWarps) {
    if (!peers.active(peer)) continue;
    good =
        (peers.far(peer) ? hear_far(now, peers.inbox(peer), peer, at.lane) : hear_near(now, window, peer, at.lane)) &&
        good;
  }
  return good;
}

// Parts
// ---------------------------------------------------------------------------------------------------------------------

/// The flag of a part. `first`: the source (combine: the rank that computed the rows); `second`: the token.
__device__ inline std::uint32_t* flag_of(const Now& now, std::byte* window, std::int64_t number) {
  return reinterpret_cast<std::uint32_t*>(window + now.common.layout.flags(ticket_of(now))) + number;
}

/// The flags that a block has to raise, one of each warp that has written a part. One fence serves for all of them: it
/// costs as much as writing several parts, and more where many warps of an SM wait for theirs.
struct Flags {
  static constexpr int kBarrier = 1;
  std::uint32_t* (*of)[kLowLatencyWarps];  // two rounds'

  /// The first `warps` of a block, whole, in each round, of which none has more of them than the one before. The
  /// barrier orders what they wrote before the fence of each lane that stores a flag: whoever acquires the flag sees
  /// it. Nobody but the first warp waits for the fence: it reads the flags of a round before it comes to the next
  /// barrier, and after that one they are written over.
  __device__ void raise(const Now& now, std::uint32_t* flag, int round, int warps, const Place& at) const {
    std::uint32_t** const flags = of[round % 2];
    if (at.lane == 0) flags[at.warp] = flag;
    __syncwarp();
    ptx::barrier_of_some(kBarrier, 32 * warps);
    if (at.warp != 0 || at.lane >= warps || flags[at.lane] == nullptr) return;
    ptx::fence_system();
    ptx::store_relaxed_system(flags[at.lane], static_cast<std::uint32_t>(now.epoch));
  }
};

/// One thread. The acquire pairs with Flags::raise(); a warp barrier hands what it brought to the other lanes. The flag
/// may only be older or the one that is waited for: its places are given out again after we have released them.
__device__ inline bool await_flag(const Now& now, const std::uint32_t* flag, int peer) {
  const auto wanted = static_cast<std::uint32_t>(now.epoch);
  for (int polls = 1; ptx::load_acquire_system(flag) != wanted; ++polls) {
    if (polls % 64 != 0) continue;
    if (has_failed(now)) return false;  // another block has said why
    if (!is_over(now, polls / 64)) continue;
    report(now, Fault::kTimeout, peer, 1, 0);
    return false;
  }
  return true;
}

/// One thread: all that the far peer sends us in this operation has come. Acquires it.
__device__ inline bool await_arrived(const Now& now, int peer) {
  const std::uint64_t* const word = &now.words(now.common.rank, peer).arrived;
  for (int polls = 1; ptx::load_acquire_system(word) >> 32 < now.epoch; ++polls) {
    if (polls % 64 != 0) continue;
    if (has_failed(now)) return false;  // another block has said why
    if (!is_over(now, polls / 64)) continue;
    report(now, Fault::kTimeout, peer, 1, 0);
    return false;
  }
  return true;
}

}  // namespace deep_ep::cuda
