// SPDX-License-Identifier: MIT
// Ranks that stay silent are left out before a low-latency call is received. One block decides, so that all blocks of
// the kernel that receives see the same ranks.
#include "cuda/low_latency.h"
#include "cuda/wait.cuh"

namespace deep_ep::cuda {

namespace {

// The word of a peer's call has come, whatever it says: the kernel that receives reads it.
__device__ bool spoke(const Now& now, int peer) {
  const plan::Words& words = now.words(now.common.rank, peer);
  return ptx::load_acquire_system(&words.announced) >> 32 >= now.epoch ||
         ptx::load_acquire_system(&words.arrived) >> 32 >= now.epoch;
}

}  // namespace

__global__ void leave_out_silent(const __grid_constant__ SilentParams p) {
  const Now now(p.common, *p.ticket);
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x)) {
    if (!now.active(peer) || spoke(now, peer)) continue;
    const std::uint64_t start = ptx::nanoseconds();
    bool came = false;
    while (!came && ptx::nanoseconds() <= now.deadline) came = spoke(now, peer);
    count_wait(p.common, peer, ptx::nanoseconds() - start);
    if (!came) p.peers[peer].active = 0;
  }
}

const void* leave_out_silent_kernel() { return reinterpret_cast<const void*>(&leave_out_silent); }

void launch_leave_out_silent(const SilentParams& params, cudaStream_t stream) {
  leave_out_silent<<<1, 64, 0, stream>>>(params);
}

}  // namespace deep_ep::cuda
