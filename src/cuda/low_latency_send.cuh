// SPDX-License-Identifier: MIT
// Low-latency dispatch, send: a warp reads a piece of a row, quantises it if asked, and writes it to every rank that
// the token goes to.
#pragma once

#include "cuda/low_latency_route.cuh"
#include "cuda/quantize.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// What a lane sends of a piece: its vectors, and for quantised rows the line of scales that it writes, if any.
struct Outgoing {
  PieceOfRow row;
  std::uint32_t scales[plan::kPieceVectors];
};

// A lane's share of a piece of a row that travels as it is.
struct PlainPiece {
  PieceOfRow row;
  __device__ void load(const Params& p, int token, int piece, int lane) {
    row.load(p.x + token * static_cast<std::int64_t>(p.shape.row_bytes) + piece * plan::kPieceBytes,
             vectors_of(p, piece, lane), lane);
  }
  __device__ Outgoing outgoing(const Params&, int, int, int) const { return {row, {}}; }
};

// Sixteen channels by the rule itself, for whatever they may hold; reads them again.
struct AnyCodes {
  uint4 codes;
  float scale;
};
template <class Number>
__device__ __noinline__ AnyCodes encode_any_vector(const std::byte* at, bool in_row, plan::Fp8Scale kind) {
  float x[16];
  std::int32_t largest = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    typename Number::Four four{};
    if (in_row) four = reinterpret_cast<const typename Number::Four*>(at)[i];
    float widened[4];
    Number::widen(four, widened);
    for (int j = 0; j < 4; ++j) {
      x[4 * i + j] = widened[j];
      largest = max(largest, plan::fp8_magnitude(widened[j]));
    }
  }
  for (int lanes = 1; lanes < kLanesOfGroup; lanes *= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  const plan::Fp8Scaling scaling = plan::fp8_scaling(largest, kind);
  std::uint32_t codes[4] = {};
#pragma unroll 1
  for (int i = 0; i < 16; ++i) codes[i / 4] |= std::uint32_t{plan::fp8_encode(x[i], scaling.factor)} << (8 * (i % 4));
  return {{codes[0], codes[1], codes[2], codes[3]}, scaling.scale};
}

// A lane's share of a piece to be quantised: sixteen channels of each vector, eight lanes to a group.
template <class Number>
struct FloatPiece {
  static constexpr int kFours = 4;
  using Four = typename Number::Four;
  Four v[plan::kPieceVectors][kFours];

  __device__ static const std::byte* channels(const Params& p, int token, int piece, int vector, int lane) {
    return p.x + (token * p.hidden + piece * plan::kPieceBytes + 512 * vector + 16 * lane) * Number::kBytes;
  }
  __device__ void load(const Params& p, int token, int piece, int lane) {
    const int count = vectors_of(p, piece, lane);
    const std::byte* const from = channels(p, token, piece, 0, lane);
    constexpr int kLoads = kFours * static_cast<int>(sizeof(Four)) / 16;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        split(i < count ? __ldg(reinterpret_cast<const uint4*>(from + i * 512 * Number::kBytes) + j) : uint4{},
              v[i] + j * kFours / kLoads);
  }
  __device__ static void split(uint4 vector, uint2* fours) {
    fours[0] = {vector.x, vector.y};
    fours[1] = {vector.z, vector.w};
  }
  __device__ static void split(uint4 vector, uint4* fours) { fours[0] = vector; }

  __device__ Outgoing outgoing(const Params& p, int token, int piece, int lane) const {
    Outgoing out;
    std::uint32_t largest[plan::kPieceVectors];
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i) {
      largest[i] = 0;
#pragma unroll
      for (int j = 0; j < kFours; ++j) largest[i] = max(largest[i], Number::largest_bits(v[i][j]));
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanesOfGroup; lanes *= 2)
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i)
        largest[i] = max(largest[i], __shfl_xor_sync(kAllLanes, largest[i], lanes));
    float scale[plan::kPieceVectors];
    const bool quick = max(max(largest[0], largest[1]), largest[2]) < kLargestQuick;
    if (__all_sync(kAllLanes, quick)) {
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i) {
        const plan::Fp8Scaling scaling = quick_scaling(static_cast<std::int32_t>(largest[i]), p.scale_kind);
        scale[i] = scaling.scale;
        std::uint32_t code[kFours];
#pragma unroll
        for (int j = 0; j < kFours; ++j) {
          float x[4];
          Number::widen(v[i][j], x);
          code[j] = quick_codes(x, scaling.factor);
        }
        out.row.v[i] = {code[0], code[1], code[2], code[3]};
      }
    } else {
      const int count = vectors_of(p, piece, lane);
#pragma unroll
      for (int i = 0; i < plan::kPieceVectors; ++i) {
        const AnyCodes any = encode_any_vector<Number>(channels(p, token, piece, i, lane), i < count, p.scale_kind);
        out.row.v[i] = any.codes;
        scale[i] = any.scale;
      }
    }
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i) out.scales[i] = __float_as_uint(scale[i]);
    if (p.scale_kind == plan::Fp8Scale::kUe8m0) pack(p, out, piece, lane);
    return out;
  }

  // The four groups of a vector share a word.
  __device__ static void pack(const Params& p, Outgoing& out, int piece, int lane) {
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i) {
      const int group = piece * (plan::kPieceBytes / plan::kFp8Group) + i * kGroupsOfPass + lane / kLanesOfGroup;
      std::uint32_t word =
          group * plan::kFp8Group < p.hidden ? plan::ue8m0_in_word(__uint_as_float(out.scales[i]), group) : 0;
      word |= __shfl_xor_sync(kAllLanes, word, 8);
      word |= __shfl_xor_sync(kAllLanes, word, 16);
      out.scales[i] = word;
    }
  }
};

template <Rows kRows>
struct PieceOf {
  using Type = PlainPiece;
};
template <>
struct PieceOf<Rows::kBf16> {
  using Type = FloatPiece<Bf16>;
};
template <>
struct PieceOf<Rows::kFp16> {
  using Type = FloatPiece<Fp16>;
};
template <>
struct PieceOf<Rows::kFp32> {
  using Type = FloatPiece<Fp32>;
};

// A warp: what the caller gave beside a token's row, weights apart, with its first piece.
__device__ __noinline__ void send_beside(const Params& p, std::byte* message, int token, std::uint32_t number,
                                         int lane) {
  if (p.scales != nullptr) {
    for (int line = lane; line * plan::kLineWords < p.shape.num_scales; line += 32) {
      const auto word = [&](int i) {
        const std::int64_t at = line * plan::kLineWords + i;
        return at < p.shape.num_scales
                   ? static_cast<std::uint32_t>(p.scales[token * p.scale_strides[0] + at * p.scale_strides[1]])
                   : 0;
      };
      ptx::store_whole_system(message + p.lines.scales_at + plan::kLineBytes * line,
                              {word(0), word(1), word(2), number});
    }
  }
  for (int i = 0; i < p.shape.num_side; ++i) {
    const int words = static_cast<int>(p.shape.side_bytes[i] / 4);
    send_array(message + p.lines.side_at[i],
               reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words, words, number, lane);
  }
}

// A piece of a token that a warp sends, as it reads it: before it may be written to anybody.
template <Rows kRows>
struct Leaving {
  typename PieceOf<kRows>::Type row;
  int token = 0, piece = 0;
  int rank = -1;     // of the lane's selection
  float weight = 0;  // likewise

  __device__ Leaving() {}
  __device__ Leaving(const Params& p, int unit, int lane)
      : token(p.per.pieces.quotient(unit)), piece(unit - token * p.pieces) {
    row.load(p, token, piece, lane);
    if (lane >= p.num_topk) return;
    const std::int64_t at = std::int64_t{token} * p.num_topk + lane;
    const std::int64_t expert = expert_of(p, at);
    if (piece == 0 && p.shape.topk_weights) weight = p.topk_weights[at];
    rank = replica_of(p, expert, token).rank;
  }
};

// A warp: one piece of one token to all its ranks but the far ones.
template <Rows kRows>
__device__ void send_piece(const Now& now, const Params& p, const Shared& shared, const Leaving<kRows>& leaving,
                           int lane) {
  const int token = leaving.token, piece = leaving.piece;
  const int rank = leaving.rank >= 0 && shared.peers.near(leaving.rank) ? leaving.rank : -1;
  const Outgoing out = leaving.row.outgoing(p, token, piece, lane);
  const unsigned same = __match_any_sync(kAllLanes, rank);
  const unsigned leaders = __ballot_sync(kAllLanes, rank >= 0 && (same & ((1u << lane) - 1)) == 0);
  // Each lane says where that of its selection lies.
  std::byte* const of_lane = rank >= 0 ? Messages(now, p, shared.peers.window(rank)).of(p.common.rank, token) : nullptr;
  const int count = vectors_of(p, piece, lane);
  const std::uint32_t number = number_of(now);
  const bool weighs = piece == 0 && p.shape.topk_weights;
  const bool beside = piece == 0 && (p.scales != nullptr || p.shape.num_side > 0);
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) {
    std::byte* const message = from_lane(of_lane, __ffs(rest) - 1);
    out.row.send(message + p.lines.row_at + piece * plan::kPieceLineBytes, count, number, lane);
    if (kRows != Rows::kAsTheyAre && writes_scales(p, count, lane))
      ptx::store_whole_system(message + p.lines.scales_at + scale_line(piece, lane),
                              {out.scales[0], out.scales[1], out.scales[2], number});
    if (weighs) {
      const bool given = !p.mask_topk_weights || rank == __shfl_sync(kAllLanes, rank, __ffs(rest) - 1);
      send_words(message + p.lines.weights_at, p.num_topk, given ? __float_as_uint(leaving.weight) : 0, number, lane);
    }
    if (beside) send_beside(p, message, token, number, lane);
  }
}

}  // namespace
}  // namespace deep_ep::cuda
