// SPDX-License-Identifier: MIT
// Before any row moves: routes and counts of our tokens, in token order and the same on every run; announcements to all
// peers; and, as receiver, where each source's rows begin. Phases: route, prefix, announce, number, plan.
#include "cuda/kernels.h"
#include "cuda/progress.cuh"

namespace deep_ep::cuda {

namespace {

constexpr int kThreads = kNotifyWarps * 32;

struct Segment {
  std::int64_t first, end;  // selections
};

__device__ Segment segment_of(const NotifyParams& p, int number) {
  const std::int64_t tokens = p.num_tokens;
  const std::int64_t first = std::int64_t{number} * p.segment_tokens;
  const std::int64_t end = first + p.segment_tokens;
  return {(first < tokens ? first : tokens) * p.num_topk, (end < tokens ? end : tokens) * p.num_topk};
}

// Selections that a warp looks at together: whole tokens, where a token has no more than a warp has lanes.
__device__ int lanes_at_work(const NotifyParams& p) { return p.num_topk <= 32 ? 32 / p.num_topk * p.num_topk : 32; }

// The earlier selection of the same token that goes to the same rank, or -1: then the token is counted here.
__device__ std::int64_t earlier_selection(const NotifyParams& p, std::int64_t at, int rank, int lane) {
  if (p.num_topk <= 32) {
    const int token_here = lane / p.num_topk;
    const unsigned same = __match_any_sync(kAllLanes, rank >= 0 ? rank * 32 + token_here : -1);
    const int first = __ffs(same) - 1;
    return rank >= 0 && first < lane ? at - (lane - first) : -1;
  }
  for (std::int64_t i = at / p.num_topk * p.num_topk; rank >= 0 && i < at; ++i)
    if (p.routes.dst_rank[i] == rank) return i;
  return -1;
}

// A warp's counters, and beside them, where shared memory has room, a word for each in which lanes with the same key
// find each other: to compare keys takes a turn for each that there is. The words are zero.
struct Counters {
  std::int32_t* of_key;
  unsigned* lanes_of_key;  // null: no room
};

// Adds to a counter for each group of lanes with the same key; gives each lane the counter before it, -1 where it has
// no key. Two keys of each lane at once: no lane's first is another's second.
struct Pair {
  int first, second;
};
__device__ Pair take_numbers(const Counters& counters, const Pair& key, int lane) {
  const auto lanes_with = [&](int k) {
    return counters.lanes_of_key == nullptr ? __match_any_sync(kAllLanes, k) : k >= 0 ? counters.lanes_of_key[k] : 0;
  };
  if (counters.lanes_of_key != nullptr) {
    if (key.first >= 0) atomicOr(counters.lanes_of_key + key.first, 1u << lane);
    if (key.second >= 0) atomicOr(counters.lanes_of_key + key.second, 1u << lane);
    __syncwarp();
  }
  const Pair same{static_cast<int>(lanes_with(key.first)), static_cast<int>(lanes_with(key.second))};
  const auto before = [&](int k, int lanes) {
    return k >= 0 ? counters.of_key[k] + __popc(lanes & ((1u << lane) - 1)) : -1;
  };
  const Pair numbers{before(key.first, same.first), before(key.second, same.second)};
  __syncwarp();
  const auto add = [&](int k, int lanes) {
    if (k < 0 || lane != __ffs(lanes) - 1) return;
    counters.of_key[k] += __popc(lanes);
    if (counters.lanes_of_key != nullptr) counters.lanes_of_key[k] = 0;
  };
  add(key.first, same.first), add(key.second, same.second);
  __syncwarp();
  return numbers;
}

// What memory must bring is asked for this many steps at once, and without a condition: behind a test, one load would
// wait for the other. A lane that has no selection asks for the segment's last.
constexpr int kAhead = 8;

struct Steps {
  std::int64_t base, end;
  int lanes, lane;
  __device__ std::int64_t at(int i) const { return base + i * lanes + lane; }
  __device__ bool has(int i) const { return lane < lanes && at(i) < end; }
  __device__ std::int64_t asked(int i) const { return at(i) < end ? at(i) : end - 1; }
  __device__ bool over(int i) const { return at(i) - lane >= end; }
};

// Where selections go, -1: nowhere.
__device__ void route_steps(const NotifyParams& p, const Steps& steps, int (&rank)[kAhead], int (&slot)[kAhead]) {
  std::int64_t expert[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    expert[i] = p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[steps.asked(i)]
                              : static_cast<const std::int32_t*>(p.topk_idx)[steps.asked(i)];
  Placement::Replica to[kAhead];
  const auto known = [&](int i) { return expert[i] >= 0 && expert[i] < p.num_experts; };
  if (p.num_copies == p.num_experts) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) to[i] = p.placement.replicas[known(i) ? expert[i] : 0];
  } else {
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i)
      to[i] = plan::route(p.placement, known(i) ? static_cast<int>(expert[i]) : 0, p.common.rank,
                          steps.asked(i) / p.num_topk);
  }
  std::int32_t active[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) active[i] = p.common.peers[to[i].rank].active;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const bool goes = steps.has(i) && known(i) && active[i] != 0;
    rank[i] = goes ? to[i].rank : -1;
    slot[i] = goes ? to[i].slot : -1;
    if (!steps.has(i) || expert[i] < p.num_experts) continue;
    auto* lowest = reinterpret_cast<unsigned long long*>(&p.common.state->bad_selection);
    // Kept as the complement, so that zero stands for none and the largest is the first.
    atomicMax(lowest, ~static_cast<unsigned long long>(steps.at(i)));
  }
}

// The counter of each selection's rows.
__device__ void row_keys(const NotifyParams& p, const int (&rank)[kAhead], const int (&slot)[kAhead],
                         int (&key)[kAhead]) {
  std::int32_t first[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) first[i] = p.first_copy[max(rank[i], 0)];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) key[i] = rank[i] < 0 ? -1 : p.common.num_ranks + first[i] + slot[i];
}

// Phase route: one warp's tokens, and how many of them go where.
__device__ void route_segment(const NotifyParams& p, const Segment& segment, std::int32_t* counters, int lane) {
  const int lanes = lanes_at_work(p);
  for (std::int64_t base = segment.first; base < segment.end; base += kAhead * lanes) {
    const Steps steps{base, segment.end, lanes, lane};
    int rank[kAhead], slot[kAhead], key[kAhead];
    route_steps(p, steps, rank, slot);
    row_keys(p, rank, slot, key);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (steps.over(i)) break;
      const std::int64_t at = steps.at(i);
      if (steps.has(i)) {
        p.routes.dst_rank[at] = rank[i];
        p.routes.slot[at] = slot[i];
      }
      __syncwarp();
      if (earlier_selection(p, at, rank[i], lane) < 0 && rank[i] >= 0) atomicAdd(counters + rank[i], 1);
      if (key[i] >= 0) atomicAdd(counters + key[i], 1);
    }
  }
}

// The number of the selection's arrival: `own`, or, where the token has come to that rank before, that of the earlier
// selection, which with few selections is another lane's. All lanes.
__device__ std::int32_t arrival_of(const NotifyParams& p, std::int64_t at, bool mine, std::int64_t earlier,
                                   std::int32_t own, int lane) {
  if (p.num_topk <= 32) return __shfl_sync(kAllLanes, own, earlier >= 0 ? lane - static_cast<int>(at - earlier) : lane);
  if (mine && earlier < 0) p.routes.relative_arrival[at] = own;
  __syncwarp();
  return earlier >= 0 ? p.routes.relative_arrival[earlier] : own;
}

// Phase number: the same walk again, now that each segment knows how many came before it.
__device__ void number_segment(const NotifyParams& p, const Segment& segment, const Counters& counters, int lane) {
  const int lanes = lanes_at_work(p);
  for (std::int64_t base = segment.first; base < segment.end; base += kAhead * lanes) {
    const Steps steps{base, segment.end, lanes, lane};
    int rank[kAhead], slot[kAhead], key[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      rank[i] = p.routes.dst_rank[steps.asked(i)];
      slot[i] = p.routes.slot[steps.asked(i)];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (!steps.has(i)) rank[i] = -1;
    row_keys(p, rank, slot, key);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (steps.over(i)) break;
      const std::int64_t at = steps.at(i);
      const bool mine = steps.has(i);
      const std::int64_t earlier = earlier_selection(p, at, rank[i], lane);
      const Pair own = take_numbers(counters, {rank[i] >= 0 && earlier < 0 ? rank[i] : -1, key[i]}, lane);
      const std::int32_t arrival = arrival_of(p, at, mine, earlier, own.first, lane);
      if (!mine) continue;
      p.routes.relative_arrival[at] = arrival;
      p.routes.relative_row[at] = own.second;
    }
  }
}

// Phase prefix, inside a block: counts of its segments become what lies before each of them in the block.
__device__ void prefix_in_block(const NotifyParams& p, std::int32_t* segments, int keys) {
  __syncthreads();
  for (int key = static_cast<int>(threadIdx.x); key < keys; key += kThreads) {
    std::int32_t sum = 0;
#pragma unroll
    for (int segment = 0; segment < kNotifyWarps; ++segment) {
      const std::int32_t count = segments[std::int64_t{segment} * keys + key];
      segments[std::int64_t{segment} * keys + key] = sum;
      sum += count;
    }
    p.block_counts[std::int64_t{blockIdx.x} * keys + key] = sum;
  }
}

// The same among blocks, each for itself, once all have counted; block 0 keeps the totals.
__device__ void prefix_among_blocks(const NotifyParams& p, std::int32_t* segments, int keys) {
  for (int key = static_cast<int>(threadIdx.x); key < keys; key += kThreads) {
    std::int32_t before = 0, total = 0;
#pragma unroll 8
    for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
      const std::int32_t count = p.block_counts[std::int64_t{block} * keys + key];
      if (block < static_cast<int>(blockIdx.x)) before += count;
      total += count;
    }
    if (blockIdx.x == 0) p.totals[key] = total;
    for (int segment = 0; blockIdx.x != 0 && segment < kNotifyWarps; ++segment)
      segments[std::int64_t{segment} * keys + key] += before;
  }
  __syncthreads();
}

// Phase announce: a warp per peer.
__device__ void announce(const Now& now, const NotifyParams& p, int warp, int lane) {
  const std::uint64_t bad = p.common.state->bad_selection;
  for (int peer = warp; peer < p.common.num_ranks; peer += kNotifyWarps) {
    if (!now.active(peer)) continue;
    if (lane == 0) await_room(now, peer);  // after the deadline nobody waits for what we would have overwritten
    __syncwarp();
    Announcement& mine = now.announcement(peer, p.common.rank);
    for (int field = lane; field < Signature::kNumFields; field += 32)
      mine.signature[field] = p.common.signature[field];
    for (int r = lane; r < p.common.num_ranks; r += 32) now.announced_tokens(peer, p.common.rank)[r] = p.totals[r];
    const std::int32_t* rows = p.totals + p.common.num_ranks + p.first_copy[peer];
    const int slots = p.first_copy[peer + 1] - p.first_copy[peer];
    for (int slot = lane; slot < slots; slot += 32) now.announced_rows(peer, p.common.rank)[slot] = rows[slot];
    if (lane == 0 && bad != 0) {
      const auto at = static_cast<std::int64_t>(~bad);
      mine.bad_selection = at;
      mine.bad_expert = p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[at]
                                      : static_cast<const std::int32_t*>(p.topk_idx)[at];
    }
    __syncwarp();  // every lane's part comes before lane 0's release
    const std::size_t told = plan::WindowLayout::kAnnouncementHead +
                             sizeof(std::int32_t) * static_cast<std::size_t>(p.common.num_ranks + slots);
    if (lane == 0) publish_to(now, peer, net::Flag::kAnnounced, bad != 0 ? kBadExpert : kSame, told);
  }
}

// Sum of value over the threads before this one; total in every thread.
__device__ std::int32_t block_prefix(std::int32_t value, std::int32_t& total) {
  __shared__ std::int32_t of_warp[kNotifyWarps + 1];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  std::int32_t sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  std::int32_t before = 0;
  total = 0;
  for (int w = 0; w < kNotifyWarps; ++w) {
    if (w < warp) before += of_warp[w];
    total += of_warp[w];
  }
  return before + sum - value;
}

// Phase plan, as plan::make_row_plan: where the rows of each source and slot begin here.
__device__ void plan_rows(const Now& now, const NotifyParams& p) {
  const int ranks = p.common.num_ranks, me = p.common.rank;
  for (int i = static_cast<int>(threadIdx.x); i < ranks * ranks; i += kThreads) {
    const int src = i / ranks;
    p.tokens_between[i] = now.active(src) ? now.announced_tokens(me, src)[i % ranks] : 0;
  }
  __shared__ std::int64_t num_arrivals;
  if (threadIdx.x == 0) {
    p.common.state->full_slot_rows = 0;
    std::int32_t sum = 0;
    for (int src = 0; src < ranks; ++src) {
      p.first_arrival[src] = sum;
      if (now.active(src)) sum += now.announced_tokens(me, src)[me];
    }
    p.first_arrival[ranks] = sum;
    num_arrivals = sum;
  }
  const std::int64_t padded_rows = std::int64_t{ranks} * p.max_tokens_per_rank;
  std::int32_t base = 0;
  for (int first = 0; first < p.num_slots; first += kThreads) {
    const int slot = first + static_cast<int>(threadIdx.x);
    const bool mine = slot < p.num_slots;
    std::int32_t rows = 0;
    for (int src = 0; mine && src < ranks; ++src) rows += now.active(src) ? now.announced_rows(me, src)[slot] : 0;
    const std::int32_t aligned = (rows + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
    const std::int32_t place = p.layout == OutputLayout::kPadded ? static_cast<std::int32_t>(padded_rows) : aligned;
    std::int32_t total = 0;
    std::int32_t row = base + block_prefix(mine ? place : 0, total);
    base += total;
    if (!mine) continue;
    // Duplicate ids only. After block_prefix's barriers, and so after the 0 above.
    if (p.layout == OutputLayout::kPadded && rows > padded_rows) atomicMax(&p.common.state->full_slot_rows, rows);
    p.slot_rows[slot] = rows;
    p.slot_first_row[slot] = row;
    if (p.counted_first_row != nullptr) p.counted_first_row[slot] = row;
    for (int src = 0; src < ranks; ++src) {
      p.first_row[std::int64_t{src} * p.num_slots + slot] = row;
      row += now.active(src) ? now.announced_rows(me, src)[slot] : 0;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  p.slot_first_row[p.num_slots] = base;
  if (p.counted_first_row != nullptr) p.counted_first_row[p.num_slots] = base;
  const std::int64_t num_rows = p.layout == OutputLayout::kByRank ? num_arrivals : base;
  p.common.state->rows = num_rows;
  p.common.state->arrivals = num_arrivals;
  volatile Mailbox& mailbox = *p.common.mailbox;
  mailbox.rows = num_rows;
  mailbox.arrivals = num_arrivals;
}

}  // namespace

__global__ void __launch_bounds__(kThreads) notify(const __grid_constant__ NotifyParams p) {
  extern __shared__ std::int32_t shared_counters[];
  const Now now(p.common, Now::Kernel::kFirst);
  now.keep_deadline();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int number = static_cast<int>(blockIdx.x) * kNotifyWarps + warp;
  const int keys = p.common.num_ranks + p.num_copies;
  const int num_segments = (p.num_tokens + p.segment_tokens - 1) / p.segment_tokens;
  const bool working = number < num_segments;
  const Segment segment = segment_of(p, number);
  std::int32_t* const of_block =
      p.words_in_shared > 0 ? shared_counters : p.segment_counts + std::int64_t{blockIdx.x} * kNotifyWarps * keys;
  std::int32_t* const counters = of_block + std::int64_t{warp} * keys;
  unsigned* const lanes_of_key =
      p.words_in_shared > 1 ? reinterpret_cast<unsigned*>(shared_counters) + (kNotifyWarps + warp) * keys : nullptr;

  for (int key = lane; key < keys; key += 32) {
    counters[key] = 0;
    if (lanes_of_key != nullptr) lanes_of_key[key] = 0;
  }
  __syncwarp();
  if (working) route_segment(p, segment, counters, lane);
  prefix_in_block(p, of_block, keys);
  const bool good = grid_barrier(now);
  if (good) {
    prefix_among_blocks(p, of_block, keys);
    if (blockIdx.x == 0) announce(now, p, warp, lane);
    if (working) number_segment(p, segment, {counters, lanes_of_key}, lane);
  }
  if (blockIdx.x != 0) {
    last_block(now);
    return;
  }
  // Announcements of all peers before any reply: a call that some rank refused or made differently ends here, on every
  // rank alike.
  for (int peer = static_cast<int>(threadIdx.x); good && peer < p.common.num_ranks; peer += kThreads)
    if (now.active(peer)) await_same_call(now, peer);
  __syncthreads();
  ptx::let_kernel_behind_begin();  // and not before: from here on nobody else's blocks are waited for
  const bool failed = !good || has_failed(now);
  if (!failed) plan_rows(now, p);
  last_block(now);
  // The other blocks may still number their tokens; the counters are reset by whoever ends the operation.
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(&p.common.state->blocks_done) < gridDim.x) {
    }
    p.common.state->blocks_done = p.common.state->barrier = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::fence_system();
    *static_cast<volatile std::uint64_t*>(&p.common.mailbox->counted) = p.common.serial;
  }
}

__global__ void refuse(const __grid_constant__ RefuseParams p) {
  const Now now(p.common);
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x)) {
    if (!now.active(peer)) continue;
    await_room(now, peer);
    Announcement& mine = now.announcement(peer, p.common.rank);
    for (int i = 0; i < kRefusalBytes; ++i) mine.refusal[i] = p.text[i];
    publish_to(now, peer, net::Flag::kAnnounced, kRefusedByHost, plan::WindowLayout::kAnnouncementHead);
  }
  const bool low_latency =
      p.common.operation == Operation::kLowLatencyDispatch || p.common.operation == Operation::kLowLatencyCombine;
  // Peers may still be sending into our slots.
  if (low_latency && threadIdx.x == 0) p.common.state->abandoned[now.epoch % plan::kOperationsInFlight] = now.epoch;
  finish(now);
}

void launch_notify(const NotifyParams& params, int blocks, cudaStream_t stream) {
  const int keys = params.common.num_ranks + params.num_copies;
  const std::size_t shared = sizeof(std::int32_t) * kNotifyWarps * keys * params.words_in_shared;
  notify<<<blocks, kThreads, shared, stream>>>(params);
}

void launch_refuse(const RefuseParams& params, cudaStream_t stream) { refuse<<<1, 64, 0, stream>>>(params); }

const void* notify_kernel() { return reinterpret_cast<const void*>(&notify); }
const void* refuse_kernel() { return reinterpret_cast<const void*>(&refuse); }

}  // namespace deep_ep::cuda
