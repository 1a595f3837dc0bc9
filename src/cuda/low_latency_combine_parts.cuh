// SPDX-License-Identifier: MIT
// Low-latency combine of many tokens: rows go home in parts, each announced by a flag.
#pragma once

#include "cuda/low_latency_combine.cuh"
#include "cuda/wire.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

constexpr int kChunk = 512;  // bytes of a row that a warp adds at a time: sixteen for each lane
constexpr int kAhead = 8;    // rows of which it reads at once

// Slots of the ticket in an owner's window, or in memory that stands for it:  [ rows: max_tokens x topk | weights: topk
// floats, padded, max_tokens x topk ]
struct Slots {
  std::byte* base;
  std::int64_t stride;
  const Params& p;

  __device__ Slots(const Params& params, std::byte* slots) : base(slots), stride(params.slot_bytes), p(params) {}
  __device__ Slots(const Now& now, const Params& params, std::byte* window)
      : Slots(params, window + now.common.layout.low_latency(ticket_of(now))) {}
  __device__ std::int64_t row_at(int token, int k) const { return (std::int64_t{token} * p.num_topk + k) * stride; }
  __device__ std::byte* row(int token, int k) const { return base + row_at(token, k); }
  // All weights of the row in a slot: one for each selection.
  __device__ std::int64_t weights_at(int token, int k) const {
    const std::int64_t slots = std::int64_t{p.max_tokens_per_rank} * p.num_topk;
    return slots * stride +
           (std::int64_t{token} * p.num_topk + k) * static_cast<std::int64_t>(plan::combine_weights_stride(p.num_topk));
  }
  __device__ float* weights(int token, int k) const { return reinterpret_cast<float*>(base + weights_at(token, k)); }
};

// Slots of one token at its home: rows of far ranks come into memory of their own.
struct HomeSlots {
  Slots near, far;
  unsigned of_far;  // selections whose rank is far

  __device__ HomeSlots(const Now& now, const Params& p, const Peers& peers, const Terms& t)
      : near(now, p, p.window), far(p, far_slots_of(p.common, ticket_of(now))), of_far(0) {
    if (p.common.far.end != nullptr) of_far = __ballot_sync(kAllLanes, t.rank >= 0 && peers.far(t.rank));
  }
  __device__ const Slots& of(int k) const { return (of_far >> k & 1) != 0 ? far : near; }
};

__device__ std::int64_t flag_number(const Params& p, int rank, int token, int part) {
  return (std::int64_t{rank} * p.max_tokens_per_rank + token) * p.parts.count + part;
}

// One part of the rows that `rows` names, lane k that of selection k, into their slots as they are.
__device__ void send_rows(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                          std::int64_t begin, std::int64_t end, int lane) {
  constexpr int kVectors = 4, kAtOnce = 2;
  for (std::int64_t piece = begin; piece < end; piece += kVectors * 512) {
    for (unsigned rest = selected; rest != 0;) {
      uint4 v[kAtOnce][kVectors];
      std::byte* to[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int k = __ffs(rest) - 1;
        to[r] = k >= 0 ? home.row(token, k) + piece : nullptr;
        const std::byte* const from =
            p.x + std::int64_t{__shfl_sync(kAllLanes, row, k >= 0 ? k : 0)} * p.row_bytes + piece;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (k >= 0 && piece + 512 * i + 16 * lane < end)
            v[r][i] = __ldg(reinterpret_cast<const uint4*>(from + 512 * i + 16 * lane));
        rest &= rest - 1;
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (to[r] != nullptr && piece + 512 * i + 16 * lane < end) store16(to[r] + 512 * i + 16 * lane, v[r][i]);
    }
  }
}

// The same, encoded.
template <class Number, class Wire>
__device__ void send_encoded(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                             std::int64_t begin, std::int64_t end, int lane) {
  constexpr int kVectors = 4;
  for (unsigned rest = selected; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    std::byte* const to = home.row(token, k);
    const std::byte* const from = p.x + std::int64_t{__shfl_sync(kAllLanes, row, k)} * p.row_bytes;
    for (std::int64_t piece = begin; piece < end; piece += kVectors * 512) {
      const std::int64_t byte = piece + 16 * lane;
      uint4 v[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        v[i] = byte + 512 * i < end ? __ldg(reinterpret_cast<const uint4*>(from + byte + 512 * i)) : uint4{};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (piece + 512 * i >= end) break;
        const typename Wire::Raw raw = Wire::template encode<Number>(v[i]);
        if (byte + 512 * i < end) Wire::store(p.encoded, to, byte + 512 * i, raw, lane);
      }
    }
  }
}

// The rows themselves added, weighed if there are weights, and rounded: one row into the slot of the highest selection.
template <class Number>
__device__ void send_sum(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                         float weight, std::int64_t begin, std::int64_t end, int lane) {
  std::byte* const to = home.row(token, 31 - __clz(selected));
  for (std::int64_t byte = begin + 16 * lane; byte - 16 * lane < end; byte += kChunk) {
    Vector<Number> sum;
    for (unsigned rest = selected; rest != 0;) {
      uint4 v[kAhead];
      float weights[kAhead];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = rest != 0 ? __ffs(rest) - 1 : 0;
        const std::int64_t from = __shfl_sync(kAllLanes, row, k);
        weights[i] = __shfl_sync(kAllLanes, weight, k);
        if (rest != 0 && byte < end) v[i] = __ldg(reinterpret_cast<const uint4*>(p.x + from * p.row_bytes + byte));
        if (rest != 0) ++count;
        rest &= rest - 1;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i < count) sum.add(v[i], weights[i]);
    }
    if (byte < end) store16(to + byte, sum.narrow());
  }
}

// Weights that travel home: one for each selection, or where rows are joined all of the arrival's with its row.
__device__ void send_weights(const Params& p, const Slots& home, int token, std::int64_t arrival, unsigned selected,
                             std::int32_t row, int lane) {
  if (p.layout == OutputLayout::kByRank) {
    if (lane < p.num_topk) home.weights(token, 31 - __clz(selected))[lane] = p.x_weights[arrival * p.num_topk + lane];
  } else if (row >= 0) {
    home.weights(token, lane)[lane] = p.x_weights[row];
  }
}

// What one part of an arrival's rows is made into at their home.
template <class Number, class Wire>
__device__ void write_part(const Params& p, const Slots& slots, const Arrival& from, unsigned selected,
                           std::int64_t begin, std::int64_t end, int lane) {
  const unsigned sent = one_row_per_rank(p) ? 1u << (31 - __clz(selected)) : selected;
  if constexpr (Wire::kEncodes) {
    send_encoded<Number, Wire>(p, slots, from.token, sent, from.row, begin, end, lane);
  } else if (p.pre_reduce && p.layout != OutputLayout::kByRank) {
    const float weight =
        p.arrival_weights != nullptr && lane < p.num_topk ? p.arrival_weights[from.arrival * p.num_topk + lane] : 1;
    send_sum<Number>(p, slots, from.token, selected, from.row, weight, begin, end, lane);
  } else {
    send_rows(p, slots, from.token, sent, from.row, begin, end, lane);
  }
}

template <class Number, class Wire>
__device__ void send_part(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                          const Flags& flags, const Arrival& from, int lane) {
  const auto [arrival, part, token, row] = from;
  const int home = home_of(first_arrival, arrival);
  if (!peers.near(home)) return;
  const unsigned selected = __ballot_sync(kAllLanes, row >= 0);
  const Slots slots(now, p, peers.window(home));
  const std::int64_t begin = std::int64_t{part} * p.parts.bytes;
  const std::int64_t end = begin + p.parts.bytes < p.row_bytes ? begin + p.parts.bytes : p.row_bytes;
  if (selected == 0) return;
  write_part<Number, Wire>(p, slots, from, selected, begin, end, lane);
  if (part == 0 && p.x_weights != nullptr) send_weights(p, slots, token, arrival, selected, row, lane);
  if (lane == 0) flags.add(flag_of(now, peers.window(home), flag_number(p, p.common.rank, token, part)));
}

// All lanes: the part has come from every rank that has a row of this token.
__device__ bool await_part(const Now& now, const Params& p, const Terms& t, const HomeSlots& slots, int token, int part,
                           int lane) {
  bool came = true;
  if ((t.leaders >> lane & 1) != 0)
    came = (slots.of_far >> lane & 1) != 0
               ? await_arrived(now, t.rank)
               : await_flag(now, flag_of(now, p.window, flag_number(p, t.rank, token, part)), t.rank);
  return __all_sync(kAllLanes, came) != 0;
}

// Sixteen bytes of a token's sum for each lane.
template <class Number, bool kLevels, class Wire>
__device__ void sum_chunk(const Params& p, const Terms& t, const HomeSlots& slots, int token, std::int64_t byte,
                          float weight, int lane) {
  const bool mine = byte < p.row_bytes;
  Sum<Number, kLevels> sum;
  if (p.order.bias_first) add_biases(p, sum.of_all, token, byte);
  for (int first = 0; first < t.count; first += kAhead) {
    typename Wire::Raw v[kAhead];
    int k[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      k[i] = __shfl_sync(kAllLanes, t.k, first + i);
      if (first + i < t.count && mine) v[i] = Wire::load(p.encoded, slots.of(k[i]).row(token, k[i]), byte);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < t.count)
        sum.add(p.order, Wire::template decode<Number>(v[i]), __shfl_sync(kAllLanes, weight, k[i]),
                __shfl_sync(kAllLanes, t.closes, first + i));
  }
  if (!p.order.bias_first) add_biases(p, sum.of_all, token, byte);
  if (mine) __stcs(reinterpret_cast<uint4*>(p.out + token * p.row_bytes + byte), sum.of_all.narrow());
}

// False: not all has come.
template <class Number, bool kLevels, class Wire>
__device__ bool sum_parts(const Now& now, const Params& p, const Peers& peers, const Place& at) {
  bool good = true;
  // A token's chunks are shared by as many warps as there are for it.
  const int chunks = p.row_bytes > 0 ? static_cast<int>((p.row_bytes + kChunk - 1) / kChunk) : 1;
  const int wanted = p.num_tokens > 0 ? at.warps() / p.num_tokens : 1;
  const int sharing = wanted < 1 ? 1 : wanted > chunks ? chunks : wanted;
  const int of_warp = (chunks + sharing - 1) / sharing;
  const int shares = (chunks + of_warp - 1) / of_warp;
  for (int unit = at.number(); unit < p.num_tokens * shares; unit += at.warps()) {
    const int token = unit / shares, first = unit % shares * of_warp;
    const Terms t = make_terms(p, peers, rank_of_selection(p, token, at.lane), at.lane);
    const HomeSlots slots(now, p, peers, t);
    const float weight = weight_of_selection(p, token, at.lane);
    int part = -1;
    bool came = true;
    for (int chunk = first; came && chunk < first + of_warp && chunk < chunks; ++chunk) {
      const int next_part = p.row_bytes > 0 ? chunk * kChunk / p.parts.bytes : 0;
      if (next_part != part) came = await_part(now, p, t, slots, token, part = next_part, at.lane);
      if (!came) break;
      if (p.row_bytes > 0)
        sum_chunk<Number, kLevels, Wire>(p, t, slots, token, std::int64_t{chunk} * kChunk + 16 * at.lane, weight,
                                         at.lane);
      if (chunk == 0 && p.weights_out != nullptr) {
        const auto entry = [&](bool wanted_here, int row, int k) {
          return wanted_here ? __ldcg(slots.of(row).weights(token, row) + k) : 0.0f;
        };
        const float joined = home_weight(p, t, entry, at.lane);
        if (at.lane < p.num_topk) p.weights_out[std::int64_t{token} * p.num_topk + at.lane] = joined;
      }
    }
    good = good && came;
  }
  return good;
}

}  // namespace
}  // namespace deep_ep::cuda
