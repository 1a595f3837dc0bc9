// SPDX-License-Identifier: MIT
// Low-latency dispatch: where a token's message and its parts lie, rows as they are, and the shared memory of a
// block.
#pragma once

#include "cuda/low_latency.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

using Params = LowLatencyDispatchParams;

constexpr int kRouteSteps = 4;  // of tokens that a warp routes before the block adds up

__device__ std::byte* message_of(const Now& now, const Params& p, std::byte* window, int source, int token) {
  const std::int64_t number = std::int64_t{source} * p.max_tokens_per_rank + token;
  return window + now.common.layout.low_latency(ticket_of(now)) + number * static_cast<std::int64_t>(p.message.bytes);
}

__device__ std::int64_t flag_number(const Params& p, int source, int token, int part) {
  return (std::int64_t{source} * p.max_tokens_per_rank + token) * p.parts.count + part;
}

// A part of a row on the wire.
__device__ std::int64_t part_begin(const Params& p, int part) { return std::int64_t{part} * p.parts.bytes; }
__device__ std::int64_t part_end(const Params& p, int part) {
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const std::int64_t end = part_begin(p, part) + p.parts.bytes;
  return end < row_bytes ? end : row_bytes;
}

// Shared memory of a block: the peers, then what route or gather need.
struct Shared {
  Peers peers;
  std::int32_t* words;
};

__device__ Shared shared_of(const Params& p, std::byte* memory) {
  return {{reinterpret_cast<Peer*>(memory)},
          reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks)};
}

__host__ __device__ int route_warps(int max_slots) {
  constexpr int kMostWords = 40 << 10;
  const int fit = kMostWords / (max_slots + 1) - 1;
  return fit < 1 ? 1 : fit > kLowLatencyWarps ? kLowLatencyWarps : fit;
}

// A lane's share of a piece of a row that travels as it is.
struct PlainPiece {
  static constexpr int kVectors = 4;
  static constexpr int kBytes = kVectors * 512;
  uint4 v[kVectors];

  __device__ void load(const Params& p, int token, std::int64_t begin, std::int64_t end, int lane) {
    const std::byte* row = p.x + token * static_cast<std::int64_t>(p.shape.row_bytes);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t byte = begin + 512 * i + 16 * lane;
      if (byte < end) v[i] = __ldg(reinterpret_cast<const uint4*>(row + byte));
    }
  }
  // To every lane's `message` that is not null.
  __device__ void write(const Params& p, std::byte* message, std::int64_t begin, std::int64_t end, int lane) const {
    for (unsigned rest = __ballot_sync(kAllLanes, message != nullptr); rest != 0; rest &= rest - 1) {
      std::byte* const row = from_lane(message, __ffs(rest) - 1) + p.message.row_at;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t byte = begin + 512 * i + 16 * lane;
        if (byte < end) store16(row + byte, v[i]);
      }
    }
  }
};

}  // namespace
}  // namespace deep_ep::cuda
