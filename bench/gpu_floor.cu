// SPDX-License-Identifier: MIT
#include "bench/gpu_floor.h"
#include "cuda/ptx.cuh"

namespace deep_ep::bench {
namespace {

namespace ptx = cuda::ptx;

__global__ void empty() {}

__global__ void copy_rows(const std::byte* from, std::byte* to, std::size_t bytes) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * 16;
  for (std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * 16; at < bytes; at += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes) v[i] = __ldg(reinterpret_cast<const uint4*>(from + at + i * step));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes) *reinterpret_cast<uint4*>(to + at + i * step) = v[i];
  }
}

__global__ void ping_pong(const PingPong between) {
  for (int i = 1; i <= between.rounds; ++i) {
    if (between.first) ptx::store_release_system(between.theirs, between.base + i);
    while (ptx::load_acquire_system(between.mine) < between.base + i) {
    }
    if (!between.first) ptx::store_release_system(between.theirs, between.base + i);
  }
}

__global__ void hold(std::uint64_t nanoseconds) {
  const std::uint64_t begin = ptx::nanoseconds();
  while (ptx::nanoseconds() - begin < nanoseconds) {
  }
}

__global__ void grind(int steps, float* out) {
  float a = static_cast<float>(threadIdx.x), b = 1.5f, c = 0.25f, d = 2.5f;
  for (int i = 0; i < steps; ++i) {
    a = fmaf(a, 1.0001f, 0.5f), b = fmaf(b, 0.9999f, a), c = fmaf(c, 1.0002f, 0.25f), d = fmaf(d, 0.9998f, c);
  }
  if (a + b + c + d == -1) *out = a;
}

}  // namespace

void launch_empty(int blocks, cudaStream_t stream) { empty<<<blocks, 512, 0, stream>>>(); }
void launch_ping_pong(const PingPong& between, cudaStream_t stream) { ping_pong<<<1, 1, 0, stream>>>(between); }
void launch_copy(const std::byte* from, std::byte* to, std::size_t bytes, int blocks, cudaStream_t stream) {
  copy_rows<<<blocks, 1024, 0, stream>>>(from, to, bytes);
}
void launch_hold(std::uint64_t nanoseconds, cudaStream_t stream) { hold<<<1, 1, 0, stream>>>(nanoseconds); }
void launch_grind(int blocks, int steps, float* out, cudaStream_t stream) {
  grind<<<blocks, 512, 0, stream>>>(steps, out);
}

}  // namespace deep_ep::bench
