// SPDX-License-Identifier: MIT
// The least that a call on a GPU can take: an empty kernel, one signal between two ranks, bytes at the pace of a copy;
// and kernels that hold a stream or fill a GPU while something else is watched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace deep_ep::bench {

void launch_empty(int blocks, cudaStream_t stream);
/// Two ranks answer each other `rounds` times there and back, by words that hold `base` at first.
struct PingPong {
  std::uint64_t *mine, *theirs;
  bool first;
  std::uint64_t base;
  int rounds;
};
void launch_ping_pong(const PingPong& between, cudaStream_t stream);
/// All threads load and store 16 bytes at a time.
void launch_copy(const std::byte* from, std::byte* to, std::size_t bytes, int blocks, cudaStream_t stream);
/// One thread waits: what is enqueued meanwhile begins when it ends.
void launch_hold(std::uint64_t nanoseconds, cudaStream_t stream);
/// A fixed amount of arithmetic on every SM: its time tells whether anything else ran there. `out` is not written.
void launch_grind(int blocks, int steps, float* out, cudaStream_t stream);

}  // namespace deep_ep::bench
