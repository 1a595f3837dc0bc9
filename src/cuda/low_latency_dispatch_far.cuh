// SPDX-License-Identifier: MIT
// Low-latency dispatch to ranks that share no memory with us: one block for each of them counts, packs the messages in
// the order of their arrival into pinned memory and hands them to the proxy thread, each warp its own as soon as they
// are whole. The receiver waits until all of a source's are there, and places them from pinned memory of its own.
#pragma once

#include "cuda/low_latency_place.cuh"
#include "cuda/low_latency_send.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// Send
// ---------------------------------------------------------------------------------------------------------------------

// A warp: the row of a token, and its scales where it is quantised here.
template <Rows kRows>
__device__ void pack_row(const Params& p, std::byte* message, int token, int lane) {
  for (int piece = 0; piece < p.pieces; ++piece) {
    typename PieceOf<kRows>::Type loaded;
    loaded.load(p, token, piece, lane);
    const Outgoing out = loaded.outgoing(p, token, piece, lane);
    const int count = vectors_of(p, piece, lane);
    std::byte* const to = message + p.far_message.row_at + piece * plan::kPieceBytes + 16 * lane;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (i < count) store16(to + 512 * i, out.row.v[i]);
    if (kRows == Rows::kAsTheyAre || !writes_scales(p, count, lane)) continue;
    auto* const scales = reinterpret_cast<std::uint32_t*>(message + p.far_message.scales_at);
    const ScaleAt scale(p, piece, lane);
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (i < count) scales[scale.first + i * scale.step] = out.scales[i];
  }
}

// A warp: what the caller brought beside a token's row.
__device__ void pack_beside(const Params& p, std::byte* message, int token, int lane) {
  auto* const scales = reinterpret_cast<std::int32_t*>(message + p.far_message.scales_at);
  for (int i = lane; p.scales != nullptr && i < p.shape.num_scales; i += 32)
    scales[i] = p.scales[token * p.scale_strides[0] + i * p.scale_strides[1]];
  for (int i = 0; i < p.shape.num_side; ++i) {
    const int words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* const from = reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words;
    auto* const to = reinterpret_cast<std::int32_t*>(message + p.far_message.side_at[i]);
    for (int word = lane; word < words; word += 32) to[word] = from[word];
  }
}

// A lane: its selection, as the receiver needs it.
__device__ void pack_selection(const Params& p, std::byte* message, const Routed& r, int row) {
  reinterpret_cast<std::int32_t*>(message + p.far_message.slots_at)[r.k] = r.slot;
  reinterpret_cast<std::int32_t*>(message + p.far_message.rows_at)[r.k] = row;
  if (r.k == 0) *reinterpret_cast<std::int32_t*>(message + p.far_message.src_token_at) = r.token;
  if (!p.shape.topk_weights) return;
  const bool given = r.slot >= 0 || !p.mask_topk_weights;
  reinterpret_cast<float*>(message + p.far_message.weights_at)[r.k] =
      given ? p.topk_weights[std::int64_t{r.token} * p.num_topk + r.k] : 0;
}

// A block: counts and messages for one far rank. The counters are clear.
template <Rows kRows>
__device__ void send_far(const Now& now, const Params& p, const Shared& shared, int dst, const RouteAhead& ahead,
                         const Place& at) {
  __shared__ std::uint32_t puts;
  const int slots = ahead.slots, ticket = ticket_of(now), of_step = p.route.of_step;
  const RouteCounters counters(shared, slots);
  std::byte* const mirror = shared.peers.window(dst);
  const std::size_t first_at = p.common.rank * p.far_source_bytes;
  std::byte* const messages = staging_of(p.common, dst, ticket) + first_at;
  if (threadIdx.x == 0) puts = 0;
  if (at.warp == kLowLatencyWarps - 1) write_signature(now, mirror, at.lane);
  const Counted found = route_tokens(p, shared, dst, ahead, counters, at, [&](const Routed& r, int row, int arrival) {
    if (r.token >= 0 && arrival >= 0) pack_selection(p, messages + arrival * p.far_message.bytes, r, row);
    int first = -1, count = 0;
    for (int i = 0; i < of_step; ++i) {
      const int number = __shfl_sync(kAllLanes, r.token >= 0 ? arrival : -1, i * p.num_topk);
      if (number < 0) continue;
      const int token = __shfl_sync(kAllLanes, r.token, i * p.num_topk);
      std::byte* const message = messages + number * p.far_message.bytes;
      pack_row<kRows>(p, message, token, at.lane);
      pack_beside(p, message, token, at.lane);
      if (count++ == 0) first = number;
    }
    __syncwarp();  // what the lanes wrote comes before lane 0's release in push()
    if (at.lane != 0 || count == 0) return;
    put_low_latency(now, dst, ticket, first_at + first * p.far_message.bytes, count * p.far_message.bytes);
    atomicAdd(&puts, 1);
  });
  if (found.bad != kNoSelection) {
    if (threadIdx.x == 0) refuse_selection(now, p, dst, mirror, static_cast<std::int64_t>(found.bad));
    return;
  }
  std::int32_t* const counted = announced_tokens_in(now, mirror, p.common.rank);
  for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kLowLatencyThreads)
    counted[p.common.num_ranks + slot] = counters.before(found.warps, slot);
  const std::int32_t tokens = counters.before(found.warps, slots);
  if (threadIdx.x == 0) counted[0] = tokens;
  __syncthreads();
  if (threadIdx.x != 0) return;
  count_puts(now, puts);
  const std::size_t payload =
      plan::WindowLayout::kAnnouncementHead + sizeof(std::int32_t) * (p.common.num_ranks + slots);
  publish_to(now, dst, net::Flag::kAnnounced, kSame, payload);
  publish_to(now, dst, net::Flag::kArrived, kSame, 0, puts);
  count_sent(p.common, dst, static_cast<std::uint64_t>(tokens) * p.message_bytes);
}

// Receive
// ---------------------------------------------------------------------------------------------------------------------

// What came beside a row, in memory.
struct FarBeside {
  const Params& p;
  const std::byte* message;
  int lane;

  __device__ float weight() const {
    return __ldcg(reinterpret_cast<const float*>(message + p.far_message.weights_at) + lane);
  }
  template <class Write>
  __device__ bool side(int i, int words, const Write& write) const {
    return all(p.far_message.side_at[i], words, write);
  }
  template <class Write>
  __device__ bool scales(const Write& write) const {
    return all(p.far_message.scales_at, p.shape.num_scales, write);
  }

 private:
  template <class Write>
  __device__ bool all(std::size_t at, int words, const Write& write) const {
    const auto* const from = reinterpret_cast<const std::int32_t*>(message + at);
    for (int word = lane; word < words; word += 32) write(word, __ldcg(from + word));
    return true;
  }
};

// A lane's share of a piece of a row, in memory.
struct FarPiece {
  uint4 v[plan::kPieceVectors];
  __device__ FarPiece(const Params& p, const std::byte* message, int piece, int lane) {
    const int count = vectors_of(p, piece, lane);
    const std::byte* const from = message + p.far_message.row_at + piece * plan::kPieceBytes + 16 * lane;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i) v[i] = i < count ? load16(from + 512 * i) : uint4{};
  }
  __device__ uint4 vector(int i) const { return v[i]; }
};

struct FarUnit {
  int src, number, piece;  // number: of the message among those of its source
};

// A warp: a piece of a message. `heard`: the source whose messages this warp knows to be there. False: they did not
// come.
__device__ bool receive_far_piece(const Now& now, const Params& p, const Gathered& g, const FarUnit& unit, int& heard,
                                  int lane) {
  std::uint32_t value = 0;
  if (unit.src != heard &&
      !await_word(now, unit.src, &words_in(now, p.common.peers[unit.src].inbox, unit.src).arrived, value, false, lane))
    return false;
  heard = unit.src;
  const plan::FarMessage& at = p.far_message;
  const std::byte* const message =
      far_slots_of(p.common, ticket_of(now)) + unit.src * p.far_source_bytes + unit.number * at.bytes;
  Told told{-1, 0, unit.number};
  if (lane < p.num_topk) {
    told.slot = __ldcg(reinterpret_cast<const std::int32_t*>(message + at.slots_at) + lane);
    told.row = __ldcg(reinterpret_cast<const std::int32_t*>(message + at.rows_at) + lane);
  }
  const int token = __ldcg(reinterpret_cast<const std::int32_t*>(message + at.src_token_at));
  const int count = vectors_of(p, unit.piece, lane);
  uint4 scales{};
  if (p.quantize && writes_scales(p, count, lane)) {
    const ScaleAt scale(p, unit.piece, lane);
    const auto* const from = reinterpret_cast<const std::uint32_t*>(message + at.scales_at) + scale.first;
    scales.x = __ldcg(from);
    if (count > 1) scales.y = __ldcg(from + scale.step);
    if (count > 2) scales.z = __ldcg(from + 2 * scale.step);
  }
  const Arrived a = arrived(p, g, message, unit.src, token, told, lane);
  // A number that no token has is nobody's: what came over a network is checked before it is used.
  if (a.arrival < 0 || static_cast<std::uint32_t>(token) >= static_cast<std::uint32_t>(p.max_tokens_per_rank))
    return true;
  place_piece(p, a, FarPiece(p, message, unit.piece, lane), scales, unit.piece, lane);
  return unit.piece != 0 || place_rest(p, a, FarBeside{p, message, lane}, lane);
}

}  // namespace
}  // namespace deep_ep::cuda
