// SPDX-License-Identifier: MIT
// Low-latency dispatch, route: one block for each destination counts which of our tokens go there and tells it.
#pragma once

#include "cuda/low_latency_message.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

__device__ std::int64_t expert_of(const Params& p, std::int64_t at) {
  return p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[at]
                       : static_cast<const std::int32_t*>(p.topk_idx)[at];
}

__device__ __noinline__ Placement::Replica replica_of_turn(const Params& p, int expert, int token) {
  return plan::route(p.placement, expert, p.common.rank, token);
}

// Where a selection goes, masked ranks too; rank -1: nowhere.
__device__ Placement::Replica replica_of(const Params& p, std::int64_t expert, int token) {
  if (expert < 0 || expert >= p.num_experts) return {-1, -1};
  if (p.even > 0) {
    const int rank = p.per.even.quotient(static_cast<int>(expert));
    return {rank, static_cast<int>(expert) - rank * p.even};
  }
  return p.one_copy_each ? p.placement.replicas[expert] : replica_of_turn(p, static_cast<int>(expert), token);
}

// A selection of ours, as the block that routes has read it.
struct Selection {
  std::int64_t expert = -1;
  Placement::Replica to{-1, -1};
};
// Those of a step of a warp: whole tokens, as many as there are lanes for.
__device__ Selection read_selection(const Params& p, int first, int lane) {
  const int of_step = p.route.of_step, token = first + p.per.topk.quotient(lane);
  Selection s;
  if (lane >= of_step * p.num_topk || token >= p.num_tokens) return s;
  s.expert = expert_of(p, std::int64_t{first} * p.num_topk + lane);
  s.to = replica_of(p, s.expert, token);
  return s;
}

// What a lane knows of its selection after the count inside its warp.
struct Routed {
  int token, k;    // token -1: none
  int slot;        // -1: not at this destination
  int row;         // as the how-manieth of this warp
  int arrival;     // of the token's first selection there; -1 elsewhere
  unsigned lanes;  // of the token
};

// One step of a warp. Lanes are matched by few values only: an instruction that matches takes a turn for each.
__device__ Routed route_step(const Params& p, const Peers& peers, std::int32_t* counters, int dst, int first, int slots,
                             const Selection& selection, int lane, std::uint32_t* bad) {
  const int of_step = p.route.of_step, of_lane = p.per.topk.quotient(lane), token = first + of_lane;
  Routed r{-1, lane - of_lane * p.num_topk, -1, 0, -1, (kAllLanes >> (32 - p.num_topk)) << (of_lane * p.num_topk)};
  if (of_lane < of_step && token < p.num_tokens) {
    const int at = first * p.num_topk + lane;
    if (selection.expert >= p.num_experts) atomicMin(bad, static_cast<std::uint32_t>(at));
    const int rank = selection.to.rank >= 0 && peers.active(selection.to.rank) ? selection.to.rank : -1;
    r.token = token;
    if (rank == dst) r.slot = selection.to.slot;
    if (dst == p.common.rank) p.dst_rank[at] = rank;
  }
  const unsigned below = (1u << lane) - 1;
  const unsigned same_token = __ballot_sync(kAllLanes, r.slot >= 0) & r.lanes;
  const bool leads = r.slot >= 0 && (same_token & below) == 0;
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  const unsigned same_slot = __match_any_sync(kAllLanes, r.slot);
  if (r.slot >= 0) r.row = counters[r.slot] + __popc(same_slot & below);
  if (leads) r.arrival = counters[slots] + __popc(leaders & below);
  __syncwarp();
  if (r.slot >= 0 && (same_slot & below) == 0) counters[r.slot] += __popc(same_slot);
  if (lane == 0) counters[slots] += __popc(leaders);
  __syncwarp();
  return r;
}

// The head of a token's message: each selection a line of its own.
__device__ void write_head(const Params& p, std::byte* message, const Routed& r, int row, int arrival,
                           std::uint32_t number) {
  ptx::store_whole_system(message + plan::kLineBytes * r.k,
                          {static_cast<std::uint32_t>(r.slot), static_cast<std::uint32_t>(row),
                           static_cast<std::uint32_t>(arrival), number});
}

constexpr std::uint32_t kNoSelection = ~0u;

// What a block counts that routes: of all tokens before this batch, then of each warp's. Keys are slots, and behind
// them the tokens that come.
struct RouteCounters {
  std::uint32_t* bad;  // lowest selection that does not exist
  std::int32_t *carry, *of_warps;
  int keys;

  __device__ RouteCounters(const Shared& shared, int slots)
      : bad(reinterpret_cast<std::uint32_t*>(shared.of_route)),
        carry(shared.of_route + 1),
        of_warps(carry + slots + 1),
        keys(slots + 1) {}
  /// A block barrier must follow.
  __device__ void clear(int warps) const {
    if (threadIdx.x == 0) *bad = kNoSelection;
    for (int i = static_cast<int>(threadIdx.x); i < keys * (warps + 1); i += kLowLatencyThreads) carry[i] = 0;
  }
  __device__ std::int32_t* of(int warp) const { return of_warps + warp * keys; }
  /// Of this batch's first `warps` and all batches before. Whoever asks adds up: that takes no block barrier.
  __device__ std::int32_t before(int warp, int key) const {
    std::int32_t sum = carry[key];
#pragma unroll 4
    for (int w = 0; w < warp; ++w) sum += of(w)[key];
    return sum;
  }
  /// To the next batch. Every thread; block barriers must stand before and after.
  __device__ void carry_on(int warps) const {
    for (int key = static_cast<int>(threadIdx.x); key < keys; key += kLowLatencyThreads) {
      carry[key] = before(warps, key);
      for (int w = 0; w < warps; ++w) of(w)[key] = 0;
    }
  }
};

__device__ int slots_of(const Params& p, int rank) {
  return p.even > 0 ? p.even : p.first_copy[rank + 1] - p.first_copy[rank];
}

// How many tokens a batch of a block has, and how they are shared.
struct Batch {
  int steps = 0, of_warp = 0, tokens = 0, warps = 0;
  __device__ Batch() {}
  __device__ Batch(const Params& p, int left) {
    const int of_step = p.route.of_step, most_warps = p.route.most_warps;
    static_assert(kRouteSteps == 2);
    steps = left > most_warps * of_step ? 2 : 1;
    of_warp = of_step * steps;
    tokens = min(left, of_warp * most_warps);
    warps = (p.per.of_step.quotient(tokens + of_step - 1) + steps - 1) >> (steps - 1);
  }
};

// One thread: names a selection that does not exist to a peer.
__device__ __noinline__ void refuse_selection(Now now, const Params& p, int dst, std::byte* window, std::int64_t bad) {
  Announcement& mine = announcement_in(now, window, p.common.rank);
  mine.bad_selection = bad;
  mine.bad_expert = expert_of(p, bad);
  publish_to(now, dst, net::Flag::kAnnounced, kBadExpert, plan::WindowLayout::kAnnouncementHead);
}

// What a block knows before it may write to anybody: its first batch and step, and how many slots its destination has.
struct RouteAhead {
  Batch batch;
  Selection selection[kRouteSteps];
  int slots = 0;
  __device__ RouteAhead() {}
  __device__ RouteAhead(const Params& p, int dst, const Place& at) : batch(p, p.num_tokens), slots(slots_of(p, dst)) {
    const int first = at.warp * batch.of_warp;
#pragma unroll
    for (int i = 0; i < kRouteSteps; ++i)
      if (i < batch.steps && first < p.num_tokens)
        selection[i] = read_selection(p, first + i * p.route.of_step, at.lane);
  }
};

// What route_tokens() has found.
struct Counted {
  std::uint32_t bad = kNoSelection;  // lowest selection that does not exist
  int warps = 0;                     // of the last batch: RouteCounters::before(warps, key) is of all tokens
};

// A block: which of our tokens go to one destination, in token order; all of them, and each slot's, are counted in
// `counters`, which are clear before. Each warp calls place(routed, row, arrival) for each of its steps, all lanes:
// final numbers, among ours to that destination, of the lane's selection and its token, -1 where it does not go there.
// After a selection that does not exist nothing is placed.
template <class Placing>
__device__ Counted route_tokens(const Params& p, const Shared& shared, int dst, const RouteAhead& ahead,
                                const RouteCounters& counters, const Place& at, const Placing& place) {
  const int slots = ahead.slots, of_step = p.route.of_step;
  Counted counted;
  for (int done = 0; done < p.num_tokens;) {
    const Batch batch = done == 0 ? ahead.batch : Batch(p, p.num_tokens - done);
    const int first = done + at.warp * batch.of_warp;
    Routed routed[kRouteSteps];
    if (at.warp < batch.warps) {
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i) {
        if (i >= batch.steps) continue;
        const int begin = first + i * of_step;
        const Selection selection = done == 0 ? ahead.selection[i] : read_selection(p, begin, at.lane);
        routed[i] =
            route_step(p, shared.peers, counters.of(at.warp), dst, begin, slots, selection, at.lane, counters.bad);
      }
    }
    __syncthreads();
    counted = {*counters.bad, batch.warps};
    if (at.warp < batch.warps && counted.bad == kNoSelection) {
      const int arrivals = counters.before(at.warp, slots);
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i) {
        if (i >= batch.steps) continue;
        const Routed& r = routed[i];
        const unsigned leader = __ballot_sync(kAllLanes, r.arrival >= 0) & r.lanes;
        const int arrival = __shfl_sync(kAllLanes, r.arrival, leader != 0 ? __ffs(leader) - 1 : at.lane);
        const int row = r.slot >= 0 ? r.row + counters.before(at.warp, r.slot) : 0;
        place(r, row, leader != 0 ? arrival + arrivals : -1);
      }
    }
    done += batch.tokens;
    if (done == p.num_tokens) break;
    __syncthreads();
    counters.carry_on(batch.warps);
    __syncthreads();
  }
  return counted;
}

// A block: tells one destination which of our tokens come, then how many.
__device__ void route_to(const Now& now, const Params& p, const Shared& shared, int dst, const RouteAhead& ahead,
                         const Place& at) {
  const int me = p.common.rank, slots = ahead.slots;
  const std::uint32_t number = number_of(now);
  const RouteCounters counters(shared, slots);
  std::byte* const window = shared.peers.window(dst);
  const Messages messages(now, p, window);
  const auto place = [&](const Routed& r, int row, int arrival) {
    if (r.token >= 0) write_head(p, messages.of(me, r.token), r, row, arrival, number);
  };
  const Counted counted = route_tokens(p, shared, dst, ahead, counters, at, place);
  if (counted.bad != kNoSelection) {
    if (threadIdx.x == 0) refuse_selection(now, p, dst, window, static_cast<std::int64_t>(counted.bad));
    return;
  }
  const auto all_of = [&](int key) { return static_cast<std::uint32_t>(counters.before(counted.warps, key)); };
  for (int line = idle_turn(); line < plan::count_lines(slots); line += kLowLatencyThreads) {
    const auto count = [&](int slot) { return slot < slots ? all_of(slot) : 0; };
    const int slot = plan::kLineWords * (line - 1);
    const uint4 words = line == 0 ? uint4{static_cast<std::uint32_t>(p.num_tokens), all_of(slots), 0, number}
                                  : uint4{count(slot), count(slot + 1), count(slot + 2), number};
    ptx::store_whole_system(messages.counts(me) + plan::kLineBytes * line, words);
  }
  // Only now: a call that refuses a selection is none that the peer may go on with.
  if (at.warp != kLowLatencyWarps - 1) return;
  write_call(now, window, at.lane);
  __syncwarp();
  if (at.lane != 0) return;
  publish(now, &words_in(now, window, me).announced, kSame);
  count_sent(p.common, dst, std::uint64_t{all_of(slots)} * p.message_bytes);
}

}  // namespace
}  // namespace deep_ep::cuda
