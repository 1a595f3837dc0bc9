// SPDX-License-Identifier: MIT
// Combine between nodes, our end as a home: what we ask of each far node, and the rows that come back.
#pragma once

#include "cuda/forward_lanes.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

__device__ int requests_at_once(const Exchange& e) {
  const std::int64_t fit = e.cut(e.request(e.p.combine.weights != nullptr).bytes).per_chunk;
  return static_cast<int>(fit < e.p.most_requests ? fit : e.p.most_requests);
}

// Every thread, the slot being ours: writes the next requests and sends them. Selections as forward_plan() numbered
// them.
__device__ void send_requests(const Exchange& e, const Partner& to) {
  const CombineParams& p = e.p.combine;
  Asked& asked = *to.asked;
  const plan::RequestUnit& request = e.request(p.weights != nullptr);
  const plan::Chunking cut = e.cut(request.bytes);
  const int first = asked.requests_sent, units = min(requests_at_once(e), asked.requests - first);
  const int node = p.node_of_rank[to.rank];
  const std::int32_t* const tokens = e.p.asking + std::int64_t{node} * p.num_tokens + first;
  std::byte* const chunk = chunk_to(e.common(), to.rank, plan::kRequestSlot);
  for (int i = static_cast<int>(threadIdx.x); i < units * p.num_topk; i += kThreads) {
    const int k = i % p.num_topk;
    const std::int64_t of_token = std::int64_t{tokens[i / p.num_topk]} * p.num_topk;
    const std::int32_t* const ranks = p.dst_rank + of_token;
    const int rank = ranks[k];
    bool there = rank >= 0 && p.node_of_rank[rank] == node;
    for (int j = k + 1; there && p.layout == OutputLayout::kByRank && j < p.num_topk; ++j) there = ranks[j] != rank;
    plan::Selection selection;
    if (there) selection = {static_cast<std::int16_t>(rank - to.first_rank), 0, e.p.routed_row[of_token + k]};
    std::byte* const unit = chunk + plan::kChunkHeadBytes + static_cast<std::size_t>(i / p.num_topk) * request.bytes;
    reinterpret_cast<plan::Selection*>(unit)[k] = selection;
    if (p.weights != nullptr) reinterpret_cast<float*>(unit + request.factors_at)[k] = p.weights[of_token + k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  plan::ChunkHead head;
  head.epoch = e.now.epoch;
  head.stream = plan::Stream::kRequests;
  head.units = static_cast<std::uint32_t>(units);
  head.first_unit = static_cast<std::uint64_t>(first);
  head.bytes = cut.chunk_bytes(units);
  put_chunk(e.now, to.rank, plan::kRequestSlot, head);
  asked.requests_sent = first + units;
}

// One thread: whether a chunk of rows is one that we await.
__device__ bool is_awaited(const Exchange& e, const Partner& from, const plan::ChunkHead& head) {
  const bool joined = e.p.combine.forwarded.joined;
  const plan::Chunking cut = e.cut(e.unit(joined).bytes);
  return from.asked != nullptr && head.stream == plan::Stream::kRows && head.units > 0 &&
         head.units <= static_cast<std::uint64_t>(cut.per_chunk) && head.bytes == cut.chunk_bytes(head.units) &&
         head.first_unit < static_cast<std::uint64_t>(from.asked->units) &&
         head.units <= static_cast<std::uint64_t>(from.asked->units) - head.first_unit;
}

// Every thread: copies the rows of a chunk to where the sums read them, and gives the slot back.
__device__ void take_rows(const Exchange& e, const Partner& from, int slot, const plan::ChunkHead& head) {
  const CombineParams& p = e.p.combine;
  const ForwardedRows& to = p.forwarded;
  const plan::ReturnUnit& unit = e.unit(to.joined);
  const auto row_bytes = static_cast<std::int64_t>(p.row_bytes);
  const int units = static_cast<int>(head.units);
  const std::int64_t first = from.asked->first + static_cast<std::int64_t>(head.first_unit);
  const std::byte* const chunk = chunk_from(e.common(), from.rank, slot) + plan::kChunkHeadBytes;
  copy_rows(
      units, row_bytes, [&](int i) { return chunk + static_cast<std::size_t>(i) * unit.bytes; },
      [&](int i) { return to.x + (first + i) * row_bytes; });
  for (int i = static_cast<int>(threadIdx.x); i < units * to.weights_of_unit; i += kThreads) {
    const std::byte* const weights =
        chunk + static_cast<std::size_t>(i / to.weights_of_unit) * unit.bytes + unit.weights_at;
    to.weights[first * to.weights_of_unit + i] =
        __ldcg(reinterpret_cast<const float*>(weights) + i % to.weights_of_unit);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  give_back(e.now, from.rank, slot);  // after all reads: the barrier, and the release in the queue
  atomicAdd(&from.asked->units_here, head.units);
}

}  // namespace
}  // namespace deep_ep::cuda
