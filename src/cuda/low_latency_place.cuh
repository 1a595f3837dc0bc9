// SPDX-License-Identifier: MIT
// Low-latency dispatch, place: a warp waits for a part of a row and puts it at each of its experts.
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
  std::int32_t row;      // where it goes
};

__device__ Arrived read_head(const Now& now, const Params& p, const Gathered& g, std::byte* window, int src, int token,
                             int lane) {
  Arrived a{message_of(now, p, window, src, token), src, token, -1, -1, -1};
  const std::int32_t number = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.src_token_at));
  std::int32_t row = 0;
  if (lane < p.num_topk) {
    a.slot = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.slots_at) + lane);
    row = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.rows_at) + lane);
  }
  if (number < 0) return a;
  a.arrival = g.first_arrival[src] + number;
  if (a.slot >= 0)
    a.row = p.layout == OutputLayout::kByRank ? a.arrival
                                              : g.slot_first[a.slot] + g.rows_before[src * p.num_slots + a.slot] + row;
  return a;
}

// All that comes once per token.
__device__ void place_beside(const Params& p, const Arrived& a, int lane) {
  const bool by_rank = p.layout == OutputLayout::kByRank;
  const std::int64_t entry = std::int64_t{a.arrival} * p.num_topk + lane;
  if (lane < p.num_topk) {
    std::byte* const ids = p.block + p.at.topk_idx_at;
    if (p.shape.topk_idx_bytes == 8) {
      reinterpret_cast<std::int64_t*>(ids)[entry] = a.slot;
    } else {
      reinterpret_cast<std::int32_t*>(ids)[entry] = a.slot;
    }
    p.tables.arrival_row[entry] = a.row;
    if (p.tables.row_token != nullptr && a.row >= 0) p.tables.row_token[a.row] = a.token;
    if (p.shape.topk_weights) {
      const float weight = __ldcg(reinterpret_cast<const float*>(a.message + p.message.weights_at) + lane);
      auto* const weights = reinterpret_cast<float*>(p.block + p.at.topk_weights_at);
      p.tables.arrival_weights[entry] = weight;
      if (by_rank) weights[entry] = weight;
      if (!by_rank && a.row >= 0) weights[a.row] = weight;
    }
  }
  if (lane == 0) p.tables.src_token[a.arrival] = a.token;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* from = reinterpret_cast<const std::int32_t*>(a.message + p.message.side_at[i]);
    auto* to = reinterpret_cast<std::int32_t*>(p.block + p.at.side_at[i]) + std::int64_t{a.arrival} * words;
    for (int word = lane; word < words; word += 32) to[word] = __ldcg(from + word);
  }
}

// A part of a row and its scales, to each row that the lanes of `targets` name.
__device__ void place_part(const Params& p, const Arrived& a, unsigned targets, int part, int lane) {
  constexpr int kVectors = PlainPiece::kVectors;
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const std::int64_t end = part_end(p, part);
  const std::byte* const from = a.message + p.message.row_at;
  for (std::int64_t piece = part_begin(p, part); piece < end; piece += PlainPiece::kBytes) {
    uint4 v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t byte = piece + 512 * i + 16 * lane;
      if (byte < end) v[i] = load16(from + byte);
    }
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      const std::int64_t row = __shfl_sync(kAllLanes, a.row, __ffs(rest) - 1);
      std::byte* const to = p.block + p.at.x_at + row * row_bytes;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t byte = piece + 512 * i + 16 * lane;
        if (byte < end) store16(to + byte, v[i]);
      }
    }
  }
  const int first_scale = part * p.parts.scales;
  const int end_scale = min(first_scale + p.parts.scales, p.shape.num_scales);
  for (int word = first_scale + lane; word - lane < end_scale; word += 32) {
    std::int32_t value = 0;
    if (word < end_scale) value = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.scales_at) + word);
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      const std::int64_t row = __shfl_sync(kAllLanes, a.row, __ffs(rest) - 1);
      auto* const to = reinterpret_cast<std::int32_t*>(p.block + p.at.scales_at) + p.at.first_scale(row);
      if (word < end_scale) to[word * p.at.scale_column_stride] = value;
    }
  }
}

// Rows that nobody writes: padding between experts is zero, ids behind the last arrival say "nobody".
__device__ void clear_unwritten(const Params& p, const Gathered& g, const Place& at) {
  const int number = at.number(), warps = at.warps();
  for (int slot = number; p.layout == OutputLayout::kByExpert && slot < p.num_slots; slot += warps) {
    for (std::int64_t row = g.slot_first[slot] + g.slot_rows[slot]; row < g.slot_first[slot + 1]; ++row) {
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

// Phases gather, place. False: not all has come.
__device__ bool receive(const Now& now, const Params& p, const Shared& shared, const Place& at) {
  const Gathered g = gathered_of(p, shared);
  if (!gather(now, p, shared, g, at)) return false;
  const int ranks = p.common.num_ranks;
  std::byte* const window = p.window;
  int tokens = 0;
  for (int src = 0; src < ranks; ++src) tokens += g.tokens[src];
  bool good = true;
  for (int unit = at.number(); unit < tokens * p.parts.count; unit += at.warps()) {
    const int part = unit % p.parts.count;
    int src = 0, token = unit / p.parts.count;
    while (token >= g.tokens[src]) token -= g.tokens[src++];
    std::uint32_t* const flag = flag_of(now, window, flag_number(p, src, token, part));
    int came = 0;
    if (at.lane == 0) came = ptx::load_acquire_system(flag) == static_cast<std::uint32_t>(now.epoch);
    const Arrived a = read_head(now, p, g, window, src, token, at.lane);
    if (a.arrival < 0) continue;
    if (at.lane == 0 && came == 0) came = await_flag(now, flag, src);
    came = __shfl_sync(kAllLanes, came, 0);
    good = good && came != 0;
    unsigned targets = __ballot_sync(kAllLanes, a.row >= 0);
    if (p.layout == OutputLayout::kByRank) targets &= ~targets + 1;  // one row, however many selections
    if (came == 0) continue;
    place_part(p, a, targets, part, at.lane);
    if (part == 0) place_beside(p, a, at.lane);
  }
  clear_unwritten(p, g, at);
  if (at.block == 0) write_tables(p, g);
  return good;
}

}  // namespace
}  // namespace deep_ep::cuda
