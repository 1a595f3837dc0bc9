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

// The copies of one token, one after the other.
class Copies {
 public:
  __device__ Copies(const LimitRows& r, int token) : r_(&r), token_(token) {}
  __device__ const std::byte* next() {
    while (rank_ < r_->num_ranks && copy_ == r_->copies[token_ * r_->num_ranks + rank_]) ++rank_, copy_ = 0;
    return rank_ < r_->num_ranks ? target(*r_, rank_, token_, copy_++) : nullptr;
  }

 private:
  const LimitRows* r_;
  int token_, rank_ = 0, copy_ = 0;
};

__global__ void __launch_bounds__(kThreads) gather_by_loads(const __grid_constant__ LimitRows r) {
  for_each_piece(r, [&](int token, int at) {
    uint4 sum[kDeep] = {};
    Copies copies(r, token);
    // Two copies at a time, so that twice as many loads are in flight.
    for (const std::byte* a = copies.next(); a != nullptr; a = copies.next()) {
      const std::byte* b = copies.next();
      uint4 v[kDeep] = {}, w[kDeep] = {};
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        if (at + i * 512 >= r.row_bytes) continue;
        v[i] = __ldcs(reinterpret_cast<const uint4*>(a + at + i * 512));
        if (b != nullptr) w[i] = __ldcs(reinterpret_cast<const uint4*>(b + at + i * 512));
      }
#pragma unroll
      for (int i = 0; i < kDeep; ++i)
        sum[i] = uint4{sum[i].x ^ v[i].x ^ w[i].x, sum[i].y ^ v[i].y ^ w[i].y, sum[i].z ^ v[i].z ^ w[i].z,
                       sum[i].w ^ v[i].w ^ w[i].w};
      if (b == nullptr) break;
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
  for (int i = 0; i < kRing; ++i) ptx::barrier_init(full + warp * kRing + i, 1);
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

#if EP_BULK_COPY
// What gather_by_bulk loads: chunk after chunk of a warp's share, each from all its copies; the last one is stored.
struct Load {
  const std::byte* src;  // null: that was all
  int job;
  bool last;
};

class Loads {
 public:
  __device__ Loads(const LimitRows& r, const Chunks& chunks, int first, int step)
      : r_(r), chunks_(chunks), job_(first), step_(step), copies_(r, token()), next_(find()) {}
  __device__ Load next() {
    const Load now{next_, job_, false};
    if (next_ == nullptr) return now;
    next_ = copies_.next();
    const bool last = next_ == nullptr;
    if (last) {
      job_ += step_;
      next_ = find();
    }
    return {now.src, now.job, last};
  }

 private:
  __device__ int token() const { return min(job_ / chunks_.of_row, r_.num_tokens - 1); }
  // The first copy of the next chunk that has one.
  __device__ const std::byte* find() {
    for (; job_ < r_.num_tokens * chunks_.of_row; job_ += step_) {
      copies_ = Copies(r_, token());
      if (const std::byte* first = copies_.next(); first != nullptr) return first;
    }
    return nullptr;
  }

  const LimitRows& r_;
  const Chunks& chunks_;
  int job_, step_;
  Copies copies_;
  const std::byte* next_;
};
#endif

__global__ void gather_by_bulk(const __grid_constant__ LimitRows r, const __grid_constant__ Chunks chunks) {
#if EP_BULK_COPY
  namespace ptx = cuda::ptx;
  extern __shared__ __align__(128) std::byte ring[];
  __shared__ std::uint64_t full[kMostWarps * kRing];
  if (threadIdx.x % 32 != 0) return;
  const int warp = static_cast<int>(threadIdx.x / 32);
  for (int i = 0; i < kRing; ++i) ptx::barrier_init(full + warp * kRing + i, 1);
  ptx::barrier_init_done();
  Loads loads(r, chunks, static_cast<int>(blockIdx.x) * chunks.warps + warp,
              static_cast<int>(gridDim.x) * chunks.warps);
  const auto at = [&](const Load& load) { return load.job % chunks.of_row * chunks.bytes; };
  const auto bytes = [&](const Load& load) {
    return static_cast<std::uint32_t>(min(chunks.bytes, r.row_bytes - at(load)));
  };
  const auto stage = [&](int k) { return ring + (warp * kRing + k % kRing) * static_cast<std::int64_t>(chunks.bytes); };
  Load ahead[kRing];
  const auto start = [&](int k) {
    const Load load = ahead[k % kRing] = loads.next();
    if (load.src != nullptr)
      ptx::bulk_load(stage(k), load.src + at(load), bytes(load), full + warp * kRing + k % kRing);
  };
  for (int k = 0; k < kRing - 1; ++k) start(k);
  for (int k = 0; ahead[k % kRing].src != nullptr; ++k) {
    const Load load = ahead[k % kRing];
    ptx::barrier_wait(full + warp * kRing + k % kRing, static_cast<std::uint32_t>(k / kRing) & 1);
    if (load.last)
      ptx::bulk_store(r.rows + static_cast<std::int64_t>(load.job / chunks.of_row) * r.row_bytes + at(load), stage(k),
                      bytes(load));
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    start(k + kRing - 1);
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

void launch_gather_by_loads(const LimitRows& rows, int blocks, cudaStream_t stream) {
  gather_by_loads<<<blocks, kThreads, 0, stream>>>(rows);
}

void launch_gather_by_bulk(const LimitRows& rows, int blocks, cudaStream_t stream) {
  const Chunks chunks = chunks_of(rows.row_bytes);
  gather_by_bulk<<<blocks, chunks.warps * 32, chunks.warps * kRing * chunks.bytes, stream>>>(rows, chunks);
}

void launch_copy_by_bulk(const LimitRows& rows, int blocks, cudaStream_t stream) {
  const Chunks chunks = chunks_of(rows.row_bytes);
  copy_by_bulk<<<blocks, chunks.warps * 32, chunks.warps * kRing * chunks.bytes, stream>>>(rows, chunks);
}

void prepare_limits() {
  cudaFuncSetAttribute(copy_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  cudaFuncSetAttribute(gather_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

}  // namespace deep_ep::bench
