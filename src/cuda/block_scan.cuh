// SPDX-License-Identifier: MIT
// Counting in the order of a block's threads.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace deep_ep::cuda {

/// Two counts that are added as one number.
struct CountPair {
  unsigned long long both = 0;
  __device__ static CountPair of(int first, int second) {
    return {static_cast<unsigned long long>(first) << 32 | static_cast<unsigned>(second)};
  }
  __device__ int first() const { return static_cast<int>(both >> 32); }
  __device__ int second() const { return static_cast<int>(both & 0xffffffffu); }
};

/// Every thread of a block of kWarps warps: the sum over the threads before it, and over all.
template <int kWarps>
__device__ inline CountPair scan_block(CountPair mine, CountPair& all) {
  __shared__ unsigned long long of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  unsigned long long upto = mine.both;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, upto, distance);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) of_warp[warp] = upto;
  __syncthreads();
  unsigned long long before_warp = 0;
  all.both = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before_warp += of_warp[w];
    all.both += of_warp[w];
  }
  __syncthreads();  // the words are used again
  return {before_warp + upto - mine.both};
}

}  // namespace deep_ep::cuda
