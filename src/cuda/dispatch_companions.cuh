// SPDX-License-Identifier: MIT
// Dispatch: the warps that write what travels beside the rows, and what nobody else writes.
#pragma once

#include "cuda/dispatch_routes.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A row's place among a receiver's scales.
__device__ void store_scale(const Destination& to, std::int64_t row, int word, std::int32_t value) {
  auto* scales = reinterpret_cast<std::int32_t*>(to.block + to.at.scales_at) + to.at.first_scale(row);
  scales[word * to.at.scale_column_stride] = value;
}

// One selection as its companion lane sees it.
struct Companion {
  int token, k;
  std::int32_t rank, slot;  // rank -1: none, or nobody to write to
  bool first;               // the token's first to that rank
  std::int64_t arrival, row;
};

__device__ bool carries_ids_or_weights(const DispatchParams& p) {
  return !p.cached || (p.shape.topk_weights && p.layout == OutputLayout::kByRank);
}

// What a rank is told of one of a token's selections.
struct Entry {
  int k;
  bool for_it;        // that rank's
  std::int32_t slot;  // there, as is the row
  std::int64_t row;
  float weight;
};

// Entry k of what is told of a token once per rank.
__device__ void write_entry(const DispatchParams& p, const Destination& to, std::int64_t arrival, const Entry& e) {
  const std::int64_t there = arrival * p.num_topk + e.k;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  if (!p.cached) {
    const std::int32_t slot = e.for_it ? e.slot : -1;
    std::byte* ids = to.block + to.at.topk_idx_at;
    if (p.shape.topk_idx_bytes == 8) {
      reinterpret_cast<std::int64_t*>(ids)[there] = slot;
    } else {
      reinterpret_cast<std::int32_t*>(ids)[there] = slot;
    }
    if (!by_rank)
      reinterpret_cast<std::int32_t*>(to.block + to.at.arrival_row_at)[there] =
          e.for_it ? static_cast<std::int32_t>(e.row) : -1;
  }
  if (p.shape.topk_weights && by_rank)
    reinterpret_cast<float*>(to.block + to.at.topk_weights_at)[there] =
        e.for_it || !p.mask_topk_weights ? e.weight : 0.0f;
}

// One side tensor's words, once per rank and token. All lanes.
__device__ void write_side(const DispatchParams& p, const Destination& to, std::int64_t arrival, int i,
                           const std::int32_t* words, int lane) {
  const auto count = static_cast<int>(p.shape.side_bytes[i] / 4);
  auto* dst = reinterpret_cast<std::int32_t*>(to.block + to.at.side_at[i]) + arrival * count;
  for (int word = lane; word < count; word += 32) dst[word] = words[word];
}

// The caller's scales, once per row. All lanes.
__device__ void write_given_scales(const DispatchParams& p, const Destination& to, std::int64_t row, int token,
                                   int lane) {
  for (int word = lane; p.scales != nullptr && word < p.shape.num_scales; word += 32)
    store_scale(to, row, word, p.scales[token * p.scale_strides[0] + word * p.scale_strides[1]]);
}

// Companion warps: everything beside the rows, and this rank's own record of where its tokens went. As many tokens at a
// time as a warp has lanes for, a lane for each selection.
class Companions {
 public:
  __device__ Companions(const DispatchParams& p, const Destination* to, int lane)
      : p_(p), to_(to), lane_(lane), lanes_(min(p.num_topk, 32)), token_here_(lane / lanes_), tokens_(32 / lanes_) {}

  __device__ void write_all(int warp, int warps) {
    const int step = static_cast<int>(gridDim.x) * warps * tokens_;
    const int first = (static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x)) * tokens_;
    for (int token = first; token < p_.num_tokens; token += step)
      for (int chunk = 0; chunk * 32 < p_.num_topk; ++chunk) write(read(token + token_here_, chunk));
  }

 private:
  __device__ Companion read(int token, int chunk) {
    Companion c{token, chunk * 32 + lane_ % lanes_, -1, -1, false, -1, -1};
    if (token_here_ < tokens_ && token < p_.num_tokens && c.k < p_.num_topk) look(c);
    if (c.rank >= 0 && to_[c.rank].block == nullptr) c.rank = -1;  // far: another kernel sends it
    c.first = first_to_rank(p_, c.rank, token, token_here_, chunk, lane_);
    return c;
  }
  // Everything but `first`.
  __device__ void look(Companion& c) const {
    const std::int64_t at = std::int64_t{c.token} * p_.num_topk + c.k;
    const bool by_rank = p_.layout == OutputLayout::kByRank;
    c.rank = p_.routes.dst_rank[at];
    c.arrival = (p_.cached ? p_.routes.dst_arrival : p_.routes.relative_arrival)[at];
    if (!by_rank) c.row = (p_.cached ? p_.routes.dst_row : p_.routes.relative_row)[at];
    if (!p_.cached) c.slot = p_.routes.slot[at];
    if (c.rank >= 0 && !to_[c.rank].active) c.rank = -1;
    if (c.rank >= 0 && !p_.cached) {
      c.arrival += to_[c.rank].first_arrival;
      if (!by_rank) c.row += to_[c.rank].first_rows[c.slot];
    }
    if (by_rank) c.row = c.arrival;
    if (p_.cached) return;
    p_.routes.dst_row[at] = c.rank >= 0 ? static_cast<std::int32_t>(c.row) : -1;
    p_.routes.dst_arrival[at] = c.rank >= 0 ? static_cast<std::int32_t>(c.arrival) : -1;
  }

  __device__ void write(const Companion& c) {
    const bool by_rank = p_.layout == OutputLayout::kByRank;
    if (carries_ids_or_weights(p_)) {
      if (!p_.cached && c.first)
        reinterpret_cast<std::int32_t*>(to_[c.rank].block + to_[c.rank].at.src_token_at)[c.arrival] = c.token;
      for (int i = 0; i < lanes_; ++i) {
        const int from = min(token_here_ * lanes_ + i, 31);
        const int rank = __shfl_sync(kAllLanes, c.rank, from);
        const std::int64_t arrival = __shfl_sync(kAllLanes, static_cast<long long>(c.arrival), from);
        const bool first = __shfl_sync(kAllLanes, static_cast<int>(c.first), from) != 0;
        if (first && token_here_ < tokens_) write_entries(c, rank, arrival);
      }
    }
    if (p_.shape.topk_weights && !by_rank && c.rank >= 0)
      reinterpret_cast<float*>(to_[c.rank].block + to_[c.rank].at.topk_weights_at)[c.row] =
          p_.topk_weights[std::int64_t{c.token} * p_.num_topk + c.k];
    if (p_.shape.num_side == 0 && p_.scales == nullptr) return;
    for (unsigned rest = __ballot_sync(kAllLanes, c.rank >= 0 && (c.first || !by_rank)); rest != 0; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      const Destination& to = to_[__shfl_sync(kAllLanes, c.rank, from)];
      const int token = __shfl_sync(kAllLanes, c.token, from);
      const std::int64_t arrival = __shfl_sync(kAllLanes, static_cast<long long>(c.arrival), from);
      const std::int64_t row = __shfl_sync(kAllLanes, static_cast<long long>(c.row), from);
      if (__shfl_sync(kAllLanes, static_cast<int>(c.first), from) != 0)
        for (int i = 0; i < p_.shape.num_side; ++i)
          write_side(p_, to, arrival, i,
                     reinterpret_cast<const std::int32_t*>(p_.side[i] + token * p_.shape.side_bytes[i]), lane_);
      write_given_scales(p_, to, row, token, lane_);
    }
  }
  // The lane's entry; of a token with more selections than lanes also those of the other chunks.
  __device__ void write_entries(const Companion& c, int rank, std::int64_t arrival) {
    for (int k = c.k % 32; k < p_.num_topk; k += 32) {
      Companion other = c;
      if (k != c.k) {
        other.k = k, other.rank = -1;
        look(other);
      }
      const float weight = p_.shape.topk_weights ? p_.topk_weights[std::int64_t{c.token} * p_.num_topk + k] : 0;
      write_entry(p_, to_[rank], arrival, {k, other.rank == rank, other.slot, other.row, weight});
    }
  }

  const DispatchParams& p_;
  const Destination* to_;
  const int lane_, lanes_, token_here_, tokens_;
};

__device__ bool has_companions(const DispatchParams& p) {
  return !p.cached || p.shape.topk_weights || p.shape.num_side > 0 || p.scales != nullptr;
}

// Rows that no source writes: padding between experts is zero, ids behind a bounded output's rows say "nobody".
__device__ void clear_unwritten(const DispatchParams& p, const Destination& mine, int warp, int of_block, int lane) {
  const int warps = static_cast<int>(gridDim.x) * of_block;
  const int number = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
  if (p.layout == OutputLayout::kByExpert) {
    for (int slot = number; slot < p.num_slots; slot += warps) {
      for (std::int64_t row = p.slot_first_row[slot] + p.slot_rows[slot]; row < p.slot_first_row[slot + 1]; ++row) {
        std::byte* x = mine.block + mine.at.x_at + row * static_cast<std::int64_t>(p.shape.row_bytes);
        for (std::int64_t byte = 16 * lane; byte < static_cast<std::int64_t>(p.shape.row_bytes); byte += 16 * 32)
          *reinterpret_cast<uint4*>(x + byte) = uint4{};
        for (int word = lane; word < p.shape.num_scales; word += 32) store_scale(mine, row, word, 0);
        if (p.shape.topk_weights && lane == 0) reinterpret_cast<float*>(mine.block + mine.at.topk_weights_at)[row] = 0;
      }
    }
  }
  if (p.cached || p.max_rows == 0) return;
  const std::int64_t words = p.shape.topk_idx_bytes / 4 * p.num_topk;
  auto* ids = reinterpret_cast<std::int32_t*>(mine.block + mine.at.topk_idx_at);
  for (std::int64_t i = p.common.state->arrivals * words + number * 32 + lane; i < p.arrivals * words; i += warps * 32)
    ids[i] = -1;
}

// For Statistics. Rows of kByRank are the arrivals, whose number is known; others are counted by the companion warps.
__device__ void count_rows_sent(const DispatchParams& p, Destination* to, int warp, int warps, int lane) {
  if (p.layout == OutputLayout::kByRank) return;
  const std::int64_t selections = std::int64_t{p.num_tokens} * p.num_topk;
  const std::int64_t step = std::int64_t{gridDim.x} * warps * 32;
  for (std::int64_t i = (std::int64_t{blockIdx.x} * warps + warp) * 32 + lane; i < selections; i += step) {
    const int rank = p.routes.dst_rank[i];
    if (rank >= 0) atomicAdd(&to[rank].rows_counted, 1u);
  }
}

// Every thread of a block, after its companions have counted.
__device__ void add_rows_sent(const DispatchParams& p, const Destination* to) {
  if (p.layout == OutputLayout::kByRank) return;
  __syncthreads();
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x))
    if (to[peer].active) count_sent(p.common, peer, to[peer].rows_counted * p.shape.bytes_of_row(p.layout));
}

}  // namespace
}  // namespace deep_ep::cuda
