// SPDX-License-Identifier: MIT
// Low-latency dispatch, place: a warp waits for a piece of a row and puts it at each of its experts.
#pragma once

#include "cuda/low_latency_gather.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A token that comes here, as a warp holds it: lane k its selection k.
struct Arrived {
  const std::byte* message;
  int src, token;
  std::int32_t arrival;  // -1: it does not come
  std::int32_t slot;     // of the lane's selection; -1: not here
  std::int32_t row;      // where it goes; -1: nowhere
};

// What a source says of a token, or of the lane's selection of it: numbers among those that it sends here.
struct Told {
  std::int32_t slot, row;
  std::int32_t arrival;  // negative: the token does not come here
};

__device__ Arrived arrived(const Params& p, const Gathered& g, const std::byte* message, int src, int token,
                           const Told& told, int lane) {
  Arrived a{message, src, token, -1, -1, -1};
  if (told.arrival < 0) return a;
  a.arrival = g.first_arrival[src] + told.arrival;
  if (a.arrival >= p.most_arrivals) a.arrival = -1;  // of a peer that makes another call
  if (lane >= p.num_topk || static_cast<std::uint32_t>(told.slot) >= static_cast<std::uint32_t>(p.num_slots)) return a;
  a.slot = told.slot;
  a.row = p.layout == OutputLayout::kByRank
              ? a.arrival
              : g.slot_first[a.slot] + g.rows_before[src * p.num_slots + a.slot] + told.row;
  if (static_cast<std::uint32_t>(a.row) >= static_cast<std::uint32_t>(p.most_rows)) a.row = -1;
  return a;
}

// What comes beside a row, as lines.
struct LinesBeside {
  const Now now;
  const Params& p;
  const std::byte* message;
  int src, lane;

  uint4 weights;  // the line with the lane's, which has come

  __device__ float weight() const { return __uint_as_float(word_of(weights, lane % plan::kLineWords)); }
  // Every lane; each takes words of its own.
  template <class Write>
  __device__ bool side(int i, int words, const Write& write) const {
    return receive_array(now, message + p.lines.side_at[i], words, src, lane, write);
  }
  template <class Write>
  __device__ bool scales(const Write& write) const {
    return receive_array(now, message + p.lines.scales_at, p.shape.num_scales, src, lane, write);
  }
};

// All that comes once per token. False: not all has come.
template <class Beside>
__device__ bool place_beside(const Params& p, const Arrived& a, const Beside& beside, int lane) {
  const bool by_rank = p.layout == OutputLayout::kByRank;
  const std::int64_t entry = std::int64_t{a.arrival} * p.num_topk + lane;
  bool good = true;
  if (lane < p.num_topk) {
    std::byte* const ids = p.block + p.at.topk_idx_at;
    if (p.shape.topk_idx_bytes == 8) {
      reinterpret_cast<std::int64_t*>(ids)[entry] = a.slot;
    } else {
      reinterpret_cast<std::int32_t*>(ids)[entry] = a.slot;
    }
    p.tables.arrival_row[entry] = a.row;
    const bool stays = a.src == p.common.rank;
    const std::int64_t own = std::int64_t{a.token} * p.num_topk + lane;
    if (stays) p.tables.own_row[own] = a.row;
    if (p.tables.row_token != nullptr && a.row >= 0) p.tables.row_token[a.row] = a.token;
    if (p.shape.topk_weights) {
      const float weight = beside.weight();
      auto* const weights = reinterpret_cast<float*>(p.block + p.at.topk_weights_at);
      p.tables.arrival_weights[entry] = weight;
      if (stays) p.tables.own_weights[own] = weight;
      if (by_rank) weights[entry] = weight;
      if (!by_rank && a.row >= 0) weights[a.row] = weight;
    }
  }
  if (lane == 0) p.tables.src_token[a.arrival] = a.token;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const int words = static_cast<int>(p.shape.side_bytes[i] / 4);
    auto* const to = reinterpret_cast<std::int32_t*>(p.block + p.at.side_at[i]) + std::int64_t{a.arrival} * words;
    good = beside.side(i, words, [&](int word, std::int32_t value) { to[word] = value; }) && good;
  }
  return good;
}

// The rows that a token takes here: one, however many selections, where rows are not by expert.
__device__ unsigned targets_of(const Params& p, const Arrived& a) {
  const unsigned rows = __ballot_sync(kAllLanes, a.row >= 0);
  return p.layout == OutputLayout::kByRank ? rows & (~rows + 1) : rows;
}

__device__ std::int32_t* scales_of(const Params& p, std::int64_t row) {
  return reinterpret_cast<std::int32_t*>(p.block + p.at.scales_at) + p.at.first_scale(row);
}

// Scales that the caller brought, with the first piece. `row`: of the lane's selection. False: not all has come.
template <class Beside>
__device__ __noinline__ bool place_given_scales(const Params& p, Beside beside, std::int32_t row, unsigned targets) {
  std::int32_t rows[32];  // in memory: lanes take words apart from one another
  for (int k = 0; k < 32; ++k) rows[k] = __shfl_sync(kAllLanes, row, k);
  return beside.scales([&](int word, std::int32_t value) {
    for (unsigned rest = targets; rest != 0; rest &= rest - 1)
      scales_of(p, rows[__ffs(rest) - 1])[word * p.at.scale_column_stride] = value;
  });
}

// What comes with the first piece of a row. False: not all has come.
template <class Beside>
__device__ bool place_rest(const Params& p, const Arrived& a, const Beside& beside, int lane) {
  const bool good = !p.scales_given || place_given_scales(p, beside, a.row, targets_of(p, a));
  return place_beside(p, a, beside, lane) && good;
}

// Where the first of a lane's scales of a piece stands among the row's, and how far the next one of it is away.
struct ScaleAt {
  int first, step;
  __device__ ScaleAt(const Params& p, int piece, int lane) {
    const bool packed = p.scale_kind == plan::Fp8Scale::kUe8m0;
    step = packed ? 1 : 4;
    first = piece * plan::kPieceVectors * step + (packed ? 0 : lane / 8);
  }
};

// A piece of a row and its scales, to each row of the token here. `came.vector(i)`: sixteen bytes of the lane. Each
// lane says where that of its selection lies: one after the other, in every lane, that would take longer than all the
// rest.
template <class Piece>
__device__ void place_piece(const Params& p, const Arrived& a, const Piece& came, uint4 scales, int piece, int lane) {
  const int count = vectors_of(p, piece, lane);
  const std::int64_t row = a.row >= 0 ? a.row : 0;
  std::byte* const row_at =
      p.block + p.at.x_at + row * static_cast<std::int64_t>(p.shape.row_bytes) + piece * plan::kPieceBytes;
  std::int32_t* const scales_at = p.quantize ? scales_of(p, row) : nullptr;
  const bool writes = p.quantize && writes_scales(p, count, lane);
  const ScaleAt scale(p, piece, lane);
  const std::int64_t first = scale.first * p.at.scale_column_stride, step = scale.step * p.at.scale_column_stride;
  const uint4 v[plan::kPieceVectors] = {came.vector(0), came.vector(1), came.vector(2)};
  for (unsigned rest = targets_of(p, a); rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    std::byte* const to = from_lane(row_at, k) + 16 * lane;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (i < count) store16(to + 512 * i, v[i]);
    if (!p.quantize) continue;
    std::int32_t* const scale_to = from_lane(scales_at, k) + first;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (writes && i < count) scale_to[i * step] = static_cast<std::int32_t>(word_of(scales, i));
  }
}

// A piece of a token that may come, as a warp looks for it.
struct Incoming {
  const std::byte* message = nullptr;
  int src = 0, token = 0, piece = 0;
  int count = 0;  // of the lane's vectors
  bool scaled = false, weighed = false;
  PieceLines row;
  uint4 head{}, scales{}, weights{};

  // Pieces in the order of token numbers, whoever sends them: which is which is known before anybody has counted.
  __device__ Incoming(const Params& p, const Messages& messages, int unit, int lane) {
    const int ranks = p.common.num_ranks, message_number = p.per.pieces.quotient(unit);
    piece = unit - message_number * p.pieces;
    token = p.per.ranks.quotient(message_number);
    src = message_number - token * ranks;
    message = messages.of(src, token);
    count = vectors_of(p, piece, lane);
    scaled = p.quantize && writes_scales(p, count, lane);
    weighed = piece == 0 && p.shape.topk_weights && lane < p.num_topk;
  }
  __device__ void look(const Params& p, int lane) {
    if (lane < p.num_topk) head = ptx::load_whole_system(message + plan::kLineBytes * lane);
    row.look(message + p.lines.row_at + piece * plan::kPieceLineBytes, count, lane);
    if (scaled) scales = ptx::load_whole_system(message + p.lines.scales_at + scale_line(piece, lane));
    if (weighed)
      weights = ptx::load_whole_system(message + p.lines.weights_at + lane / plan::kLineWords * plan::kLineBytes);
  }
  // A warp: looks until all is here, or until `enough`. A row that has begun to come is looked at whole.
  template <class Enough>
  __device__ void look_until(const Params& p, std::uint32_t number, const Enough& enough, int lane) {
    for (;;) {
      look(p, lane);
      const bool here = (lane >= p.num_topk || head.w == number) && came(number);
      if (__all_sync(kAllLanes, here) || enough()) return;
    }
  }
  __device__ bool came(std::uint32_t number) const {
    return row.came(count, number) && (!scaled || scales.w == number) && (!weighed || weights.w == number);
  }
};

// A warp: waits for a piece of a token, at which it has looked once, and places it. False: it did not come.
__device__ bool receive_piece(const Now& now, const Params& p, const Gathered& g, Incoming& in, int lane) {
  const std::uint32_t number = number_of(now);
  for (int looks = 1;; ++looks, in.look(p, lane)) {
    const bool told = lane >= p.num_topk || in.head.w == number;
    const bool stays_away = __shfl_sync(kAllLanes, told && static_cast<std::int32_t>(in.head.z) < 0, 0);
    if (stays_away) return true;
    const bool came = told && in.came(number);
    if (__all_sync(kAllLanes, came)) break;
    if (looks % kLooksBetweenClocks == 0 && gives_up(now, came, in.src)) return false;
    // Waiting looks at two lines, the head's first and, once that says that the token comes, the piece's last: at all
    // of them, hundreds of warps would hold up those who write.
    const std::byte* const last =
        in.message + p.lines.row_at + in.piece * plan::kPieceLineBytes + 512 * plan::kPieceVectors;
    const bool heads = __any_sync(kAllLanes, !told) != 0;
    if (!await_watched(now, lane == 0 ? (heads ? in.message : last) : nullptr, in.src)) return false;
  }
  const Told told{static_cast<std::int32_t>(in.head.x), static_cast<std::int32_t>(in.head.y),
                  static_cast<std::int32_t>(__shfl_sync(kAllLanes, in.head.z, 0))};
  const Arrived a = arrived(p, g, in.message, in.src, in.token, told, lane);
  if (a.arrival < 0) return true;
  place_piece(p, a, in.row, in.scales, in.piece, lane);
  return in.piece != 0 || place_rest(p, a, LinesBeside{now, p, in.message, in.src, lane, in.weights}, lane);
}

// Rows that nobody writes: padding between experts is zero, ids behind the last arrival say "nobody".
__device__ void clear_unwritten(const Params& p, const Gathered& g, const Place& at) {
  const int number = at.number(), warps = at.warps();
  for (int slot = number; p.layout == OutputLayout::kByExpert && slot < p.num_slots; slot += warps) {
    const std::int64_t end = min(std::int64_t{g.slot_first[slot + 1]}, p.most_rows);
    for (std::int64_t row = g.slot_first[slot] + g.slot_rows[slot]; row < end; ++row) {
      std::byte* const x = p.block + p.at.x_at + row * static_cast<std::int64_t>(p.shape.row_bytes);
      for (std::int64_t byte = 16 * at.lane; byte < static_cast<std::int64_t>(p.shape.row_bytes); byte += 512)
        store16(x + byte, uint4{});
      auto* const scales = reinterpret_cast<std::int32_t*>(p.block + p.at.scales_at) + p.at.first_scale(row);
      for (int word = at.lane; word < p.shape.num_scales; word += 32) scales[word * p.at.scale_column_stride] = 0;
      if (p.shape.topk_weights && at.lane == 0) reinterpret_cast<float*>(p.block + p.at.topk_weights_at)[row] = 0;
    }
  }
  const std::int64_t words = p.shape.topk_idx_bytes / 4 * p.num_topk;
  auto* const ids = reinterpret_cast<std::int32_t*>(p.block + p.at.topk_idx_at);
  for (std::int64_t i = g.first_arrival[p.common.num_ranks] * words + number * 32 + at.lane;
       i < p.most_arrivals * words; i += std::int64_t{warps} * 32)
    ids[i] = -1;
}

}  // namespace
}  // namespace deep_ep::cuda
