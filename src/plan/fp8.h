// SPDX-License-Identifier: MIT
// The one definition of the FP8 scaling rule: a row's channels in groups of 128 (the last may be shorter), one scale
// for each group.
//
//   amax   = max(1e-4, largest |x| of the group, NaN left out)
//   scale  = amax / 448 as amax * (1/448), stored: what a receiver multiplies by
//   factor = 448 / amax                    what the sender multiplies by
//   code   = e4m3(x * factor), saturating, with the sign of x
//
// Rounded scales are the next power of two >= amax * (1/448), and their factor is its exact reciprocal. A NaN stays a
// NaN code. A group that holds an infinity has scale infinity and factor 0: its infinities become NaN codes, and every
// element comes back as NaN.
#pragma once

#include <cstdint>

#include "plan/macros.h"
#include "plan/number.h"

namespace deep_ep::plan {

inline constexpr int kFp8Group = 128;
inline constexpr int kUe8m0PerWord = 4;
inline constexpr float kFp8MinAmax = 1e-4f;

enum class Fp8Scale : std::uint8_t {
  kExact,       // one float for each group
  kPowerOfTwo,  // one float for each group, a power of two
  kUe8m0,       // a power of two as its biased exponent byte; four groups in one int32, the first in the lowest byte
};

EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::int64_t num_fp8_groups(std::int64_t hidden) {
  return (hidden + kFp8Group - 1) / kFp8Group;
}

// Stored 4-byte words (float or int32) of one row.
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::int64_t num_scales(std::int64_t hidden, Fp8Scale kind) {
  const std::int64_t groups = num_fp8_groups(hidden);
  return kind == Fp8Scale::kUe8m0 ? (groups + kUe8m0PerWord - 1) / kUe8m0PerWord : groups;
}

struct Fp8Scaling {
  float scale;   // stored
  float factor;  // applied before encoding
};

// |x| as bits, 0 for NaN. These order as the magnitudes do, so a group's largest is an integer maximum, in any order.
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::int32_t fp8_magnitude(float x) {
  const std::int32_t magnitude = bits_of(x) & kFloatMagnitude;
  return magnitude > kFloatInfBits ? 0 : magnitude;
}

EP_HOST_DEVICE EP_ALWAYS_INLINE Fp8Scaling fp8_scaling(std::int32_t largest_magnitude, Fp8Scale kind) {
  const std::int32_t floor = bits_of(kFp8MinAmax);
  const float amax = float_of(largest_magnitude > floor ? largest_magnitude : floor);
  const float exact = mul_rn(amax, 1.0f / kE4m3Max);
  if (kind == Fp8Scale::kExact) return {exact, div_rn(kE4m3Max, amax)};
  // ceil(log2) by bits: the exponent, one more if any mantissa bit is set. The range is 2^-22 to 2^120, or infinity
  // (field 255), whose reciprocal's field would be -1: 0 stands for it, as in the exact rule.
  const std::int32_t bits = bits_of(exact);
  const std::int32_t field = (bits >> 23) + ((bits & 0x007fffff) != 0 ? 1 : 0);
  const std::int32_t reciprocal_field = field < 254 ? 254 - field : 0;
  return {float_of(field << 23), float_of(reciprocal_field << 23)};
}

// The sign is copied from x because a product that is NaN has the sign that the machine likes.
EP_HOST_DEVICE EP_ALWAYS_INLINE std::uint8_t fp8_encode(float x, float factor) {
  const std::int32_t magnitude = bits_of(mul_rn(x, factor)) & kFloatMagnitude;
  return to_e4m3(float_of(magnitude | (bits_of(x) & ~kFloatMagnitude)));
}

EP_HOST_DEVICE EP_ALWAYS_INLINE float fp8_decode(std::uint8_t code, float scale) {
  return mul_rn(from_e4m3(code), scale);
}

// The byte of a power-of-two scale, at its place in the word that it shares: OR the bytes of up to four groups. Unused
// bytes stay 0.
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr std::uint32_t ue8m0_in_word(float scale, std::int64_t group_idx) {
  const std::uint32_t byte = static_cast<std::uint32_t>(bits_of(scale)) >> 23;
  return byte << (8 * static_cast<int>(group_idx % kUe8m0PerWord));
}

// Byte 255, which the format calls NaN, reads as infinity here: either way every element of the group comes back as
// NaN.
EP_HOST_DEVICE EP_ALWAYS_INLINE constexpr float ue8m0_from_word(std::uint32_t word, std::int64_t group_idx) {
  const std::uint32_t byte = (word >> (8 * static_cast<int>(group_idx % kUe8m0PerWord))) & 0xffu;
  return float_of(byte == 0 ? 0x00400000 : static_cast<std::int32_t>(byte << 23));  // 2^-127 is subnormal
}

}  // namespace deep_ep::plan
