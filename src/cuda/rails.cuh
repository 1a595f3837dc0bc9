// SPDX-License-Identifier: MIT
// Between nodes: who takes a node's tokens in, on the device. As plan/forwarding.h, with the masks that kernels see.
#pragma once

#include "cuda/wait.cuh"

namespace deep_ep::cuda {

/// Where ranks are. One struct per kernel; `node_of_rank` lies in device memory.
struct Nodes {
  const Common& common;
  const std::int32_t* node_of_rank;

  __device__ int of(int rank) const { return node_of_rank[rank]; }
  __device__ int here() const { return of(common.rank); }
  __device__ int first_rank(int node) const {
    int rank = 0;
    while (of(rank) != node) ++rank;  // nodes are runs of ranks
    return rank;
  }
  /// The rank of `node` that takes in what `src` sends there: plan::rail(). -1: nobody is left there.
  __device__ int rail(int src, int node) const {
    int present = 0, first = -1;
    for (int rank = 0; rank < common.num_ranks; ++rank) {
      if (of(rank) != node) continue;
      if (first < 0) first = rank;
      present += common.peers[rank].active != 0;
    }
    if (present == 0) return -1;
    int skip = (src - first_rank(of(src))) % present;
    for (int rank = first;; ++rank)
      if (common.peers[rank].active != 0 && skip-- == 0) return rank;
  }
};

}  // namespace deep_ep::cuda
