// SPDX-License-Identifier: MIT
// Combine between nodes: whom this rank exchanges with, and how blocks share the work.
//
// A *lane* is a slot between us and one far rank, in both directions: the peer's slot that we fill, and ours that it
// fills. Every lane is one block's, which goes from one of its lanes to the next and never waits at any: so nobody
// waits for a slot without emptying his own.
#pragma once

#include "cuda/block_scan.cuh"
#include "cuda/chunks.cuh"
#include "cuda/combine_feed.cuh"
#include "cuda/forward_combine.h"
#include "cuda/rails.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A far rank that we ask, that asks us, or both.
struct Partner {
  int rank, number;
  int first_rank;    // of its node
  Asked* asked;      // null: we ask nothing of it
  Serving* serving;  // null: it asks nothing of us
  int requests;      // of it, in all
  bool joined, factors;
  SumOrder order;

  __device__ bool all_asked() const { return asked == nullptr || asked->requests_sent == asked->requests; }
  // Relaxed: whoever reads the rows runs after this kernel.
  __device__ bool all_here() const {
    return asked == nullptr ||
           *static_cast<volatile std::uint32_t*>(&asked->units_here) >= static_cast<std::uint32_t>(asked->units);
  }
  __device__ bool all_served() const {
    return serving == nullptr || *static_cast<volatile std::uint32_t*>(&serving->done) != 0;
  }
};

// The exchange as a thread sees it.
struct Exchange {
  const ForwardCombineParams& p;
  const Now& now;
  const Source* sources;  // [num_ranks]
  const Partner* partners;
  int num_partners;
  int first_rank;  // of our node

  __device__ const Common& common() const { return p.combine.common; }
  __device__ const plan::RequestUnit& request(bool factors) const { return p.forms.request[factors ? 1 : 0]; }
  __device__ const plan::ReturnUnit& unit(bool joined) const { return p.forms.unit[joined ? 1 : 0]; }
  __device__ plan::Chunking cut(std::size_t unit_bytes) const {
    return plan::Chunking::of(unit_bytes, common().far.slot_bytes);
  }
  __device__ Batch batch(const Partner& of) const {
    const std::int64_t before = std::int64_t{of.number} * p.most_requests, topk = p.combine.num_topk;
    return {p.batches.requests + before * static_cast<std::int64_t>(request(true).bytes),
            p.batches.terms + before * topk, p.batches.num_terms + before, p.batches.dst_rank + before * topk,
            p.batches.steps != nullptr ? p.batches.steps + before * topk : nullptr};
  }
};

// Every thread: the far ranks that we exchange with, by what the first kernel counted and what they announced. The same
// in every block. Returns how many.
__device__ int find_partners(const Now& now, const ForwardCombineParams& p, const Nodes& nodes, Partner* partners) {
  int found = 0;
  for (int tile = 0; tile < p.combine.common.num_ranks; tile += kThreads) {
    const int rank = tile + static_cast<int>(threadIdx.x);
    Partner partner{};
    if (rank < p.combine.common.num_ranks && now.active(rank) && now.far(rank)) {
      Asked& asked = p.combine.forwarded.asked[nodes.of(rank)];
      const Announcement& theirs = now.announcement(p.combine.common.rank, rank);
      partner.rank = rank;
      partner.first_rank = nodes.first_rank(nodes.of(rank));
      partner.asked = asked.rail == rank && asked.requests > 0 ? &asked : nullptr;
      partner.requests = static_cast<int>(theirs.requests);
      partner.serving = partner.requests > 0 ? p.servings + rank : nullptr;
      partner.order = theirs.order;
      partner.joined = theirs.order.round_per_node && p.combine.hidden > 0;
      partner.factors = theirs.factors;
    }
    const bool is_one = partner.asked != nullptr || partner.serving != nullptr;
    CountPair in_tile;
    partner.number = found + scan_block<kWarps>(CountPair::of(0, is_one), in_tile).second();
    if (is_one) partners[partner.number] = partner;
    found += in_tile.second();
  }
  __syncthreads();
  return found;
}

// What a block does next at a lane.
struct Turn {
  enum Kind { kNothing, kLaneDone, kGiveUp, kTakeRequests, kSendRequests, kTakeRows, kSendRows } kind;
  plan::ChunkHead head;  // of what came
  int chunk;             // kSendRows: of the batch
};

// One thread: what came does not fit what is awaited.
__device__ __noinline__ Turn refuse_stray(Now now, int source, std::int64_t seen, std::int64_t awaited) {
  report(now, Fault::kStray, source, awaited, seen);
  return {Turn::kGiveUp, {}, 0};
}

// A warp has `rows` rows, piece after piece in turn with the block's others. from(i) and to(i): where row i lies.
template <class From, class To>
__device__ void copy_rows(int rows, std::int64_t row_bytes, const From& from, const To& to) {
  constexpr int kAtOnce = 4;
  constexpr std::int64_t kPiece = 512 * kAtOnce;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int pieces = static_cast<int>((row_bytes + kPiece - 1) / kPiece);
  for (int item = warp; item < rows * pieces; item += kWarps) {
    const std::int64_t at = item % pieces * kPiece + 16 * lane;
    const std::byte* const source = from(item / pieces) + at;
    std::byte* const target = to(item / pieces) + at;
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (at + 512 * i < row_bytes) v[i] = ptx::load_streaming(source + 512 * i);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (at + 512 * i < row_bytes) *reinterpret_cast<uint4*>(target + 512 * i) = v[i];
  }
}

}  // namespace
}  // namespace deep_ep::cuda
