// SPDX-License-Identifier: MIT
// The one definition of LogFMT-10: ten bits for a value, its sign and the logarithm of its magnitude, in blocks of 128
// channels (the last may be shorter).
//
// The logarithm is the piecewise linear one that a float's own bits are: bits(|x|) / 2^23 is log2|x| + 127 at powers of
// two and a straight line in between. It needs no function of a library, so host and device agree on every bit, and
// what is nearest in it is nearest in value too. For a block
//
//   largest  = the largest finite bits(|x|)
//   lowest   = the smallest finite bits(|x|) that is not 0, at least largest - 16 octaves, its low 16 bits cleared
//   step     = (largest - lowest) / 508, rounded down to a multiple of 8
//
// and the code of a magnitude is 0: zero, or less than lowest; 1 .. 509: lowest + (code - 1) * step, the nearest, found
// in FP32 as (bits - lowest) * (1 / step); 510: infinity; 511: NaN.
//
// The error of a normal number x is at most |x| * 2^-23 * max(4063, step / 2), that is 0.05 %, or 0.0985 % for each
// octave from a block's lowest to its largest, 1.58 % at most. What is less than 2^-16 of the largest may become 0.
// Zeros keep their sign; infinities and NaNs disturb no other channel. Rounded to bf16, a block of bf16 that spans less
// than 3.9 octaves comes back as it was.
#pragma once

#include <cstdint>

#include "plan/macros.h"
#include "plan/number.h"

namespace deep_ep::plan {

inline constexpr int kLogBlock = 128;
inline constexpr int kLogUnit = 8;  // channels whose codes are stored together
inline constexpr std::int32_t kLogRange = 16 << 23;
inline constexpr std::int32_t kLogSteps = 508;
inline constexpr std::int32_t kLogStepUnit = 8;
inline constexpr std::int32_t kLogInfinity = 510;

// The magnitudes of a block so far. Integers, so that they may be gathered in any order.
struct LogExtremes {
  std::int32_t largest;
  std::uint32_t smallest_less_1;  // a zero, less 1, is the largest of all

  EP_HOST_DEVICE EP_ALWAYS_INLINE static constexpr LogExtremes none() { return {0, 0xffffffffu}; }
  EP_HOST_DEVICE EP_ALWAYS_INLINE void add(float x) {
    const std::int32_t magnitude = bits_of(x) & kFloatMagnitude;
    const bool finite = magnitude < kFloatInfBits;
    const std::int32_t finite_magnitude = where(finite, magnitude);
    const std::uint32_t less_1 = static_cast<std::uint32_t>(finite_magnitude) - 1u;
    largest = largest > finite_magnitude ? largest : finite_magnitude;
    smallest_less_1 = smallest_less_1 < less_1 ? smallest_less_1 : less_1;
  }
};

// What the codes of a block mean.
struct LogScale {
  std::int32_t lowest;
  std::int32_t step;

  EP_HOST_DEVICE EP_ALWAYS_INLINE static LogScale of(const LogExtremes& block) {
    const auto smallest = static_cast<std::int32_t>(block.smallest_less_1 + 1u);
    const std::int32_t least = block.largest - kLogRange;
    const auto lowest =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(smallest > least ? smallest : least) & 0xffff0000u);
    return {lowest, (block.largest - lowest) / (kLogSteps * kLogStepUnit) * kLogStepUnit};
  }
  // As stored: both fit in 16 bits.
  EP_HOST_DEVICE EP_ALWAYS_INLINE std::uint32_t word() const {
    return static_cast<std::uint32_t>(lowest) >> 16 | static_cast<std::uint32_t>(step / kLogStepUnit) << 16;
  }
  EP_HOST_DEVICE EP_ALWAYS_INLINE static LogScale from(std::uint32_t word) {
    return {static_cast<std::int32_t>(word << 16), static_cast<std::int32_t>(word >> 16) * kLogStepUnit};
  }
  // What log_encode multiplies by.
  EP_HOST_DEVICE EP_ALWAYS_INLINE float factor() const {
    return step > 0 ? div_rn(1.0f, static_cast<float>(step)) : 0.0f;
  }
};

// Nine bits; the sign is stored beside them. Adding 2^23 rounds to nearest and leaves the integer in the low bits.
EP_HOST_DEVICE EP_ALWAYS_INLINE std::int32_t log_encode(float x, const LogScale& scale, float factor) {
  constexpr float kInteger = 8388608.0f;
  const std::int32_t magnitude = bits_of(x) & kFloatMagnitude;
  const float steps = mul_rn(static_cast<float>(magnitude - scale.lowest), factor);
  const float within = steps < static_cast<float>(kLogSteps) ? steps : static_cast<float>(kLogSteps);
  const std::int32_t code = where(magnitude >= scale.lowest, (bits_of(add_rn(within, kInteger)) & 0x1ff) + 1);
  const std::int32_t special = kLogInfinity + (magnitude > kFloatInfBits ? 1 : 0);
  return code ^ where(magnitude >= kFloatInfBits, code ^ special);
}

// The magnitude of a code.
EP_HOST_DEVICE EP_ALWAYS_INLINE float log_decode(std::int32_t code, const LogScale& scale) {
  const std::int32_t number = where(code != 0, scale.lowest - scale.step + code * scale.step);
  const std::int32_t special = kFloatInfBits + ((code - kLogInfinity) << 22);  // infinity, or the next one: NaN
  return float_of(number ^ where(code >= kLogInfinity, number ^ special));
}

}  // namespace deep_ep::plan
