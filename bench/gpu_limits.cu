// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bench/gpu_limits.h"
#include "cuda/ptx.cuh"

namespace deep_ep::bench {
namespace {

constexpr int kDeep = 4;                      // loads that a thread has in flight
constexpr int kPieceBytes = kDeep * 32 * 16;  // of a row, that a warp moves at a time
constexpr int kThreads = 1024;
constexpr int kLargestChunk = 14336, kRing = 4, kMostWarps = 8;
constexpr int kSharedBytes = 3 * kRing * kLargestChunk;

__device__ std::byte* target(const LimitRows& r, int rank, int token, int copy) {
  return r.landing[rank] +
         ((static_cast<std::int64_t>(r.rank) * r.num_tokens + token) * r.copies_room + copy) * r.row_bytes;
}

// The warps of the grid share out the pieces of all rows.
template <class Work>
__device__ void for_each_piece(const LimitRows& r, const Work& work) {
  const int pieces = (r.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32),
            warps = static_cast<int>(gridDim.x * blockDim.x / 32);
  for (int i = warp; i < r.num_tokens * pieces; i += warps) work(i / pieces, i % pieces * kPieceBytes + lane * 16);
}

__global__ void __launch_bounds__(kThreads) copy_by_stores(const __grid_constant__ LimitRows r) {
  for_each_piece(r, [&](int token, int at) {
    const std::byte* src = r.rows + static_cast<std::int64_t>(token) * r.row_bytes;
    uint4 v[kDeep];
#pragma unroll
    for (int i = 0; i < kDeep; ++i)
      if (at + i * 512 < r.row_bytes) v[i] = __ldg(reinterpret_cast<const uint4*>(src + at + i * 512));
    for (int rank = 0; rank < r.num_ranks; ++rank) {
      for (int copy = 0; copy < r.copies[token * r.num_ranks + rank]; ++copy) {
        std::byte* dst = target(r, rank, token, copy);
#pragma unroll
        for (int i = 0; i < kDeep; ++i)
          if (at + i * 512 < r.row_bytes) *reinterpret_cast<uint4*>(dst + at + i * 512) = v[i];
      }
    }
  });
}

__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ LimitRows r) {
  for_each_piece(r, [&](int token, int at) {
    uint4 sum[kDeep] = {};
    for (int rank = 0; rank < r.num_ranks; ++rank) {
      for (int copy = 0; copy < r.copies[token * r.num_ranks + rank]; ++copy) {
        const std::byte* src = target(r, rank, token, copy);
        uint4 v[kDeep] = {};
#pragma unroll
        for (int i = 0; i < kDeep; ++i)
          if (at + i * 512 < r.row_bytes) v[i] = __ldcs(reinterpret_cast<const uint4*>(src + at + i * 512));
#pragma unroll
        for (int i = 0; i < kDeep; ++i)
          sum[i] = uint4{sum[i].x ^ v[i].x, sum[i].y ^ v[i].y, sum[i].z ^ v[i].z, sum[i].w ^ v[i].w};
      }
    }
    std::byte* dst = r.rows + static_cast<std::int64_t>(token) * r.row_bytes;
#pragma unroll
    for (int i = 0; i < kDeep; ++i)
      if (at + i * 512 < r.row_bytes) __stcs(reinterpret_cast<uint4*>(dst + at + i * 512), sum[i]);
  });
}

struct Chunks {
  int bytes, of_row, warps;
};

Chunks chunks_of(int row_bytes) {
  const int of_row = (row_bytes + kLargestChunk - 1) / kLargestChunk;
  const int bytes = ((row_bytes + of_row - 1) / of_row + 15) / 16 * 16;
  return {bytes, of_row, std::clamp(kSharedBytes / (kRing * bytes), 1, kMostWarps)};
}

__global__ void copy_by_bulk(const __grid_constant__ LimitRows r, const Chunks chunks) {
#if EP_BULK_COPY
  namespace ptx = cuda::ptx;
  extern __shared__ __align__(128) std::byte ring[];
  __shared__ std::uint64_t full[kMostWarps * kRing];
  if (threadIdx.x % 32 != 0) return;
  const int warp = static_cast<int>(threadIdx.x / 32);
  for (int i = 0; i < kRing; ++i) ptx::barrier_init(full + warp * kRing + i);
  ptx::barrier_init_done();
  const int first = static_cast<int>(blockIdx.x) * chunks.warps + warp,
            step = static_cast<int>(gridDim.x) * chunks.warps;
  const int all = r.num_tokens * chunks.of_row, count = first < all ? (all - first + step - 1) / step : 0;
  const auto token = [&](int k) { return (first + k * step) / chunks.of_row; };
  const auto at = [&](int k) { return (first + k * step) % chunks.of_row * chunks.bytes; };
  const auto bytes = [&](int k) { return static_cast<std::uint32_t>(min(chunks.bytes, r.row_bytes - at(k))); };
  const auto stage = [&](int k) { return ring + (warp * kRing + k % kRing) * static_cast<std::int64_t>(chunks.bytes); };
  const auto load = [&](int k) {
    ptx::bulk_load(stage(k), r.rows + static_cast<std::int64_t>(token(k)) * r.row_bytes + at(k), bytes(k),
                   full + warp * kRing + k % kRing);
  };
  for (int k = 0; k < count && k < kRing - 1; ++k) load(k);
  for (int k = 0; k < count; ++k) {
    ptx::barrier_wait(full + warp * kRing + k % kRing, static_cast<std::uint32_t>(k / kRing) & 1);
    for (int rank = 0; rank < r.num_ranks; ++rank)
      for (int copy = 0; copy < r.copies[token(k) * r.num_ranks + rank]; ++copy)
        ptx::bulk_store(target(r, rank, token(k), copy) + at(k), stage(k), bytes(k));
    ptx::bulk_commit();
    if (k + kRing - 1 >= count) continue;
    ptx::bulk_wait_read<1>();
    load(k + kRing - 1);
  }
  ptx::bulk_wait_all();
#else
  (void)r, (void)chunks;
#endif
}

}  // namespace

void launch_copy_by_stores(const LimitRows& rows, int blocks, cudaStream_t stream) {
  copy_by_stores<<<blocks, kThreads, 0, stream>>>(rows);
}

void launch_gather(const LimitRows& rows, int blocks, cudaStream_t stream) {
  gather<<<blocks, kThreads, 0, stream>>>(rows);
}

void launch_copy_by_bulk(const LimitRows& rows, int blocks, cudaStream_t stream) {
  const Chunks chunks = chunks_of(rows.row_bytes);
  copy_by_bulk<<<blocks, chunks.warps * 32, chunks.warps * kRing * chunks.bytes, stream>>>(rows, chunks);
}

void prepare_limits() { cudaFuncSetAttribute(copy_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes); }

}  // namespace deep_ep::bench
