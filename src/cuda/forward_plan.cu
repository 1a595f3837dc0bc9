// SPDX-License-Identifier: MIT
// What a combine asks of far nodes, numbered: a block for each node goes over all tokens. Rows come back in the order
// of tokens and of their selections, so both ends know each by its number.
#include "cuda/block_scan.cuh"
#include "cuda/forward_combine.h"
#include "cuda/rails.cuh"

namespace deep_ep::cuda {

namespace {

constexpr int kPlanWarps = 16;
constexpr int kPlanThreads = kPlanWarps * 32;

// One token's selections, and a node.
struct Selections {
  const ForwardCombineParams& p;
  const Nodes& nodes;
  int node;
  const std::int32_t* rank;  // [num_topk]

  __device__ bool there(int k) const {
    return rank[k] >= 0 && nodes.of(rank[k]) == node && p.combine.common.peers[rank[k]].active != 0;
  }
  // The selection whose row stands for k's: a kByRank row stands at its rank's highest.
  __device__ int stands_at(int k) const {
    if (p.combine.layout != OutputLayout::kByRank) return k;
    int highest = k;
    for (int j = k + 1; j < p.combine.num_topk; ++j)
      if (rank[j] == rank[k]) highest = j;
    return highest;
  }
  __device__ int rows() const {
    int rows = 0;
    for (int k = 0; k < p.combine.num_topk; ++k) rows += there(k) && stands_at(k) == k;
    return rows;
  }
};

// One thread: the tables of combine, for a token's selections in a far node. `unit`: the token's first.
__device__ void number_rows(const Selections& of, std::int64_t token, int unit) {
  const ForwardCombineParams& p = of.p;
  const int topk = p.combine.num_topk;
  const std::int64_t first = token * topk;
  const bool joined = p.combine.forwarded.joined;
  int number = unit;
  for (int k = 0; k < topk; ++k) {
    if (!of.there(k) || of.stands_at(k) != k) continue;
    p.row[first + k] = number;
    p.weights_row[first + k] = joined ? number * topk + k : number;
    number += joined ? 0 : 1;
  }
  for (int k = 0; k < topk; ++k) {
    const int at = of.there(k) ? of.stands_at(k) : k;
    if (at == k) continue;
    p.row[first + k] = p.row[first + at];
    p.weights_row[first + k] = p.weights_row[first + at];
  }
}

// A block: rows of our own node, which lie in its windows; selections of nobody go with them.
__device__ void copy_near(const ForwardCombineParams& p, const Nodes& nodes) {
  const std::int64_t selections = std::int64_t{p.combine.num_tokens} * p.combine.num_topk;
  for (std::int64_t i = threadIdx.x; i < selections; i += kPlanThreads) {
    const std::int32_t rank = p.routed_rank[i];
    if (rank >= 0 && nodes.of(rank) != nodes.here()) continue;
    p.dst_rank[i] = rank >= 0 && p.combine.common.peers[rank].active != 0 ? rank : -1;
    p.row[i] = p.weights_row[i] = p.routed_row[i];
  }
}

// A block: what we ask of a far node.
__device__ void number_far(const ForwardCombineParams& p, const Nodes& nodes, int node) {
  const int topk = p.combine.num_topk;
  CountPair so_far;  // requests, units
  for (int tile = 0; tile < p.combine.num_tokens; tile += kPlanThreads) {
    const int token = tile + static_cast<int>(threadIdx.x);
    const bool is_token = token < p.combine.num_tokens;
    const Selections of{p, nodes, node, p.routed_rank + std::int64_t{token} * topk};
    const int rows = is_token ? of.rows() : 0;
    CountPair in_tile;
    const CountPair before =
        scan_block<kPlanWarps>(CountPair::of(rows > 0, p.combine.forwarded.joined ? rows > 0 : rows), in_tile);
    if (rows > 0) {
      p.asking[std::int64_t{node} * p.combine.num_tokens + so_far.first() + before.first()] = token;
      number_rows(of, token, so_far.second() + before.second());
    }
    for (int k = 0; is_token && k < topk; ++k)
      if (of.rank[k] >= 0 && nodes.of(of.rank[k]) == node)
        p.dst_rank[std::int64_t{token} * topk + k] = of.there(k) ? of.rank[k] : -1;
    so_far.both += in_tile.both;
  }
  if (threadIdx.x != 0) return;
  Asked& asked = p.combine.forwarded.asked[node];
  asked.rail = nodes.rail(p.combine.common.rank, node);
  asked.requests = so_far.first();
  asked.units = so_far.second();
  // Nodes come in any order.
  asked.first = static_cast<std::int64_t>(atomicAdd(p.units, static_cast<unsigned long long>(asked.units)));
}

}  // namespace

__global__ void __launch_bounds__(kPlanThreads) forward_plan(const __grid_constant__ ForwardCombineParams p) {
  const Nodes nodes{p.combine.common, p.combine.node_of_rank};
  const int node = static_cast<int>(blockIdx.x);
  if (node == nodes.here())
    copy_near(p, nodes);
  else
    number_far(p, nodes, node);
}

void launch_forward_plan(const ForwardCombineParams& params, cudaStream_t stream) {
  forward_plan<<<params.num_nodes, kPlanThreads, 0, stream>>>(params);
}

const void* forward_plan_kernel() { return reinterpret_cast<const void*>(&forward_plan); }

}  // namespace deep_ep::cuda
