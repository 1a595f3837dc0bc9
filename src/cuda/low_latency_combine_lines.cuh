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
      : base(window + now.common.layout.lines(ticket_of(now)) + plan::call_lines(p.common.num_ranks)),
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

// Some rows of a piece, on their way from x. All loads go before anything is done with them, and without a condition,
// as in low_latency_combine.cuh.
struct SomeRows {
  static constexpr int kMost = 4;
  PieceOfRow of[kMost];

  // The first of those that `rest` names, if any; takes them out of it.
  __device__ void load(const Params& p, const Arrival& from, unsigned& rest, int lane) {
    const std::int64_t begin = std::int64_t{from.part} * plan::kPieceBytes;
    const int count = rest != 0 ? PieceOfRow::count(p.row_bytes - begin, lane) : 0;
    int k = 0;
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (rest != 0) k = __ffs(rest) - 1;
      rest &= rest - 1;
      const std::byte* const at = p.x + __shfl_sync(kAllLanes, from.row, k) * p.row_bytes + begin + 16 * lane;
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i)
        of[r].v[i] = ptx::load_constant(i < count ? at + 512 * i : count > 0 ? at : p.window);
    }
  }
};

// Which rows of an arrival are sent, or added to be sent, by selection.
__device__ unsigned rows_sent(const Params& p, const Arrival& from) {
  const unsigned selected = __ballot_sync(kAllLanes, from.row >= 0);
  return one_row_per_rank(p) && !adds_before(p) && selected != 0 ? 1u << (31 - __clz(selected)) : selected;
}

// One piece of the rows of the selections in `selected`, as they are. `rows`: the first of them, loaded, of which
// `rest` are left.
__device__ void send_rows_by_lines(const Now& now, const Params& p, const LineSlots& home, const Arrival& from,
                                   unsigned selected, SomeRows& rows, unsigned rest, int lane) {
  const int count = PieceOfRow::count(p.row_bytes - std::int64_t{from.part} * plan::kPieceBytes, lane);
  for (;;) {
#pragma unroll
    for (int r = 0; r < SomeRows::kMost; ++r) {
      if (selected == rest) continue;
      const int k = __ffs(selected) - 1;
      rows.of[r].send(home.piece(from.token, home.slot(k, p.common.rank), from.part), count,
                      static_cast<std::uint32_t>(now.epoch), lane);
      selected &= selected - 1;
    }
    if (rest == 0) return;
    rows.load(p, from, rest, lane);
  }
}

// The same rows weighed, added and rounded: one row into the slot of the highest selection.
template <class Number>
__device__ void send_sum_by_lines(const Now& now, const Params& p, const LineSlots& home, const Arrival& from,
                                  unsigned selected, SomeRows& rows, unsigned rest, int lane) {
  const int highest = 31 - __clz(selected);
  const int count = PieceOfRow::count(p.row_bytes - std::int64_t{from.part} * plan::kPieceBytes, lane);
  Vector<Number> sum[plan::kPieceVectors];
  for (;;) {
#pragma unroll
    for (int r = 0; r < SomeRows::kMost; ++r) {
      if (selected == rest) continue;
      const float weight = __shfl_sync(kAllLanes, from.weight, __ffs(selected) - 1);
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i) sum[i].add(rows.of[r].v[i], weight);
      selected &= selected - 1;
    }
    if (rest == 0) break;
    rows.load(p, from, rest, lane);
  }
  PieceOfRow joined;
#pragma unroll
  for (int i = 0; i < plan::kPieceVectors; ++i) joined.v[i] = sum[i].narrow();
  joined.send(home.piece(from.token, home.slot(highest, p.common.rank), from.part), count,
              static_cast<std::uint32_t>(now.epoch), lane);
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

// Phase send. The first piece's rows are read before anybody may be written to, and of each piece its rows' numbers
// while the one before it is sent. False: not all was sent.
template <class Number, class Open>
__device__ bool send_by_lines(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                              const Open& open, const Place& at) {
  const int pieces = p.pieces > 0 ? p.pieces : 1;
  const int most = p.common.num_ranks * p.max_tokens_per_rank * pieces;
  int unit = at.number();
  Arrival from{};
  if (unit < most) from = Arrival(p, unit / pieces, unit % pieces, at.lane);
  // The tables have room for the most that can come; behind the last arrival they name no rows.
  const int units = p.first_arrival[p.common.num_ranks] * pieces;
  const int stays_from = p.first_arrival[p.common.rank], stays_to = p.first_arrival[p.common.rank + 1];
  const auto stays = [&](int arrival) { return p.own_row != nullptr && arrival >= stays_from && arrival < stays_to; };
  unsigned selected = 0, rest = 0;
  SomeRows rows;
  const auto load = [&] {
    rest = selected = stays(from.arrival) ? 0 : rows_sent(p, from);
    rows.load(p, from, rest, at.lane);
  };
  if (unit < units) load();
  if (!open()) return false;
  while (unit < units) {
    const Arrival here = from;
    unit += at.warps();
    if (unit < units) from = Arrival(p, unit / pieces, unit % pieces, at.lane);
    const int home = home_of(first_arrival, here.arrival);
    if (selected != 0 && peers.active(home)) {
      const LineSlots slots(now, p, peers.window(home));
      if (adds_before(p)) {
        send_sum_by_lines<Number>(now, p, slots, here, selected, rows, rest, at.lane);
      } else {
        send_rows_by_lines(now, p, slots, here, selected, rows, rest, at.lane);
      }
      if (here.part == 0 && p.x_weights != nullptr) send_weights_by_lines(now, p, slots, here, selected, at.lane);
    }
    if (unit < units) load();
  }
  return true;
}

// What a warp adds for a chunk of a token. Lane i: where the lines of the i-th row's chunk begin, or, for a row that
// lies in x, its bytes; how far behind the line with their fourth words lies, 0 in x; what weighs it; who sends it.
struct LineSummands {
  const Terms& terms;
  const OwnRows& own;
  const std::byte* at;
  int to_fourth;
  float weight;
  int rank;
  int which;  // of a piece's vectors
  bool mine;  // the lane's sixteen bytes lie in the row
};

// Up to kAtOnce rows from the first-th on, at least one. `own_sum`: what stands for the rows of this rank, if `joined`.
// False: not all has come.
template <int kAtOnce, class Number, bool kLevels>
__device__ bool add_some_rows(const Now& now, const Params& p, Sum<Number, kLevels>& sum, const LineSummands& s,
                              int first, bool joined, const uint4& own_sum, int lane) {
  const auto number = static_cast<std::uint32_t>(now.epoch);
  const int last = s.terms.count - 1;
  const unsigned own = s.own.terms >> first;
  VectorLines rows[kAtOnce];
  for (int looks = 1;; ++looks) {
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int i = min(first + r, last);
      rows[r].look(from_lane(s.at, i) + (s.mine ? 16 * lane : 0), __shfl_sync(kAllLanes, s.to_fourth, i));
    }
    int missing = -1;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (first + r <= last && (own >> r & 1) == 0 && s.mine && !rows[r].came(number)) missing = first + r;
    if (__all_sync(kAllLanes, missing < 0)) break;
    const int peer = __shfl_sync(kAllLanes, s.rank, missing < 0 ? 0 : missing);
    if (looks % kLooksBetweenClocks == 0 && gives_up(now, missing < 0, peer)) return false;
    // Waiting looks at one line of each row: at all of them, hundreds of warps would hold up those who write.
    const bool watches = lane >= first && lane <= min(first + kAtOnce - 1, last) && s.to_fourth != 0;
    if (!await_watched(now, watches ? s.at + s.to_fourth : nullptr, s.rank)) return false;
  }
#pragma unroll
  for (int r = 0; r < kAtOnce; ++r) {
    const float w = __shfl_sync(kAllLanes, s.weight, (first + r) % 32);
    const int closes = kLevels ? __shfl_sync(kAllLanes, s.terms.closes, (first + r) % 32) : 0;
    if (first + r > last) continue;
    const bool in_x = (own >> r & 1) != 0;
    sum.add(p.order, !in_x ? rows[r].vector(s.which) : joined ? own_sum : rows[r].line, w, closes);
  }
  return true;
}

// Sixteen bytes of a token's sum for each lane. `weight`: of the lane-th row to add. False: not all has come.
template <class Number, bool kLevels>
__device__ bool sum_chunk_of_lines(const Now& now, const Params& p, const Terms& t, const OwnRows& own,
                                   const LineSlots& slots, int token, int chunk, float weight, int lane) {
  const std::int64_t begin = std::int64_t{chunk} * 512, byte = begin + 16 * lane;
  const int piece = chunk / plan::kPieceVectors, which = chunk - piece * plan::kPieceVectors;
  const bool mine = byte < p.row_bytes, joined = adds_before(p) && own.terms != 0;
  const int rank = __shfl_sync(kAllLanes, t.rank, t.k);
  const std::int32_t own_row = __shfl_sync(kAllLanes, own.row, t.k);
  const LineSummands s{t,
                       own,
                       own_row >= 0 ? p.x + own_row * p.row_bytes + begin
                                    : slots.piece(token, slots.slot(t.k, rank), piece) + 512 * which,
                       own_row >= 0 ? 0 : 512 * (plan::kPieceVectors - which),
                       weight,
                       rank,
                       which,
                       mine};
  uint4 own_sum[1]{};
  if (joined) sum_of_rows<Number>(p, own.selected, own.row, own.weight, byte, own_sum);
  Sum<Number, kLevels> sum;
  if (p.order.bias_first) add_biases(p, sum.of_all, token, byte);
  int first = 0;
  bool good = true;
  if constexpr (!kLevels)
    for (; good && t.count - first > 4; first += 8)
      good = add_some_rows<8>(now, p, sum, s, first, joined, own_sum[0], lane);
  for (; good && t.count - first > 2; first += 4)
    good = add_some_rows<4>(now, p, sum, s, first, joined, own_sum[0], lane);
  if (good && first < t.count) good = add_some_rows<2>(now, p, sum, s, first, joined, own_sum[0], lane);
  if (!good) return false;
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

// Warps that had fewest pieces to send come first: `sent`, pieces up to the last that another rank got. False: not all
// has come.
template <class Number, bool kLevels>
__device__ bool sum_lines(const Now& now, const Params& p, const Peers& peers, int sent, const Place& at) {
  bool good = true;
  const Shares shares(p, at);
  const LineSlots slots(now, p, p.window);
  int unit = at.number() - sent % at.warps();
  if (unit < 0) unit += at.warps();
  const auto read = [&] {
    const bool has = unit < shares.units;
    return OfToken(p, has ? unit / shares.of_token : 0, has ? at.lane : p.num_topk);
  };
  OfToken ahead = read();
  while (good && unit < shares.units) {
    const OfToken of = ahead;
    const int token = unit / shares.of_token, first = unit % shares.of_token * shares.of_warp;
    unit += at.warps();
    ahead = read();
    const Terms t = make_terms(p, peers, of.rank, at.lane);
    const OwnRows own(of, t);
    const float weight = __shfl_sync(kAllLanes, of.weight, t.k);
    const int end = p.row_bytes > 0 ? min(first + shares.of_warp, shares.chunks) : 0;
    for (int chunk = first; good && chunk < end; ++chunk)
      good = sum_chunk_of_lines<Number, kLevels>(now, p, t, own, slots, token, chunk, weight, at.lane);
    if (first == 0 && p.weights_out != nullptr) good = join_weights(now, p, t, slots, token, at.lane) && good;
  }
  return good;
}

}  // namespace
}  // namespace deep_ep::cuda
