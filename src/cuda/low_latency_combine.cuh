// SPDX-License-Identifier: MIT
// Low-latency combine: what both of its forms are made of. Rows come home either as lines that say themselves that they
// have come (few tokens) or as parts that flags announce (many).
#pragma once

#include "cuda/encode.cuh"
#include "cuda/low_latency.cuh"
#include "plan/sum_order.h"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

using Params = LowLatencyCombineParams;

constexpr int kChunk = 512;  // bytes of a row that a warp adds at a time: sixteen for each lane

// Only one row of a rank comes home for a token, at the rank's highest selection.
__device__ bool one_row_per_rank(const Params& p) { return p.pre_reduce || p.layout == OutputLayout::kByRank; }

// Of a token or arrival one row goes home from a rank, the weighed sum of several.
__device__ bool adds_before(const Params& p) { return p.pre_reduce && p.layout != OutputLayout::kByRank; }

// Sixteen bytes of a row, as floats.
template <class Number>
struct Vector {
  static constexpr int kFours = 16 / static_cast<int>(sizeof(typename Number::Four));
  float x[kFours][4] = {};

  __device__ void add(uint4 v, float weight) {
    const auto* fours = reinterpret_cast<const typename Number::Four*>(&v);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      float widened[4];
      Number::widen(fours[i], widened);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] = plan::fma_rn(weight, widened[j], x[i][j]);  // a weight of 1 adds exactly
    }
  }
  __device__ uint4 narrow() const {
    uint4 v;
    Number::narrow_all(x, *reinterpret_cast<typename Number::Four(*)[kFours]>(&v));
    return v;
  }
  // A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
  __device__ void close_into(Vector& above) {
    above.add(narrow(), 1);
    *this = Vector{};
  }
};

// A sum of rows in the plan's order, sixteen bytes of it.
template <class Number, bool kLevels>
struct Sum {
  Vector<Number> of_all;
  __device__ void add(const SumOrder&, uint4 v, float weight, int) { of_all.add(v, weight); }
};
template <class Number>
struct Sum<Number, true> {
  Vector<Number> of_all, of_rank, of_node;
  // `closes`: as in Terms.
  __device__ void add(const SumOrder& order, uint4 v, float weight, int closes) {
    // No reference to either of two: registers have no addresses.
    if (order.round_per_rank) of_rank.add(v, weight);
    if (!order.round_per_rank) of_node.add(v, weight);
    if ((closes & 1) != 0 && order.round_per_node) of_rank.close_into(of_node);
    if ((closes & 1) != 0 && !order.round_per_node) of_rank.close_into(of_all);
    if ((closes & 2) != 0) of_node.close_into(of_all);
  }
};

// Loads that are to be on their way together have no condition: a compiler that has to keep what was there before lets
// them come one after the other. Where there is nothing to load, something is loaded twice, and not used.

// Sixteen bytes for each lane of kChunks chunks of a row, from `byte` on. What lies behind a row's end is not used.
template <int kChunks>
struct Bytes {
  std::int64_t of[kChunks];
  __device__ Bytes(const Params& p, std::int64_t byte) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) of[c] = byte + c * kChunk < p.row_bytes ? byte + c * kChunk : 0;
  }
};

// Up to kAtOnce of the rows of x that `rest` names, at least one, into a sum of each chunk; takes them out of it.
template <int kAtOnce, int kChunks, class Number>
__device__ void add_some_rows(const Params& p, Vector<Number> (&sums)[kChunks], unsigned& rest, std::int32_t row,
                              float weight, const Bytes<kChunks>& bytes) {
  uint4 v[kAtOnce][kChunks];
  float weights[kAtOnce];
  const int here = __popc(rest);
  int k = 0;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (rest != 0) k = __ffs(rest) - 1;
    rest &= rest - 1;
    const std::byte* const at = p.x + __shfl_sync(kAllLanes, row, k) * p.row_bytes;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) v[i][c] = ptx::load_constant(at + bytes.of[c]);
    weights[i] = __shfl_sync(kAllLanes, weight, k);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (i >= here) continue;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) sums[c].add(v[i][c], weights[i]);
  }
}

// Sixteen bytes for each lane, of each chunk, of the rows of x that `selected` names, weighed, added and rounded.
// `row`, `weight`: of the lane's selection.
template <class Number, int kChunks>
__device__ void sum_of_rows(const Params& p, unsigned selected, std::int32_t row, float weight, std::int64_t byte,
                            uint4 (&joined)[kChunks]) {
  Vector<Number> sums[kChunks];
  const Bytes<kChunks> bytes(p, byte);
  if constexpr (kChunks == 1)
    while (__popc(selected) > 4) add_some_rows<8>(p, sums, selected, row, weight, bytes);
  while (selected != 0) add_some_rows<4>(p, sums, selected, row, weight, bytes);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) joined[c] = sums[c].narrow();
}

// One part or piece of one arrival, as a lane sees it: the row of its selection.
struct Arrival {
  int arrival = 0, part = 0, token = 0;
  std::int32_t row = -1;
  float weight = 1;  // with pre_reduce

  __device__ Arrival() {}
  __device__ Arrival(const Params& p, int number, int part_of_row, int lane) : arrival(number), part(part_of_row) {
    token = p.src_token[arrival];
    if (lane >= p.num_topk) return;
    const std::int64_t at = std::int64_t{arrival} * p.num_topk + lane;
    row = p.arrival_row[at];
    if (p.arrival_weights != nullptr) weight = p.arrival_weights[at];
  }
};

__device__ int home_of(const std::int32_t* first_arrival, int arrival) {
  int home = 0;
  while (arrival >= first_arrival[home + 1]) ++home;
  return home;
}

// The contributions to a token's sum: lane k knows that of selection k, lane i the i-th in the plan's order.
struct Terms {
  int rank;          // of selection `lane`; -1: no selection, or its rank takes no part
  bool stands;       // a row comes for it
  int count;         // rows that come
  int k;             // the lane-th row to add
  int closes;        // after it 1: the rank's sum is complete, 2: the node's
  unsigned leaders;  // lanes that are the first of their rank
};

// Where the order is not that of the selections, each lane finds the place of its own: k of Terms, and 256 times
// closes.
__device__ __noinline__ int sorted(const Params& p, int rank, bool stands, int count, int lane) {
  const int node = p.order.round_per_node && rank >= 0 ? p.node_of_rank[rank] : -1;
  const unsigned same_rank = __match_any_sync(kAllLanes, rank), same_node = __match_any_sync(kAllLanes, node);
  const std::uint64_t key =
      stands ? plan::sum_key(p.order, lane, {rank, 31 - __clz(same_rank)}, {node, 31 - __clz(same_node)})
             : ~std::uint64_t{0};
  int before = 0, k = 0;
  for (int j = 0; j < p.num_topk; ++j) before += __shfl_sync(kAllLanes, static_cast<unsigned long long>(key), j) < key;
  for (int j = 0; j < p.num_topk; ++j)
    if (__shfl_sync(kAllLanes, stands ? before : -1, j) == lane) k = j;
  const int rank_here = __shfl_sync(kAllLanes, rank, k), node_here = __shfl_sync(kAllLanes, node, k);
  const int rank_next = __shfl_down_sync(kAllLanes, rank_here, 1),
            node_next = __shfl_down_sync(kAllLanes, node_here, 1);
  const bool last = lane + 1 >= count;
  const int closes = (p.order.round_per_rank && (last || rank_next != rank_here) ? 1 : 0) |
                     (p.order.round_per_node && (last || node_next != node_here) ? 2 : 0);
  return k | closes << 8;
}

// As plan::make_sum_steps, by a warp. `rank`: of the lane's selection, -1: none.
__device__ Terms make_terms(const Params& p, const Peers& peers, int rank, int lane) {
  Terms t{};
  t.rank = rank >= 0 && peers.active(rank) ? rank : -1;
  const unsigned same_rank = __match_any_sync(kAllLanes, t.rank);
  t.stands = t.rank >= 0 && (!one_row_per_rank(p) || lane == 31 - __clz(same_rank));
  t.leaders = __ballot_sync(kAllLanes, t.rank >= 0 && lane == __ffs(same_rank) - 1);
  unsigned rest = __ballot_sync(kAllLanes, t.stands);
  t.count = __popc(rest);
  // A rank's only row stands at its highest selection, which is where the rank itself stands in the order.
  if (p.order.key == SumOrder::Key::kTopK && !p.order.round_per_node &&
      (!p.order.round_per_rank || one_row_per_rank(p))) {
    for (int place = 0; rest != 0; ++place, rest &= rest - 1)
      if (place == lane) t.k = __ffs(rest) - 1;
    t.closes = p.order.round_per_rank ? 1 : 0;
  } else {
    const int place = sorted(p, t.rank, t.stands, t.count, lane);
    t.k = place & 0xff, t.closes = place >> 8;
  }
  return t;
}
// What a warp reads of a token before it adds: each lane of its selection.
struct OfToken {
  std::int32_t rank = -1, own_row = -1;
  float weight = 1, own_weight = 1;

  __device__ OfToken(const Params& p, int token, int lane) {
    if (lane >= p.num_topk) return;
    const std::int64_t at = std::int64_t{token} * p.num_topk + lane;
    rank = p.dst_rank[at];
    if (p.weights != nullptr && !p.pre_reduce) weight = p.weights[at];
    if (p.own_row != nullptr) own_row = p.own_row[at];
    if (p.own_weights != nullptr) own_weight = p.own_weights[at];
    if (rank != p.common.rank) own_row = -1;  // not written
  }
};

// Rows of a token that lie in x: they came from no slot.
struct OwnRows {
  std::int32_t row;   // lane k: of selection k; -1: none
  float weight;       // likewise
  unsigned terms;     // the rows to add, by place in the order, that are such
  unsigned selected;  // by selection

  __device__ OwnRows(const OfToken& of, const Terms& t)
      : row(of.own_row),
        weight(of.own_weight),
        terms(__ballot_sync(kAllLanes, __shfl_sync(kAllLanes, of.own_row, t.k) >= 0) & ((1ull << t.count) - 1)),
        selected(__ballot_sync(kAllLanes, of.own_row >= 0)) {}
};

template <class Vector>
__device__ void add_biases(const Params& p, Vector& sum, int token, std::int64_t byte) {
  for (const std::byte* bias : p.bias)
    if (bias != nullptr && byte < p.row_bytes) sum.add(load16(bias + token * p.row_bytes + byte), 1);
}

// How the chunks of tokens are shared by the warps that add them: a token's by as many as there are for it.
struct Shares {
  int chunks;   // of a row
  int of_warp;  // of them
  int of_token;
  int units;

  __device__ Shares(const Params& p, const Place& at) {
    chunks = p.row_bytes > 0 ? static_cast<int>((p.row_bytes + kChunk - 1) / kChunk) : 1;
    const int wanted = p.num_tokens > 0 ? at.warps() / p.num_tokens : 1;
    const int sharing = wanted < 1 ? 1 : wanted > chunks ? chunks : wanted;
    of_warp = (chunks + sharing - 1) / sharing;
    of_token = (chunks + of_warp - 1) / of_warp;
    units = p.num_tokens * of_token;
  }
};

// Weights that came home, joined: each lane one selection's. entry(wanted, row, k): weight k of those that came with
// the row of selection `row`; every lane calls it.
template <class Entry>
__device__ float home_weight(const Params& p, const Terms& t, const Entry& entry, int lane) {
  const bool by_rank = p.layout == OutputLayout::kByRank;
  if (!by_rank || p.weights_home == WeightsHome::kFromOwner) {
    const int highest = 31 - __clz(__match_any_sync(kAllLanes, t.rank));
    return entry(t.rank >= 0, by_rank ? highest : lane, lane);
  }
  float sum = 0;
  for (int rank = 0; rank < p.common.num_ranks; ++rank) {
    const unsigned of_rank = __ballot_sync(kAllLanes, t.rank == rank);
    if (of_rank == 0) continue;
    const float weight = entry(t.rank >= 0, 31 - __clz(of_rank), lane);
    if (t.rank >= 0) sum = plan::add_rn(sum, weight);
  }
  return sum;
}

}  // namespace
}  // namespace deep_ep::cuda
