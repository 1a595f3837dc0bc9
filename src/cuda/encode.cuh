// SPDX-License-Identifier: MIT
// Elements of a row in registers: four at a time to floats, to FP8 codes, and sums back to the row's type. The numbers
// are those of plan/number.h and plan/fp8.h, bit for bit; where the machine has an instruction that agrees, it is used.
#pragma once

#include "cuda/ptx.cuh"
#include "plan/fp8.h"

namespace deep_ep::cuda {

// Each number type: widen and narrow; largest_bits is the largest |x| of four as a float's bits, where a NaN counts as
// what it is, the largest of all, so that the caller sees that there is one.
__device__ inline std::uint32_t largest_float_bits(const float (&x)[4]) {
  const auto magnitude = [](float v) { return __float_as_uint(v) & 0x7fffffffu; };
  return max(max(magnitude(x[0]), magnitude(x[1])), max(magnitude(x[2]), magnitude(x[3])));
}

struct Bf16 {
  static constexpr int kBytes = 2;
  using Four = uint2;
  __device__ static void widen(uint2 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
  }
  __device__ static uint2 narrow(const float (&x)[4]) {
    const bool nan = x[0] != x[0] || x[1] != x[1] || x[2] != x[2] || x[3] != x[3];
    if (!nan) return {ptx::to_bf16x2(x[0], x[1]), ptx::to_bf16x2(x[2], x[3])};
    return {pair(plan::to_bf16(x[0]), plan::to_bf16(x[1])), pair(plan::to_bf16(x[2]), plan::to_bf16(x[3]))};
  }
  // Many at once. The instruction makes every NaN 0x7fff, which no number becomes: one more carries into the sign, and
  // a piece without NaN, nearly every piece, is done.
  template <int kFours>
  __device__ static void narrow_all(const float (&x)[kFours][4], uint2 (&out)[kFours]) {
    std::uint32_t carried = 0;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      out[i] = {ptx::to_bf16x2(x[i][0], x[i][1]), ptx::to_bf16x2(x[i][2], x[i][3])};
      carried |= (out[i].x + 0x00010001u) & ~out[i].x;
      carried |= (out[i].y + 0x00010001u) & ~out[i].y;
    }
    if ((carried & 0x80008000u) == 0) return;
#pragma unroll
    for (int i = 0; i < kFours; ++i) out[i] = narrow(x[i]);
  }
  __device__ static std::uint32_t largest_bits(uint2 v) {
    const std::uint32_t pairs = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
    return max(pairs << 16, pairs & 0xffff0000u);
  }
  __device__ static std::uint32_t pair(std::uint32_t low, std::uint32_t high) { return low | high << 16; }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  using Four = uint2;
  __device__ static void widen(uint2 v, float (&x)[4]) {
    x[0] = plan::from_fp16(static_cast<std::uint16_t>(v.x)),
    x[1] = plan::from_fp16(static_cast<std::uint16_t>(v.x >> 16));
    x[2] = plan::from_fp16(static_cast<std::uint16_t>(v.y)),
    x[3] = plan::from_fp16(static_cast<std::uint16_t>(v.y >> 16));
  }
  __device__ static uint2 narrow(const float (&x)[4]) {
    return {Bf16::pair(plan::to_fp16(x[0]), plan::to_fp16(x[1])), Bf16::pair(plan::to_fp16(x[2]), plan::to_fp16(x[3]))};
  }
  __device__ static std::uint32_t largest_bits(uint2 v) {
    float x[4];
    widen(v, x);
    return largest_float_bits(x);
  }
  template <int kFours>
  __device__ static void narrow_all(const float (&x)[kFours][4], uint2 (&out)[kFours]) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) out[i] = narrow(x[i]);
  }
};

struct Fp32 {
  static constexpr int kBytes = 4;
  using Four = uint4;
  __device__ static void widen(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 narrow(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  __device__ static std::uint32_t largest_bits(uint4 v) {
    float x[4];
    widen(v, x);
    return largest_float_bits(x);
  }
  template <int kFours>
  __device__ static void narrow_all(const float (&x)[kFours][4], uint4 (&out)[kFours]) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) out[i] = narrow(x[i]);
  }
};

/// Largest |x| of four as bits, NaN left out, as the rule wants.
__device__ inline std::uint32_t largest_number(const float (&x)[4]) {
  std::int32_t largest = 0;
  for (float v : x) largest = max(largest, plan::fp8_magnitude(v));
  return static_cast<std::uint32_t>(largest);
}

/// Four codes, the first in the lowest byte. `plain`: neither NaN nor infinity among the group.
__device__ inline std::uint32_t encode4(const float (&x)[4], float factor, bool plain) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if (plain)
    return ptx::to_e4m3x2(plan::mul_rn(x[0], factor), plan::mul_rn(x[1], factor)) |
           ptx::to_e4m3x2(plan::mul_rn(x[2], factor), plan::mul_rn(x[3], factor)) << 16;
#else
  (void)plain;
#endif
  std::uint32_t codes = 0;
  for (int i = 0; i < 4; ++i) codes |= static_cast<std::uint32_t>(plan::fp8_encode(x[i], factor)) << (8 * i);
  return codes;
}

}  // namespace deep_ep::cuda
