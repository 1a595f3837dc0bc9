// SPDX-License-Identifier: MIT
// Low-latency combine of many tokens: rows go home in parts, each announced by a flag.
#pragma once

#include "cuda/low_latency_combine.cuh"
#include "cuda/wire.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

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

// One part of the rows that `selected` names, lane k that of selection k, into their slots as they are.
__device__ void send_rows(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                          std::int64_t begin, std::int64_t end, int lane) {
  constexpr int kVectors = 4, kAtOnce = 4;
  for (std::int64_t piece = begin; piece < end; piece += kVectors * 512) {
    const int left = static_cast<int>(end - piece) - 16 * lane;
    for (unsigned rest = selected; rest != 0;) {
      uint4 v[kAtOnce][kVectors];
      unsigned sends = rest;
      int k = 0;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (rest != 0) k = __ffs(rest) - 1;
        rest &= rest - 1;
        const std::byte* const at = p.x + __shfl_sync(kAllLanes, row, k) * p.row_bytes + piece;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          v[r][i] = ptx::load_constant(at + (512 * i < left ? 512 * i + 16 * lane : 0));
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (sends == 0) continue;
        std::byte* const to = home.row(token, __ffs(sends) - 1) + piece + 16 * lane;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (512 * i < left) store16(to + 512 * i, v[r][i]);
        sends &= sends - 1;
      }
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

// Where rows are joined, so many chunks are added side by side: there are few loads to each.
constexpr int kTogether = 2;

// The rows themselves added, weighed if there are weights, and rounded: one row into the slot of the highest selection.
template <class Number>
__device__ void send_sum(const Params& p, const Slots& home, const Arrival& from, unsigned selected, std::int64_t begin,
                         std::int64_t end, int lane) {
  std::byte* const to = home.row(from.token, 31 - __clz(selected));
  for (std::int64_t byte = begin + 16 * lane; byte - 16 * lane < end; byte += kTogether * kChunk) {
    uint4 sums[kTogether];
    sum_of_rows<Number>(p, selected, from.row, from.weight, byte, sums);
#pragma unroll
    for (int c = 0; c < kTogether; ++c)
      if (byte + c * kChunk < end) store16(to + byte + c * kChunk, sums[c]);
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
  } else if (adds_before(p)) {
    send_sum<Number>(p, slots, from, selected, begin, end, lane);
  } else {
    send_rows(p, slots, from.token, sent, from.row, begin, end, lane);
  }
}

// A warp: one part of an arrival. Its flag then, or null where nothing went.
template <class Number, class Wire>
__device__ std::uint32_t* send_part(const Now& now, const Params& p, const Peers& peers,
                                    const std::int32_t* first_arrival, const Arrival& from, int lane) {
  const int home = home_of(first_arrival, from.arrival);
  const unsigned selected = __ballot_sync(kAllLanes, from.row >= 0);
  if (!peers.near(home) || selected == 0) return nullptr;
  const Slots slots(now, p, peers.window(home));
  const std::int64_t begin = std::int64_t{from.part} * p.parts.bytes;
  const std::int64_t end = begin + p.parts.bytes < p.row_bytes ? begin + p.parts.bytes : p.row_bytes;
  write_part<Number, Wire>(p, slots, from, selected, begin, end, lane);
  if (from.part == 0 && p.x_weights != nullptr)
    send_weights(p, slots, from.token, from.arrival, selected, from.row, lane);
  return flag_of(now, peers.window(home), flag_number(p, p.common.rank, from.token, from.part));
}

// Arrivals whose rows go to slots: all, or those of other ranks.
struct Leaving {
  int count, stays_from, stays;
  __device__ explicit Leaving(const Params& p) {
    const std::int32_t* const of_rank = p.first_arrival + p.common.rank;
    stays_from = of_rank[0];
    stays = p.own_row != nullptr ? of_rank[1] - stays_from : 0;
    count = p.first_arrival[p.common.num_ranks] - stays;
  }
  __device__ int arrival(int i) const { return i < stays_from ? i : i + stays; }
};

// The first unit that a warp adds, where `senders` of its block have sent and come last.
__device__ int first_to_add(const Place& at, int senders) {
  return at.turn(kLowLatencyWarps).of((at.warp + kLowLatencyWarps - senders) % kLowLatencyWarps);
}

// Phase send, by the first warps of each block; the others go on to what comes. Returns by how many, or -1: not all was
// sent.
template <class Number, class Wire, class Open>
__device__ int send_in_parts(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                             const Flags& flags, const Open& open, const Place& at) {
  const Leaving leaving(p);
  const int units = leaving.count * p.parts.count;  // fits: all of them have flags, and these are memory
  const Place::Turn turn = at.turn(kLowLatencyWarps);
  const int senders = turn.below(units, kLowLatencyWarps);
  int unit = turn.of(at.warp);
  Arrival from{};
  const auto look = [&] {
    if (unit < units) from = Arrival(p, leaving.arrival(unit / p.parts.count), unit % p.parts.count, at.lane);
  };
  look();
  if (!open()) return -1;
  for (int round = 0; unit < units; ++round) {
    const Arrival here = from;
    unit += at.warps();
    look();
    std::uint32_t* const flag = send_part<Number, Wire>(now, p, peers, first_arrival, here, at.lane);
    flags.raise(now, flag, round, turn.below(units - round * at.warps(), kLowLatencyWarps), at);
  }
  return senders;
}

// All lanes: the part has come from every rank that has a row of this token in a slot.
__device__ bool await_part(const Now& now, const Params& p, const Terms& t, const HomeSlots& slots, int token, int part,
                           int lane) {
  bool came = true;
  if ((t.leaders >> lane & 1) != 0 && (p.own_row == nullptr || t.rank != p.common.rank))
    came = (slots.of_far >> lane & 1) != 0
               ? await_arrived(now, t.rank)
               : await_flag(now, flag_of(now, p.window, flag_number(p, t.rank, token, part)), t.rank);
  return __all_sync(kAllLanes, came) != 0;
}

// What a warp adds for a token. Lane i: where the i-th row lies, and what weighs it.
struct Summands {
  const Terms& terms;
  const OwnRows& own;
  const std::byte* row_at;
  float weight;
};

// Up to kAtOnce rows from the first-th on, at least one. `own_sums`: what stands for the rows of this rank, if
// `joined`.
template <int kAtOnce, class Wire, class Number, bool kLevels, int kChunks>
__device__ void add_some_rows(const Params& p, Sum<Number, kLevels> (&sums)[kChunks], const Summands& s, int first,
                              const Bytes<kChunks>& bytes, bool joined, const uint4 (&own_sums)[kChunks]) {
  const int last = s.terms.count - 1;
  typename Wire::Raw v[kAtOnce][kChunks];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const std::byte* const row_at = from_lane(s.row_at, min(first + i, last));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) v[i][c] = Wire::load(p.encoded, row_at, bytes.of[c]);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const float w = __shfl_sync(kAllLanes, s.weight, (first + i) % 32);
    const int closes = kLevels ? __shfl_sync(kAllLanes, s.terms.closes, (first + i) % 32) : 0;
    if (first + i > last) continue;
    const bool own = joined && (s.own.terms >> (first + i) & 1) != 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint4 row = Wire::template decode<Number>(v[i][c]);
      sums[c].add(p.order, own ? own_sums[c] : row, w, closes);
    }
  }
}

// Sixteen bytes for each lane, from `byte` on, of each of some chunks of a token's sum. `own_sums`: as for
// add_some_rows.
template <class Number, bool kLevels, class Wire, int kChunks>
__device__ void sum_together(const Params& p, const Summands& s, int token, std::int64_t byte, int chunks, bool joined,
                             const uint4 (&own_sums)[kChunks]) {
  const Bytes<kChunks> bytes(p, byte);
  Sum<Number, kLevels> sums[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (p.order.bias_first) add_biases(p, sums[c].of_all, token, byte + c * kChunk);
  int first = 0;
  if constexpr (kChunks == 1) {
    for (; s.terms.count - first > 4; first += 8) add_some_rows<8, Wire>(p, sums, s, first, bytes, joined, own_sums);
    if (first < s.terms.count) add_some_rows<4, Wire>(p, sums, s, first, bytes, joined, own_sums);
  } else {
    for (; s.terms.count - first > 2; first += 4) add_some_rows<4, Wire>(p, sums, s, first, bytes, joined, own_sums);
    if (first < s.terms.count) add_some_rows<2, Wire>(p, sums, s, first, bytes, joined, own_sums);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (!p.order.bias_first) add_biases(p, sums[c].of_all, token, byte + c * kChunk);
    if (c < chunks && byte + c * kChunk < p.row_bytes)
      __stcs(reinterpret_cast<uint4*>(p.out + token * p.row_bytes + byte + c * kChunk), sums[c].of_all.narrow());
  }
}

// The chunks [first, end) of a token, kChunks side by side. False: not all has come.
template <int kChunks, class Number, bool kLevels, class Wire>
__device__ bool sum_chunks(const Now& now, const Params& p, const Summands& s, const HomeSlots& slots, int token,
                           int first, int end, bool joined, int lane) {
  int came = -1;  // parts up to this one
  for (int chunk = first; chunk < end; chunk += kChunks) {
    const int chunks = min(end - chunk, kChunks);
    const std::int64_t byte = std::int64_t{chunk} * kChunk + 16 * lane;
    // What this rank adds up itself it does before it waits for the others.
    uint4 own_sums[kChunks]{};
    if (joined) sum_of_rows<Number>(p, s.own.selected, s.own.row, s.own.weight, byte, own_sums);
    const int from = chunk * kChunk / p.parts.bytes, to = (chunk + chunks - 1) * kChunk / p.parts.bytes;
    for (int part = max(came + 1, from); part <= to; ++part)
      if (!await_part(now, p, s.terms, slots, token, part, lane)) return false;
    came = to;
    sum_together<Number, kLevels, Wire>(p, s, token, byte, chunks, joined, own_sums);
  }
  return true;
}

// `senders`: warps of each block that have sent, which come last. False: not all has come.
template <class Number, bool kLevels, class Wire>
__device__ bool sum_parts(const Now& now, const Params& p, const Peers& peers, int senders, const Place& at) {
  bool good = true;
  const Shares shares(p, at);
  int unit = first_to_add(at, senders);
  const auto read = [&] {
    const bool has = unit < shares.units;
    return OfToken(p, has ? unit / shares.of_token : 0, has ? at.lane : p.num_topk);
  };
  OfToken ahead = read();
  while (unit < shares.units) {
    const OfToken of = ahead;
    const int token = unit / shares.of_token, first = unit % shares.of_token * shares.of_warp;
    unit += at.warps();
    ahead = read();
    const Terms t = make_terms(p, peers, of.rank, at.lane);
    const OwnRows own(of, t);
    const HomeSlots slots(now, p, peers, t);
    const std::int32_t own_row = __shfl_sync(kAllLanes, of.own_row, t.k);
    const Summands summands{t, own, own_row >= 0 ? p.x + own_row * p.row_bytes : slots.of(t.k).row(token, t.k),
                            __shfl_sync(kAllLanes, of.weight, t.k)};
    const int end = min(first + shares.of_warp, shares.chunks);
    // Levels take the registers of a second chunk.
    constexpr int kSideBySide = kLevels || Wire::kEncodes ? 1 : kTogether;
    const bool joined = !Wire::kEncodes && adds_before(p) && own.terms != 0;
    bool came = true;
    if (p.row_bytes == 0) {
      came = await_part(now, p, t, slots, token, 0, at.lane);
    } else if (joined) {
      came = sum_chunks<kSideBySide, Number, kLevels, Wire>(now, p, summands, slots, token, first, end, true, at.lane);
    } else {
      came = sum_chunks<1, Number, kLevels, Wire>(now, p, summands, slots, token, first, end, false, at.lane);
    }
    if (came && first == 0 && p.weights_out != nullptr) {
      const auto entry = [&](bool wanted_here, int row, int k) {
        return wanted_here ? __ldcg(slots.of(row).weights(token, row) + k) : 0.0f;
      };
      const float joined = home_weight(p, t, entry, at.lane);
      if (at.lane < p.num_topk) p.weights_out[std::int64_t{token} * p.num_topk + at.lane] = joined;
    }
    good = good && came;
  }
  return good;
}

}  // namespace
}  // namespace deep_ep::cuda
