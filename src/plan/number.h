// SPDX-License-Identifier: MIT
// The number formats of a row and their conversions: the same bits on the host (any instruction set) and on the device.
//
// Every narrowing rounds to nearest, ties to even, subnormals included. bf16 and fp16 have one NaN each on output: sign
// and payload of a NaN that arithmetic made differ between machines, and results must not. It is the one that a GPU's
// narrowing makes, whose instruction then needs no mending.
// Nothing branches, so that loops vectorise. Expects -ffp-contract=off and the default rounding mode.
#pragma once

#include <cstdint>

#include "plan/macros.h"

namespace deep_ep::plan {

inline constexpr std::int32_t kFloatInfBits = 0x7f800000;
inline constexpr std::int32_t kFloatMagnitude = 0x7fffffff;
inline constexpr std::uint16_t kBf16Nan = 0x7fff;
inline constexpr std::uint16_t kFp16Nan = 0x7fff;
inline constexpr std::uint8_t kE4m3Nan = 0x7f;
inline constexpr float kE4m3Max = 448.0f;

EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::int32_t bits_of(float x) { return __builtin_bit_cast(std::int32_t, x); }
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr float float_of(std::int32_t bits) { return __builtin_bit_cast(float, bits); }

// bits where the condition holds, else 0. With ?: a compiler moves the floating-point operation behind a choice into a
// branch, and the loop around it is no longer vectorised.
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::int32_t where(bool condition, std::int32_t bits) {
  return bits & -static_cast<std::int32_t>(condition);
}

// One operation, one IEEE rounding. The device intrinsics hold that promise whatever -fmad and -prec-div say.
#ifdef __CUDA_ARCH__
__device__ EP_ALWAYS_INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ EP_ALWAYS_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ EP_ALWAYS_INLINE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ EP_ALWAYS_INLINE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
EP_HOST_DEVICE EP_ALWAYS_INLINE float add_rn(float a, float b) { return a + b; }
EP_HOST_DEVICE EP_ALWAYS_INLINE float mul_rn(float a, float b) { return a * b; }
EP_HOST_DEVICE EP_ALWAYS_INLINE float div_rn(float a, float b) { return a / b; }
// Not std::fma: its overload is a weak function of the standard library (see EP_ALWAYS_INLINE).
EP_HOST_DEVICE EP_ALWAYS_INLINE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr float from_bf16(std::uint16_t code) {
  const std::int32_t bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(code) << 16);
  const bool nan = (bits & kFloatMagnitude) > kFloatInfBits;
  return float_of(bits | (nan ? 0x00400000 : 0));
}

EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::uint16_t to_bf16(float x) {
  const std::int32_t bits = bits_of(x);
  const std::uint32_t u = static_cast<std::uint32_t>(bits);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (bits & kFloatMagnitude) > kFloatInfBits;
  return static_cast<std::uint16_t>(nan ? kBf16Nan : rounded);
}

// A format with few exponent and mantissa bits, as the two functions below need it.
struct SmallFloat {
  std::int32_t mantissa_bits;
  std::int32_t lowest_field;  // exponent field, in FP32, of the format's smallest normal number
};
inline constexpr SmallFloat kFp16Format{10, 113};
inline constexpr SmallFloat kE4m3Format{3, 121};

// The float whose magnitude has this code; a code with the largest exponent field counts as one more normal number.
EP_HOST_DEVICE EP_ALWAYS_INLINE std::int32_t widen_magnitude(std::int32_t code, SmallFloat format) {
  const std::int32_t shifted = code << (23 - format.mantissa_bits);
  const std::int32_t normal = shifted + ((format.lowest_field - 1) << 23);
  // A subnormal is 0.mantissa * lowest: read as 1.mantissa * lowest and less lowest, which is exact.
  const std::int32_t lowest = format.lowest_field << 23;
  const std::int32_t subnormal = bits_of(add_rn(float_of(shifted + lowest), -float_of(lowest)));
  return normal ^ where(code < (1 << format.mantissa_bits), normal ^ subnormal);
}

// The code nearest to a finite magnitude. Let 2^e be the magnitude's power of two, or lowest if that is more: the
// format's numbers are then 2^(e - mantissa_bits) apart, and so are the floats from `coarse` on. Adding coarse
// therefore rounds once and right, subnormals included, and the low bits of the sum count steps; each step of e adds
// 2^mantissa_bits codes.
EP_HOST_DEVICE EP_ALWAYS_INLINE std::int32_t round_magnitude(std::int32_t magnitude, SmallFloat format) {
  const std::int32_t lowest = format.lowest_field << 23;
  const std::int32_t power = (magnitude > lowest ? magnitude : lowest) & kFloatInfBits;
  const std::int32_t coarse = power + ((23 - format.mantissa_bits) << 23);
  const std::int32_t steps = bits_of(add_rn(float_of(magnitude), float_of(coarse))) - coarse;
  return steps + ((power - lowest) >> (23 - format.mantissa_bits));
}

EP_HOST_DEVICE EP_ALWAYS_INLINE float from_fp16(std::uint16_t code) {
  const std::int32_t magnitude = code & 0x7fff;
  const std::int32_t sign = static_cast<std::int32_t>(static_cast<std::uint32_t>(code & 0x8000) << 16);
  // Infinity and NaN widen to exponent field 143; 112 more make 255.
  const std::int32_t widened = widen_magnitude(magnitude, kFp16Format) + where(magnitude > 0x7bff, 112 << 23);
  return float_of(widened | where(magnitude > 0x7c00, 0x00400000) | sign);
}

EP_HOST_DEVICE EP_ALWAYS_INLINE std::uint16_t to_fp16(float x) {
  const std::int32_t bits = bits_of(x);
  const std::int32_t magnitude = bits & kFloatMagnitude;
  constexpr std::int32_t kTooLarge = 143 << 23;  // 2^16, whose code is that of infinity
  const std::int32_t code = round_magnitude(magnitude < kTooLarge ? magnitude : kTooLarge, kFp16Format);
  const std::int32_t number = code | ((bits >> 16) & 0x8000);
  return static_cast<std::uint16_t>(number ^ where(magnitude > kFloatInfBits, number ^ kFp16Nan));
}

EP_HOST_DEVICE EP_ALWAYS_INLINE float from_e4m3(std::uint8_t code) {
  const std::int32_t magnitude = code & 0x7f;
  const std::int32_t sign = static_cast<std::int32_t>(static_cast<std::uint32_t>(code & 0x80) << 24);
  return float_of(widen_magnitude(magnitude, kE4m3Format) | where(magnitude == kE4m3Nan, 0x7fc00000) | sign);
}

// Saturates: what lies beyond 448, infinity included, becomes 448 of that sign. A NaN keeps its sign.
EP_HOST_DEVICE EP_ALWAYS_INLINE std::uint8_t to_e4m3(float x) {
  const std::int32_t bits = bits_of(x);
  const std::int32_t magnitude = bits & kFloatMagnitude;
  const std::int32_t largest = bits_of(kE4m3Max);
  const std::int32_t code = round_magnitude(magnitude < largest ? magnitude : largest, kE4m3Format);
  // NaN saturated too, to 0x7e; one more is its code.
  return static_cast<std::uint8_t>((code + where(magnitude > kFloatInfBits, 1)) | ((bits >> 24) & 0x80));
}

}  // namespace deep_ep::plan
