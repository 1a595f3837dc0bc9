// SPDX-License-Identifier: MIT
// Low-latency combine of few rows: they go home as lines (plan/lines.h).
#pragma once

#include "cuda/lines.cuh"
#include "cuda/low_latency_combine.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// Slots of the ticket in an owner's window:  [ pieces of the row | weights ]
struct LineSlots {
  std::byte* base;
  std::uint32_t stride;
  int pieces;
  plan::CombineSlots slots;

  __device__ LineSlots(const Now& now, const Params& p, std::byte* window)
      : base(window + now.common.layout.lines(ticket_of(now))),
        stride(static_cast<std::uint32_t>(p.slot_lines)),
        pieces(p.pieces),
        slots(p.slots) {}
  // Of the row of selection k, which rank `rank` sends.
  __device__ int slot(int k, int rank) const { return slots.by_rank ? rank : k; }
  __device__ std::byte* piece(int token, int slot, int piece) const {
    return base + std::uint64_t{static_cast<std::uint32_t>(token * slots.of_token + slot)} * stride +
           piece * plan::kPieceLineBytes;
  }
  // The line in which weight `k` comes with a row.
  __device__ std::byte* weight(int token, int slot, int k) const {
    return piece(token, slot, pieces) + k / plan::kLineWords * plan::kLineBytes;
  }
};

// One piece of the rows of the selections in `selected`, as they are.
__device__ void send_rows_by_lines(const Now& now, const Params& p, const LineSlots& home, const Arrival& from,
                                   unsigned selected, int lane) {
  constexpr int kAtOnce = 4;
  const std::int64_t begin = std::int64_t{from.part} * plan::kPieceBytes;
  const int count = PieceOfRow::count(p.row_bytes - begin, lane);
  for (unsigned rest = selected; rest != 0;) {
    PieceOfRow rows[kAtOnce];
    std::byte* to[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int k = __ffs(rest) - 1;
      const std::int64_t row = __shfl_sync(kAllLanes, from.row, k >= 0 ? k : 0);
      to[r] = k >= 0 ? home.piece(from.token, home.slot(k, p.common.rank), from.part) : nullptr;
      if (k >= 0) rows[r].load(p.x + row * p.row_bytes + begin, count, lane);
      rest &= rest - 1;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (to[r] != nullptr) rows[r].send(to[r], count, static_cast<std::uint32_t>(now.epoch), lane);
  }
}

// The same rows weighed, added and rounded: one row into the slot of the highest selection.
template <class Number>
__device__ void send_sum_by_lines(const Now& now, const Params& p, const LineSlots& home, const Arrival& from,
                                  unsigned selected, int lane) {
  constexpr int kAtOnce = 4;
  const std::int64_t begin = std::int64_t{from.part} * plan::kPieceBytes;
  const int count = PieceOfRow::count(p.row_bytes - begin, lane);
  const float weight =
      p.arrival_weights != nullptr && lane < p.num_topk ? p.arrival_weights[from.arrival * p.num_topk + lane] : 1;
  Vector<Number> sum[plan::kPieceVectors];
  for (unsigned rest = selected; rest != 0;) {
    PieceOfRow rows[kAtOnce];
    float weights[kAtOnce];
    const int here = min(__popc(rest), kAtOnce);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int k = r < here ? __ffs(rest) - 1 : 0;
      const std::int64_t row = __shfl_sync(kAllLanes, from.row, k);
      weights[r] = __shfl_sync(kAllLanes, weight, k);
      if (r < here) rows[r].load(p.x + row * p.row_bytes + begin, count, lane);
      rest &= rest - 1;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i)
        if (r < here) sum[i].add(rows[r].v[i], weights[r]);
  }
  PieceOfRow joined;
#pragma unroll
  for (int i = 0; i < plan::kPieceVectors; ++i) joined.v[i] = sum[i].narrow();
  const int slot = home.slot(31 - __clz(selected), p.common.rank);
  joined.send(home.piece(from.token, slot, from.part), count, static_cast<std::uint32_t>(now.epoch), lane);
}

// Weights that travel home: where a slot is all that a rank sends, all of the arrival's with its row, else one with
// each.
__device__ void send_weights_by_lines(const Now& now, const Params& p, const LineSlots& home, const Arrival& from,
                                      unsigned selected, int lane) {
  const auto number = static_cast<std::uint32_t>(now.epoch);
  const bool joined = p.layout == OutputLayout::kByRank;
  float weight = 0;
  if (joined && lane < p.num_topk) weight = p.x_weights[from.arrival * p.num_topk + lane];
  if (!joined && from.row >= 0) weight = p.x_weights[from.row];
  const std::uint32_t word = __float_as_uint(weight);
  if (joined || home.slots.by_rank) {
    const int slot = home.slot(31 - __clz(selected), p.common.rank);
    send_words(home.weight(from.token, slot, 0), p.num_topk, word, number, lane);
  } else if (from.row >= 0) {
    ptx::store_whole_system(home.weight(from.token, home.slot(lane, p.common.rank), lane), {word, word, word, number});
  }
}

template <class Number>
__device__ void send_piece(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                           const Arrival& from, int lane) {
  const int home = home_of(first_arrival, from.arrival);
  const unsigned selected = __ballot_sync(kAllLanes, from.row >= 0);
  if (!peers.active(home) || selected == 0) return;
  const LineSlots slots(now, p, peers.window(home));
  if (p.pre_reduce && p.layout != OutputLayout::kByRank) {
    send_sum_by_lines<Number>(now, p, slots, from, selected, lane);
  } else {
    const unsigned highest = 1u << (31 - __clz(selected));
    send_rows_by_lines(now, p, slots, from, one_row_per_rank(p) ? highest : selected, lane);
  }
  if (from.part == 0 && p.x_weights != nullptr) send_weights_by_lines(now, p, slots, from, selected, lane);
}

// Sixteen bytes of a token's sum for each lane. False: not all has come.
template <class Number, bool kLevels>
__device__ bool sum_chunk_of_lines(const Now& now, const Params& p, const Terms& t, const LineSlots& slots, int token,
                                   int chunk, float weight, int lane) {
  constexpr int kAtOnce = kLevels ? 4 : 8;
  const std::int64_t byte = std::int64_t{chunk} * 512 + 16 * lane;
  const int piece = chunk / plan::kPieceVectors, which = chunk % plan::kPieceVectors;
  const bool mine = byte < p.row_bytes;
  const auto number = static_cast<std::uint32_t>(now.epoch);
  // Lane i knows all of the i-th row to add.
  const int rank = __shfl_sync(kAllLanes, t.rank, t.k), slot = slots.slot(t.k, rank);
  weight = __shfl_sync(kAllLanes, weight, t.k);
  const std::byte* const of_token = slots.piece(token, 0, piece);
  Sum<Number, kLevels> sum;
  if (p.order.bias_first) add_biases(p, sum.of_all, token, byte);
  for (int first = 0; first < t.count; first += kAtOnce) {
    VectorLines rows[kAtOnce];
    for (int looks = 1;; ++looks) {
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const auto at = static_cast<std::uint32_t>(__shfl_sync(kAllLanes, slot, (first + r) % 32));
        if (first + r < t.count && mine) rows[r].look(of_token + std::uint64_t{at} * slots.stride, which, lane);
      }
      int missing = -1;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
        if (first + r < t.count && mine && !rows[r].came(number)) missing = first + r;
      if (__all_sync(kAllLanes, missing < 0)) break;
      const int peer = __shfl_sync(kAllLanes, rank, missing < 0 ? 0 : missing);
      if (looks % kLooksBetweenClocks == 0 && gives_up(now, missing < 0, peer)) return false;
      // Waiting looks at one line of each row: at all of them, hundreds of warps would hold up those who write.
      const bool watches = lane >= first && lane < min(first + kAtOnce, t.count);
      const std::byte* const watched = of_token + std::uint64_t{static_cast<std::uint32_t>(slot)} * slots.stride;
      if (!await_watched(now, watches ? watched + 512 * plan::kPieceVectors : nullptr, rank)) return false;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const float w = __shfl_sync(kAllLanes, weight, (first + r) % 32);
      const int closes = kLevels ? __shfl_sync(kAllLanes, t.closes, (first + r) % 32) : 0;
      if (first + r < t.count) sum.add(p.order, rows[r].vector(which), w, closes);
    }
  }
  if (!p.order.bias_first) add_biases(p, sum.of_all, token, byte);
  if (mine) __stcs(reinterpret_cast<uint4*>(p.out + token * p.row_bytes + byte), sum.of_all.narrow());
  return true;
}

// Weights that came home with a token's rows. False: not all has come.
__device__ bool join_weights(const Now& now, const Params& p, const Terms& t, const LineSlots& slots, int token,
                             int lane) {
  bool good = true;
  const auto entry = [&](bool wanted, int row, int k) {
    uint4 line{};
    const int slot = slots.slot(row, __shfl_sync(kAllLanes, t.rank, row & 31));
    for (int looks = 1; good; ++looks) {
      if (wanted) line = ptx::load_whole_system(slots.weight(token, slot, k));
      const bool came = !wanted || line.w == static_cast<std::uint32_t>(now.epoch);
      if (__all_sync(kAllLanes, came)) break;
      if (looks % kLooksBetweenClocks == 0 && gives_up(now, came, t.rank)) good = false;
    }
    const int word = k % plan::kLineWords;
    return wanted ? __uint_as_float(word == 0 ? line.x : word == 1 ? line.y : line.z) : 0.0f;
  };
  const float joined = home_weight(p, t, entry, lane);
  if (lane < p.num_topk) p.weights_out[std::int64_t{token} * p.num_topk + lane] = joined;
  return good;
}

// False: not all has come.
template <class Number, bool kLevels>
__device__ bool sum_lines(const Now& now, const Params& p, const Peers& peers, const Place& at) {
  bool good = true;
  const int chunks = p.row_bytes > 0 ? static_cast<int>((p.row_bytes + 511) / 512) : 1;
  const LineSlots slots(now, p, p.window);
  for (int unit = at.number(); good && unit < p.num_tokens * chunks; unit += at.warps()) {
    const int token = unit / chunks, chunk = unit % chunks;
    const float weight = weight_of_selection(p, token, at.lane);
    const Terms t = make_terms(p, peers, rank_of_selection(p, token, at.lane), at.lane);
    if (p.row_bytes > 0) good = sum_chunk_of_lines<Number, kLevels>(now, p, t, slots, token, chunk, weight, at.lane);
    if (chunk == 0 && p.weights_out != nullptr) good = join_weights(now, p, t, slots, token, at.lane) && good;
  }
  return good;
}

}  // namespace
}  // namespace deep_ep::cuda
