// SPDX-License-Identifier: MIT
// Low-latency dispatch, send: a warp reads a part of a row, quantises it if asked, and writes it to every rank that the
// token goes to.
#pragma once

#include "cuda/encode.cuh"
#include "cuda/low_latency_route.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

enum class Rows { kAsTheyAre, kBf16, kFp16, kFp32 };

// A lane's share of 1024 channels to be quantised: twice sixteen of them, eight lanes to a group.
template <class Number>
struct FloatPiece {
  static constexpr int kHalves = 2, kFours = 4, kChannels = 16;
  static constexpr int kBytes = kHalves * 32 * kChannels;  // on the wire
  using Four = typename Number::Four;
  Four v[kHalves][kFours];

  __device__ void load(const Params& p, int token, std::int64_t begin, std::int64_t end, int lane) {
    const std::byte* row = p.x + token * p.hidden * Number::kBytes;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const std::int64_t channel = begin + (32 * h + lane) * kChannels;
      constexpr int kVectors = kFours * static_cast<int>(sizeof(Four)) / 16;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        split(channel < end ? __ldg(reinterpret_cast<const uint4*>(row + channel * Number::kBytes) + i) : uint4{},
              v[h] + i * kFours / kVectors);
    }
  }
  __device__ static void split(uint4 vector, uint2* fours) {
    fours[0] = {vector.x, vector.y};
    fours[1] = {vector.z, vector.w};
  }
  __device__ static void split(uint4 vector, uint4* fours) { fours[0] = vector; }

  __device__ static std::uint32_t of_group(std::uint32_t largest) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    return largest;
  }

  __device__ void write(const Params& p, std::byte* message, std::int64_t begin, std::int64_t end, int lane) const {
    const unsigned all = __ballot_sync(kAllLanes, message != nullptr);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      std::uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kFours; ++i) largest = max(largest, Number::largest_bits(v[h][i]));
      largest = of_group(largest);
      const bool plain = __all_sync(kAllLanes, largest < static_cast<std::uint32_t>(plan::kFloatInfBits));
      if (!plain) {
        largest = 0;
        for (int i = 0; i < kFours; ++i) {
          float x[4];
          Number::widen(v[h][i], x);
          largest = max(largest, largest_number(x));
        }
        largest = of_group(largest);
      }
      const plan::Fp8Scaling scaling = plan::fp8_scaling(static_cast<std::int32_t>(largest), p.scale_kind);
      std::uint32_t code[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        float x[4];
        Number::widen(v[h][i], x);
        code[i] = encode4(x, scaling.factor, plain);
      }
      const std::int64_t channel = begin + (32 * h + lane) * kChannels;
      const std::int64_t group = channel / plan::kFp8Group;
      const bool packed = p.scale_kind == plan::Fp8Scale::kUe8m0;
      std::uint32_t word = __float_as_uint(scaling.scale);
      if (packed) {
        word = group * plan::kFp8Group < p.hidden ? plan::ue8m0_in_word(scaling.scale, group) : 0;
        word |= __shfl_xor_sync(kAllLanes, word, 8);
        word |= __shfl_xor_sync(kAllLanes, word, 16);
      }
      const std::int64_t at = packed ? group / plan::kUe8m0PerWord : group;
      const bool keeps = lane % (packed ? 32 : 8) == 0 && at < p.shape.num_scales && channel < end;
      for (unsigned rest = all; rest != 0; rest &= rest - 1) {
        std::byte* const to = from_lane(message, __ffs(rest) - 1);
        if (channel < end) store16(to + p.message.row_at + channel, {code[0], code[1], code[2], code[3]});
        if (keeps) reinterpret_cast<std::uint32_t*>(to + p.message.scales_at)[at] = word;
      }
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

// A warp: what goes beside a token's row, with its first part; the caller's scales with theirs. One destination.
__device__ void write_beside(const Params& p, std::byte* message, int dst, int token, int part, int my_rank, int lane) {
  if (p.scales != nullptr) {
    const int first = part * p.parts.scales;
    const int end = min(first + p.parts.scales, p.shape.num_scales);
    auto* const scales = reinterpret_cast<std::int32_t*>(message + p.message.scales_at);
    for (int word = first + lane; word < end; word += 32)
      scales[word] = p.scales[token * p.scale_strides[0] + word * p.scale_strides[1]];
  }
  if (part != 0) return;
  if (p.shape.topk_weights && lane < p.num_topk)
    reinterpret_cast<float*>(message + p.message.weights_at)[lane] =
        my_rank == dst || !p.mask_topk_weights ? p.topk_weights[std::int64_t{token} * p.num_topk + lane] : 0.0f;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* src = reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words;
    auto* dst_words = reinterpret_cast<std::int32_t*>(message + p.message.side_at[i]);
    for (int word = lane; word < words; word += 32) dst_words[word] = src[word];
  }
}

// A warp: one part of one token to all its ranks. `piece` and `expert` are loaded already.
template <Rows kRows>
__device__ void send_unit(const Now& now, const Params& p, const Shared& shared, const Flags& flags,
                          typename PieceOf<kRows>::Type& piece, std::int64_t expert, int unit, int lane) {
  using Piece = typename PieceOf<kRows>::Type;
  const int me = p.common.rank, token = unit / p.parts.count, part = unit % p.parts.count;
  const int rank = replica_of(p, shared.peers, expert, token).rank;
  const unsigned same = __match_any_sync(kAllLanes, rank);
  const bool leads = rank >= 0 && (same & ((1u << lane) - 1)) == 0;
  std::byte* const message = leads ? message_of(now, p, shared.peers.window(rank), me, token) : nullptr;
  const std::int64_t end = part_end(p, part);
  for (std::int64_t byte = part_begin(p, part);;) {
    piece.write(p, message, byte, end, lane);
    byte += Piece::kBytes;
    if (byte >= end) break;
    piece.load(p, token, byte, end, lane);
  }
  if (part == 0 || p.scales != nullptr)
    for (unsigned rest = __ballot_sync(kAllLanes, leads); rest != 0; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      write_beside(p, from_lane(message, from), __shfl_sync(kAllLanes, rank, from), token, part, rank, lane);
    }
  if (leads) flags.add(flag_of(now, shared.peers.window(rank), flag_number(p, me, token, part)));
}

// Phases open, route, send. False: not all was sent.
template <Rows kRows>
__device__ bool send(const Now& now, const Params& p, const Shared& shared, const Flags& flags, const Place& at) {
  using Piece = typename PieceOf<kRows>::Type;
  const int ranks = p.common.num_ranks;
  const int units = p.num_tokens * p.parts.count;
  int unit = at.number(ranks);  // blocks that route take rows last
  Piece piece;
  std::int64_t expert = -1;
  const auto look = [&] {  // starts the loads of a unit's first piece
    const int token = unit / p.parts.count, part = unit % p.parts.count;
    piece.load(p, token, part_begin(p, part), part_end(p, part), at.lane);
    expert = at.lane < p.num_topk ? expert_of(p, std::int64_t{token} * p.num_topk + at.lane) : -1;
  };
  if (unit < units) look();
  shared.peers.load(p.common);
  flags.clear();
  if (!open_operation(now, p.window, p.ticket, at, (p.phases & kReceive) != 0)) return false;
  for (int dst = at.block; dst < ranks; dst += at.blocks) {
    if (shared.peers.active(dst)) route_to(now, p, shared, dst, at);
    __syncthreads();
  }
  const int rounds = (units + at.warps() * Flags::kUnits - 1) / (at.warps() * Flags::kUnits);
  for (int round = 0; round < rounds; ++round, flags.raise(now, at))
    for (int i = 0; i < Flags::kUnits && unit < units; ++i) {
      send_unit<kRows>(now, p, shared, flags, piece, expert, unit, at.lane);
      unit += at.warps();
      if (unit < units) look();
    }
  return true;
}

}  // namespace
}  // namespace deep_ep::cuda
