// SPDX-License-Identifier: MIT
// Who gets how much, counted from this rank's ids alone: a thread per token, counters per block.
#include "cuda/kernels.h"

namespace deep_ep::cuda {

namespace {

constexpr int kThreads = 128;
constexpr std::size_t kMostShared = std::size_t{48} << 10;

__host__ __device__ int num_counters(const LayoutParams& p) { return p.num_ranks + p.num_nodes + p.num_experts; }

__device__ std::int64_t expert_of(const LayoutParams& p, std::int64_t at) {
  return p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[at]
                       : static_cast<const std::int32_t*>(p.topk_idx)[at];
}

__device__ bool reaches_node(const LayoutParams& p, const std::uint8_t* member, int node) {
  for (int rank = 0; rank < p.num_ranks; ++rank)
    if (member[rank] != 0 && p.placement.node_of_rank[rank] == node) return true;
  return false;
}

// Its own row of is_token_in_rank tells a token which ranks and nodes it was counted for already.
__device__ void count_token(const LayoutParams& p, std::int64_t token, std::int32_t* counters) {
  std::uint8_t* member = p.is_token_in_rank + token * p.num_ranks;
  for (int rank = 0; rank < p.num_ranks; ++rank) member[rank] = 0;
  for (int k = 0; k < p.num_topk; ++k) {
    const std::int64_t at = token * p.num_topk + k, expert = expert_of(p, at);
    if (expert < 0) continue;
    if (expert >= p.num_experts) {
      // Counted from the end, so that the first of them is the largest and 0 stands for none.
      atomicMax(p.bad_selection, static_cast<unsigned long long>(std::int64_t{p.num_tokens} * p.num_topk - at));
      continue;
    }
    const int rank = plan::route(p.placement, static_cast<int>(expert), p.rank, token).rank;
    atomicAdd(&counters[p.num_ranks + p.num_nodes + expert], 1);
    if (member[rank] != 0) continue;
    const int node = p.placement.node_of_rank[rank];
    if (!reaches_node(p, member, node)) atomicAdd(&counters[p.num_ranks + node], 1);
    member[rank] = 1;
    atomicAdd(&counters[rank], 1);
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads) count_layout(const __grid_constant__ LayoutParams p, bool in_shared) {
  extern __shared__ std::int32_t shared_counters[];
  std::int32_t* counters = in_shared ? shared_counters : p.counters;
  const int here = in_shared ? num_counters(p) : 0, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < here; i += kThreads) counters[i] = 0;
  __syncthreads();
  const std::int64_t token = std::int64_t{blockIdx.x} * kThreads + thread;
  if (token < p.num_tokens) count_token(p, token, counters);
  __syncthreads();
  for (int i = thread; i < here; i += kThreads)
    if (counters[i] != 0) atomicAdd(&p.counters[i], counters[i]);
}

void launch_layout(const LayoutParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const std::size_t bytes = static_cast<std::size_t>(num_counters(params)) * sizeof(std::int32_t);
  const bool in_shared = bytes <= kMostShared;
  count_layout<<<(params.num_tokens + kThreads - 1) / kThreads, kThreads, in_shared ? bytes : 0, stream>>>(params,
                                                                                                           in_shared);
}

const void* layout_kernel() { return reinterpret_cast<const void*>(&count_layout); }

}  // namespace deep_ep::cuda
