// SPDX-License-Identifier: MIT
// The number formats of the example, and noise that is a pure function of its coordinates.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace moe {

using Bf16 = std::uint16_t;  // the upper half of an FP32 number

inline float widen(Bf16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16); }

/// Rounds to nearest, ties to even. The example has no NaN, so none is treated.
inline Bf16 narrow(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<Bf16>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

/// Value of an FP8 E4M3 code: sign, 4 exponent bits (bias 7), 3 mantissa bits; exponent 0 holds the subnormals.
inline float e4m3_value(std::uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code & 0x80) != 0 ? -size : size;
}

/// Noise with mean 0 and variance 1 at (stream, index). No state: every rank computes the same embeddings and weights
/// by itself, so nothing has to be loaded or sent before the layer runs.
inline float noise(std::uint64_t stream, std::uint64_t index) {
  std::uint64_t bits = (stream << 40) + index + 0x9e3779b97f4a7c15U;  // a splitmix64 step spreads it over all bits
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9U;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebU;
  bits ^= bits >> 31;
  // The sum of four uniform numbers is close to a normal one; its variance is 4/12.
  const auto sum =
      static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return (sum / 65536.0F - 2.0F) * 1.7320508F;
}

}  // namespace moe
