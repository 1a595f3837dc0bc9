// SPDX-License-Identifier: MIT
// All inline PTX of the CUDA backend, one instruction or one idiom per function.
#pragma once

#include <cstdint>

namespace deep_ep::cuda {

/// Every lane of a warp, for __shfl_sync and its like.
inline constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace deep_ep::cuda

namespace deep_ep::cuda::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EP_BULK_COPY 1
#else
#define EP_BULK_COPY 0
#endif

// Words that ranks share: system scope, because the other rank may be another GPU.
__device__ __forceinline__ void store_release_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ std::uint64_t load_acquire_system(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
// Behind a fence as good as an acquire; several may be on their way at once.
__device__ __forceinline__ std::uint64_t load_relaxed_system(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ std::uint32_t load_relaxed_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed_system(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ std::uint32_t load_acquire_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Makes a relaxed store after it a release. Lighter than __threadfence_system(), which puts all fences in one order:
// nobody here needs that.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Sixteen bytes as one: whoever loads them sees all of one store. Relaxed, as they publish nothing but themselves.
__device__ __forceinline__ void store_whole_system(void* at, uint4 v) {
  asm volatile(
      "{ .reg .b64 low, high;\n .reg .b128 whole;\n mov.b64 low, {%1, %2};\n mov.b64 high, {%3, %4};\n"
      " mov.b128 whole, {low, high};\n st.relaxed.sys.global.b128 [%0], whole; }" ::"l"(at),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}
__device__ __forceinline__ uint4 load_whole_system(const void* at) {
  uint4 v;
  asm volatile(
      "{ .reg .b64 low, high;\n .reg .b128 whole;\n ld.relaxed.sys.global.b128 whole, [%4];\n"
      " mov.b128 {low, high}, whole;\n mov.b64 {%0, %1}, low;\n mov.b64 {%2, %3}, high; }"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(at)
      : "memory");
  return v;
}

// Counters among the blocks of one kernel.
__device__ __forceinline__ std::uint32_t add_acquire_release(std::uint32_t* word, std::uint32_t value) {
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}
__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// A kernel that was launched to begin before the one before it has ended: what that one wrote is there after this.
__device__ __forceinline__ void await_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// And the kernel behind may begin, as far as this block is concerned; a block that ends says so too.
__device__ __forceinline__ void let_kernel_behind_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ std::uint64_t nanoseconds() {
  std::uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

// Sixteen bytes that nobody writes meanwhile. Volatile, so that several stay in one row of loads.
__device__ __forceinline__ uint4 load_constant(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// Sixteen bytes past L1: read once, or written for somebody else.
__device__ __forceinline__ uint4 load_streaming(const void* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_streaming(void* at, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Four floats to four e4m3 codes, a in the lowest byte. Nearest, ties to even, saturating: as plan::to_e4m3, NaN's sign
// apart.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define EP_FP8_CONVERSION 1
__device__ __forceinline__ std::uint32_t to_e4m3x4(float a, float b, float c, float d) {
  std::uint32_t codes;
  asm("{ .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      " mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}
// And back, exactly: two packed FP16 numbers each for the lower and the higher two.
__device__ __forceinline__ uint2 from_e4m3x4(std::uint32_t codes) {
  uint2 pairs;
  asm("{ .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n"
      " cvt.rn.f16x2.e4m3x2 %0, low;\n cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(codes));
  return pairs;
}
#else
#define EP_FP8_CONVERSION 0
#endif

__device__ __forceinline__ void store_streaming(void* at, uint2 v) {
  asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory");
}

// Two floats to packed 16-bit numbers, a in the low half. Nearest, ties to even; a NaN becomes 0x7fff.
__device__ __forceinline__ std::uint32_t to_bf16x2(float a, float b) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}
__device__ __forceinline__ std::uint32_t to_fp16x2(float a, float b) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}
// The low half, exactly.
__device__ __forceinline__ float from_fp16(std::uint32_t v) {
  float x;
  asm("{ .reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.f32.f16 %0, low; }" : "=f"(x) : "r"(v));
  return x;
}

// The larger of each half, NaN where one is.
__device__ __forceinline__ std::uint32_t larger_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ std::uint32_t larger_fp16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
// The larger magnitude of each half, NaN where one is; its sign bit means nothing.
__device__ __forceinline__ std::uint32_t magnitude_bf16x2(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  std::uint32_t larger;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
#else
  return larger_bf16x2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}
__device__ __forceinline__ std::uint32_t magnitude_fp16x2(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  std::uint32_t larger;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
#else
  return larger_fp16x2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}

// The upper of two finite BF16 numbers as the bits of a float: the lower times zero plus zero, the upper times one plus
// a zero that leaves a zero's sign as it is. Grids have one row of blocks here, which the assembler does not know: it
// would put a constant together anew for each product.
__device__ __forceinline__ std::uint32_t upper_bf16(std::uint32_t v) {
  const std::uint32_t minus_zero = gridDim.y << 31;
  std::uint32_t upper;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(upper) : "r"(v), "r"(0x3f800000u), "r"(minus_zero));
  return upper;
}

// 1 / b to about one unit in the last place; b and its reciprocal normal.
__device__ __forceinline__ float reciprocal(float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return y;
}

// The first so many threads of a block that take part wait for one another; `barrier`: 1 to 15, 0 is __syncthreads.
__device__ __forceinline__ void barrier_of_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#if EP_BULK_COPY
__device__ __forceinline__ std::uint32_t shared_address(const void* at) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Initialised barriers are visible to the copy engine after this.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Global to shared; the barrier's phase completes when all bytes are there. 16-byte aligned, a multiple of 16 bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, std::uint32_t bytes,
                                          std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Shared to global, as part of this thread's open group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but this thread's last `kPending` groups have read their shared memory: it may be written again.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// All of this thread's groups are complete: what they wrote is visible to it, and can be released.
__device__ __forceinline__ void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Ordinary writes to shared memory before this are seen by bulk copies after it.
__device__ __forceinline__ void fence_shared_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// What this thread acquired by ordinary loads is seen by its bulk copies from global memory after this.
__device__ __forceinline__ void fence_for_bulk() { asm volatile("fence.proxy.async;" ::: "memory"); }
#endif

}  // namespace deep_ep::cuda::ptx
