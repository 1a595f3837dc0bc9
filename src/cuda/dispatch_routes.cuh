// SPDX-License-Identifier: MIT
// Dispatch: what each receiver replied, and the final rows that follow for each selection.
#pragma once

#include "cuda/far.cuh"
#include "cuda/kernels.h"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// Warps of one block. Quantising takes registers for a batch of channels: fewer warps, each with more.
struct Crew {
  int movers, companions;
  __host__ __device__ constexpr int threads() const { return (movers + companions) * 32; }
};
__host__ __device__ constexpr Crew crew_of(bool quantize) { return quantize ? Crew{12, 4} : Crew{16, 8}; }
// Row pieces that one mover warp has in shared memory. Whoever quantises frees a stage before it writes.
constexpr int kMoveStages = 3, kQuantizeStages = 2;
__host__ __device__ constexpr int stages_of(bool quantize) { return quantize ? kQuantizeStages : kMoveStages; }
// Passes of one batch of a quantising warp: as many as its registers hold. Seven cut 7168 channels in two.
template <class Number>
constexpr int kPassesOf = Number::kBytes == 4 ? 3 : 7;

// One receiver's output, seen from here.
struct Destination {
  bool active;             // takes part
  std::uint64_t* arrived;  // the word by which it hears that our rows are there; null: far
  std::byte* block;        // null: not ours to write
  plan::OutputBlock at;
  std::int64_t rows, arrivals;     // that the block has room for
  std::int64_t first_arrival;      // of ours
  const std::int32_t* first_rows;  // by slot
  bool writes_here;                // this block's movers write there
  unsigned rows_counted;           // where rows are more than arrivals: those that this block counted
};

// What this rank is going to receive: known to the host, or counted by notify.
struct Incoming {
  std::int64_t rows, arrivals;
  __device__ explicit Incoming(const DispatchParams& p)
      : rows(p.rows >= 0 ? p.rows : p.common.state->rows),
        arrivals(p.arrivals >= 0 ? p.arrivals : p.common.state->arrivals) {}
};

// The word in our own window by which we hear that all rows of a rank are here. Those of far ranks are passed on by a
// rank of our node, which stores it.
__device__ std::uint64_t* arrived_of(const Now& now, int owner, int source) {
  return &reinterpret_cast<plan::Words*>(now.window(owner) + now.common.layout.words(now.epoch, source))->arrived;
}

// Phase reply: a thread per source says where its rows begin. With a cached handle the call is announced here too.
__device__ void reply(const Now& now, const DispatchParams& p, const Incoming& incoming) {
  const int me = p.common.rank;
  for (int src = static_cast<int>(threadIdx.x / 32); src < p.common.num_ranks;
       src += static_cast<int>(blockDim.x / 32)) {
    if (!now.active(src)) continue;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (p.cached) {
      await_room(now, src);  // every lane for itself
      for (int field = lane; field < Signature::kNumFields; field += 32)
        now.announcement(src, me).signature[field] = p.common.signature[field];
    } else {
      for (int slot = lane; slot < p.num_slots; slot += 32)
        now.reply_first_rows(src, me)[slot] = p.first_row[std::int64_t{src} * p.num_slots + slot];
    }
    if (lane == 0) {
      Reply answer{p.verdict,
                   p.needed,
                   p.there,
                   p.block_at,
                   incoming.rows,
                   incoming.arrivals,
                   p.cached ? 0 : p.first_arrival[src]};
      if (p.max_rows > 0 && p.common.state->rows > p.max_rows && answer.verdict == Reply::kAccepted)
        answer.verdict = Reply::kMoreThanMaxRows, answer.needed = p.common.state->rows, answer.there = p.max_rows;
      if (!p.cached && p.common.state->full_slot_rows > 0 && answer.verdict == Reply::kAccepted) {
        answer.verdict = Reply::kSlotTooSmall;
        answer.needed = static_cast<std::uint64_t>(p.common.state->full_slot_rows);
        answer.there = static_cast<std::uint64_t>(p.shape.padded_slot_rows);
      }
      now.reply(src, me) = answer;
    }
    __syncwarp();  // every lane's first rows come before lane 0's release
    if (lane != 0) continue;
    const std::size_t told = plan::WindowLayout::kReplyHead + (p.cached ? 0 : sizeof(std::int32_t) * p.num_slots);
    if (p.cached && now.far(src)) {
      publish_to(now, src, net::Flag::kAnnounced, kSame, plan::WindowLayout::kAnnouncementHead);
      publish_to(now, src, net::Flag::kReplied, 0, told);
    } else if (p.cached) {
      plan::Words& words = now.words(src, me);
      publish(now, &words.announced, kSame, &words.replied, 0);
    } else {
      publish_to(now, src, net::Flag::kReplied, 0, told);
    }
  }
}

// With a cached handle, where the call is announced with the reply, by one fence: one wait for both. While it lasts,
// looks for an announcement of something else, after which there will be no reply.
__device__ bool await_both(const Now& now, int dst) {
  const plan::Words& words = now.words(now.common.rank, dst);
  std::uint64_t start = 0;
  for (int polls = 0; ptx::load_acquire_system(&words.replied) >> 32 < now.epoch; ++polls) {
    if (polls == 0) start = ptx::nanoseconds();
    if (polls % 16 != 15) continue;
    const std::uint64_t call = ptx::load_acquire_system(&words.announced);
    if (call >> 32 == now.epoch && !is_same_call(now, dst, static_cast<std::uint32_t>(call))) return false;
    if (ptx::nanoseconds() <= now.deadline) continue;
    report(now, Fault::kTimeout, dst, 1, 0);
    return false;
  }
  if (start != 0 && blockIdx.x == 0) count_wait(now.common, dst, ptx::nanoseconds() - start);
  return true;
}

// One thread per receiver. Every block waits for itself: the words lie in our own memory.
__device__ bool await_reply(const Now& now, const DispatchParams& p, int dst, Destination& to) {
  const int me = p.common.rank;
  to.active = now.active(dst);
  to.arrived = now.far(dst) ? nullptr : arrived_of(now, dst, me);
  to.block = nullptr;
  to.rows_counted = 0;
  if (!now.active(dst)) return true;
  std::uint32_t value = 0;
  if (p.cached) {
    if (!await_both(now, dst)) return false;
  } else if (!await(now, &now.words(me, dst).replied, value, counted_once(dst))) {
    report(now, Fault::kTimeout, dst, 1, 0);
    return false;
  }
  const Reply answer = now.reply(me, dst);
  if (p.cached && differing_field(now, now.announcement(me, dst)) >= 0) return is_same_call(now, dst, kSame);
  if (answer.verdict != Reply::kAccepted) {
    const Fault::Kind kind = answer.verdict == Reply::kMoreThanMaxRows ? Fault::kTooManyRows
                             : answer.verdict == Reply::kSlotTooSmall  ? Fault::kFullSlot
                                                                       : Fault::kNoRoom;
    report(now, kind, dst, static_cast<std::int64_t>(answer.needed), static_cast<std::int64_t>(answer.there));
    return false;
  }
  to.first_arrival = answer.first_arrival;
  to.first_rows = now.reply_first_rows(me, dst);
  to.writes_here = false;
  if (now.far(dst)) return true;
  to.block = now.window(dst) + answer.block_at;
  to.rows = answer.rows, to.arrivals = answer.arrivals;
  to.at = plan::OutputBlock::place(p.shape, p.layout, answer.rows, answer.arrivals);
  const bool far_block = static_cast<int>(blockIdx.x) < p.roles.far;
  to.writes_here = p.roles.far == 0 || far_block == (p.common.peers[dst].same_device == 0);
  return true;
}

// What the routes say of one selection. Until a handle is cached its numbers are relative to what the receivers reply.
struct Route {
  std::int32_t rank;  // -1: none
  std::int32_t row, slot;
};

// Of a token's selection k, if there is one.
__device__ Route read_route(const DispatchParams& p, int token, int k) {
  Route route{-1, 0, 0};
  if (token >= p.num_tokens || k >= p.num_topk) return route;
  const std::int64_t at = std::int64_t{token} * p.num_topk + k;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  route.rank = p.routes.dst_rank[at];
  route.row = p.cached ? (by_rank ? p.routes.dst_arrival : p.routes.dst_row)[at]
                       : (by_rank ? p.routes.relative_arrival : p.routes.relative_row)[at];
  if (!p.cached && !by_rank) route.slot = p.routes.slot[at];
  return route;
}

__device__ std::int64_t final_row(const DispatchParams& p, const Destination& to, const Route& route) {
  if (p.cached) return route.row;
  return route.row + (p.layout == OutputLayout::kByRank ? to.first_arrival : to.first_rows[route.slot]);
}

// Whether the lane's selection is its token's first to that rank: what goes once per rank goes with this one.
// `token_here` tells the tokens of one warp apart; `chunk` says which of its token's selections the warp has.
__device__ bool first_to_rank(const DispatchParams& p, int rank, int token, int token_here, int chunk, int lane) {
  const unsigned same = __match_any_sync(kAllLanes, rank >= 0 ? rank * 32 + token_here : -1);
  bool first = rank >= 0 && lane == __ffs(same) - 1;
  for (int j = 0; first && j < chunk * 32; ++j) first = p.routes.dst_rank[std::int64_t{token} * p.num_topk + j] != rank;
  return first;
}

}  // namespace
}  // namespace deep_ep::cuda
