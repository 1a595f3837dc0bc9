// SPDX-License-Identifier: MIT
// Low-latency dispatch: where a token's message lies, and the shared memory of a block.
#pragma once

#include "cuda/lines.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

using Params = LowLatencyDispatchParams;

constexpr int kRouteSteps = 2;  // of tokens that a warp routes before the block adds up

// What the ticket's lines hold in an owner's window.
struct Messages {
  std::byte* base;
  const Params& p;

  __device__ Messages(const Now& now, const Params& params, std::byte* window)
      : base(window + now.common.layout.lines(ticket_of(now)) + plan::call_lines(params.common.num_ranks)), p(params) {}
  __device__ std::byte* counts(int source) const { return base + source * p.count_bytes; }
  __device__ std::byte* of(int source, int token) const {
    return base + p.messages_at +
           std::uint64_t{static_cast<std::uint32_t>(source * p.max_tokens_per_rank + token)} * p.lines.bytes;
  }
};

__device__ std::uint32_t number_of(const Now& now) { return static_cast<std::uint32_t>(now.epoch); }

// How many of a lane's vectors of a piece lie in the row.
__device__ int vectors_of(const Params& p, int piece, int lane) {
  return PieceOfRow::count(static_cast<std::int64_t>(p.shape.row_bytes) - std::int64_t{piece} * plan::kPieceBytes,
                           lane);
}

// Quantised rows: which lanes write, and read, a line of scales of a piece, and where among the row's lines of scales.
// One for each group of a vector, or one for all where four share a word.
__device__ bool writes_scales(const Params& p, int vectors, int lane) {
  return vectors > 0 && lane % (p.scale_kind == plan::Fp8Scale::kUe8m0 ? 32 : 8) == 0;
}
__device__ int scale_line(int piece, int lane) {
  return (piece * plan::LineMessage::kScaleLines + lane / 8) * plan::kLineBytes;
}

// Shared memory of a block: the peers, what route needs, what gather needs. Nothing is used twice, so that no barrier
// stands between sending and receiving.
struct Shared {
  Peers peers;
  std::int32_t *of_route, *of_gather;
};

__host__ __device__ std::size_t route_words(int warps, int slots) {
  return 1 + (static_cast<std::size_t>(warps) + 1) * (slots + 1);
}

__device__ Shared shared_of(const Params& p, std::byte* memory) {
  auto* const words = reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks);
  return {{reinterpret_cast<Peer*>(memory)}, words, words + route_words(p.route.most_warps, p.max_slots)};
}

}  // namespace
}  // namespace deep_ep::cuda
