// SPDX-License-Identifier: MIT
// Elements of a row in registers: sixteen bytes at a time to floats, to FP8 codes, and sums back to the row's type. The
// numbers are those of plan/number.h and plan/fp8.h, bit for bit; where the machine has an instruction that agrees, it
// is used.
#pragma once

#include "cuda/ptx.cuh"
#include "plan/fp8.h"

namespace deep_ep::cuda {

// Each number type: widen, exact, and narrow, rounded to nearest even, of four elements; narrow_all of many;
// widen_sixteen and narrow_sixteen of sixteen bytes, where a NaN may lose its sign. The NaN that
// the machine's narrowing makes, 0x7fff in the 16-bit types, is the one of plan/number.h.
//
// largest_bits: the largest |x| of four as a float's bits, where a NaN counts as the largest of all.
//
// peak: the largest |x| of sixteen channels for each of two passes, in Number::kWordsOfPair words, whose signs mean
// nothing; larger_peak: of two such words; peak_bits: of one pass, as largest_bits has it.
template <class Machine>
struct Half {
  static constexpr int kBytes = 2;
  static constexpr int kWordsOfPair = 1;
  using Four = uint2;
  using Eight = uint4;  // channels

  __device__ static void widen(uint2 v, float (&x)[4]) {
    Machine::widen_any(v.x, x[0], x[1]), Machine::widen_any(v.y, x[2], x[3]);
  }
  __device__ static uint2 narrow(const float (&x)[4]) {
    return {Machine::narrow(x[0], x[1]), Machine::narrow(x[2], x[3])};
  }
  template <int kFours>
  __device__ static void narrow_all(const float (&x)[kFours][4], uint2 (&out)[kFours]) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) out[i] = narrow(x[i]);
  }

  __device__ static void widen_sixteen(uint4 v, float (&x)[8]) { widen_eight(v, x); }
  __device__ static uint4 narrow_sixteen(const float (&x)[8]) {
    return {Machine::narrow(x[0], x[1]), Machine::narrow(x[2], x[3]), Machine::narrow(x[4], x[5]),
            Machine::narrow(x[6], x[7])};
  }
  __device__ static void load(const std::byte* at, Eight& v) { v = *reinterpret_cast<const uint4*>(at); }
  __device__ static void widen_eight(const Eight& v, float (&x)[8]) {
    Machine::widen(v.x, x[0], x[1]), Machine::widen(v.y, x[2], x[3]);
    Machine::widen(v.z, x[4], x[5]), Machine::widen(v.w, x[6], x[7]);
  }
  __device__ static void widen_finite(const Eight& v, float (&x)[8]) {
    Machine::widen_finite(v.x, x[0], x[1]), Machine::widen_finite(v.y, x[2], x[3]);
    Machine::widen_finite(v.z, x[4], x[5]), Machine::widen_finite(v.w, x[6], x[7]);
  }
  __device__ static void widen_any(const Eight& v, float (&x)[8]) {
    Machine::widen_any(v.x, x[0], x[1]), Machine::widen_any(v.y, x[2], x[3]);
    Machine::widen_any(v.z, x[4], x[5]), Machine::widen_any(v.w, x[6], x[7]);
  }
  __device__ static std::uint32_t largest_bits(uint2 v) {
    const std::uint32_t pair = Machine::magnitude(v.x, v.y) & 0x7fff7fffu;
    return peak_bits(max(pair & 0xffff, pair >> 16), false);
  }
  __device__ static void peak(const Eight (&a)[2], const Eight (&b)[2], std::uint32_t* word) {
    const std::uint32_t of_a = peak_of(a), of_b = peak_of(b);  // each of even and of odd channels
    *word = Machine::magnitude(__byte_perm(of_a, of_b, 0x5410), __byte_perm(of_a, of_b, 0x7632));
  }
  __device__ static std::uint32_t larger_peak(std::uint32_t a, std::uint32_t b) { return Machine::magnitude(a, b); }
  __device__ static std::uint32_t peak_bits(std::uint32_t word, bool second) {
    float low, high;
    Machine::widen(word, low, high);
    return __float_as_uint(second ? high : low) & 0x7fffffffu;
  }

 private:
  __device__ static std::uint32_t peak_of(const Eight (&v)[2]) {
    return Machine::magnitude(
        Machine::magnitude(Machine::magnitude(v[0].x, v[0].y), Machine::magnitude(v[0].z, v[0].w)),
        Machine::magnitude(Machine::magnitude(v[1].x, v[1].y), Machine::magnitude(v[1].z, v[1].w)));
  }
};

struct Bf16Machine {
  __device__ static void widen(std::uint32_t v, float& low, float& high) {
    low = __uint_as_float(v << 16), high = __uint_as_float(v & 0xffff0000u);
  }
  // The pipe that adds and multiplies also cuts off a lower half. Instructions on bits and the conversion to codes
  // share the other one.
  __device__ static void widen_finite(std::uint32_t v, float& low, float& high) {
    low = __uint_as_float(v << 16), high = __uint_as_float(ptx::upper_bf16(v));
  }
  __device__ static void widen_any(std::uint32_t v, float& low, float& high) { widen(v, low, high); }
  __device__ static std::uint32_t narrow(float low, float high) { return ptx::to_bf16x2(low, high); }
  __device__ static std::uint32_t magnitude(std::uint32_t a, std::uint32_t b) { return ptx::magnitude_bf16x2(a, b); }
};

struct Fp16Machine {
  __device__ static void widen(std::uint32_t v, float& low, float& high) {
    low = ptx::from_fp16(v), high = ptx::from_fp16(v >> 16);
  }
  __device__ static void widen_finite(std::uint32_t v, float& low, float& high) { widen(v, low, high); }
  // The machine's widening loses a NaN's sign.
  __device__ static void widen_any(std::uint32_t v, float& low, float& high) {
    low = plan::from_fp16(static_cast<std::uint16_t>(v)), high = plan::from_fp16(static_cast<std::uint16_t>(v >> 16));
  }
  __device__ static std::uint32_t narrow(float low, float high) { return ptx::to_fp16x2(low, high); }
  __device__ static std::uint32_t magnitude(std::uint32_t a, std::uint32_t b) { return ptx::magnitude_fp16x2(a, b); }
};

static_assert(plan::kBf16Nan == 0x7fff && plan::kFp16Nan == 0x7fff);
using Bf16 = Half<Bf16Machine>;
using Fp16 = Half<Fp16Machine>;

struct Fp32 {
  static constexpr int kBytes = 4;
  static constexpr int kWordsOfPair = 2;
  using Four = uint4;
  struct Eight {
    uint4 low, high;
  };

  __device__ static void widen(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 narrow(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  template <int kFours>
  __device__ static void narrow_all(const float (&x)[kFours][4], uint4 (&out)[kFours]) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) out[i] = narrow(x[i]);
  }

  __device__ static void widen_sixteen(uint4 v, float (&x)[4]) { widen(v, x); }
  __device__ static uint4 narrow_sixteen(const float (&x)[4]) { return narrow(x); }
  __device__ static void load(const std::byte* at, Eight& v) {
    v = {reinterpret_cast<const uint4*>(at)[0], reinterpret_cast<const uint4*>(at)[1]};
  }
  __device__ static void widen_eight(const Eight& v, float (&x)[8]) {
    float low[4], high[4];
    widen(v.low, low), widen(v.high, high);
    for (int i = 0; i < 4; ++i) x[i] = low[i], x[4 + i] = high[i];
  }
  __device__ static void widen_finite(const Eight& v, float (&x)[8]) { widen_eight(v, x); }
  __device__ static void widen_any(const Eight& v, float (&x)[8]) { widen_eight(v, x); }
  __device__ static std::uint32_t largest_bits(uint4 v) {
    return max(max(bits(v.x), bits(v.y)), max(bits(v.z), bits(v.w)));
  }
  __device__ static void peak(const Eight (&a)[2], const Eight (&b)[2], std::uint32_t* words) {
    words[0] = max(peak_of(a[0]), peak_of(a[1])), words[1] = max(peak_of(b[0]), peak_of(b[1]));
  }
  __device__ static std::uint32_t larger_peak(std::uint32_t a, std::uint32_t b) { return max(a, b); }
  __device__ static std::uint32_t peak_bits(std::uint32_t word, bool) { return word; }

 private:
  __device__ static std::uint32_t bits(std::uint32_t word) { return word & 0x7fffffffu; }
  __device__ static std::uint32_t peak_of(const Eight& v) { return max(largest_bits(v.low), largest_bits(v.high)); }
};

/// Largest |x| of four as bits, NaN left out, as the rule wants.
__device__ inline std::uint32_t largest_number(const float (&x)[4]) {
  std::int32_t largest = 0;
  for (float v : x) largest = max(largest, plan::fp8_magnitude(v));
  return static_cast<std::uint32_t>(largest);
}

/// Four codes, the first in the lowest byte. `plain`: neither NaN nor infinity among the group.
__device__ inline std::uint32_t encode4(const float (&x)[4], float factor, bool plain) {
#if EP_FP8_CONVERSION
  if (plain)
    return ptx::to_e4m3x4(plan::mul_rn(x[0], factor), plan::mul_rn(x[1], factor), plan::mul_rn(x[2], factor),
                          plan::mul_rn(x[3], factor));
#else
  (void)plain;
#endif
  std::uint32_t codes = 0;
  for (int i = 0; i < 4; ++i) codes |= static_cast<std::uint32_t>(plan::fp8_encode(x[i], factor)) << (8 * i);
  return codes;
}

/// Four codes, each multiplied by its scale as plan::fp8_decode does.
__device__ inline void decode4(std::uint32_t codes, float scale, float (&x)[4]) {
#if EP_FP8_CONVERSION
  const uint2 pairs = ptx::from_e4m3x4(codes);
  x[0] = ptx::from_fp16(pairs.x), x[1] = ptx::from_fp16(pairs.x >> 16);
  x[2] = ptx::from_fp16(pairs.y), x[3] = ptx::from_fp16(pairs.y >> 16);
  for (float& value : x) value = plan::mul_rn(value, scale);
#else
  for (int i = 0; i < 4; ++i) x[i] = plan::fp8_decode(static_cast<std::uint8_t>(codes >> (8 * i)), scale);
#endif
}

}  // namespace deep_ep::cuda
