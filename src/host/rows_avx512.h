// SPDX-License-Identifier: MIT
// Sixteen elements at a time with AVX-512, for the two loops that are bound by arithmetic: quantising and adding rows.
// The formulas are those of rows_avx2.h and plan/number.h, bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "plan/fp8.h"
#include "plan/macros.h"
#include "plan/number.h"

namespace deep_ep::host {
namespace {

constexpr int kWide = 16;

EP_ALWAYS_INLINE __m512i wide(std::int32_t x) { return _mm512_set1_epi32(x); }
EP_ALWAYS_INLINE __m256i load_16_words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
EP_ALWAYS_INLINE __m512i magnitude16(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), wide(plan::kFloatMagnitude));
}

EP_ALWAYS_INLINE __m512 from_bf16_16(const std::uint16_t* codes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_words(codes)), 16));
}

// Not the instruction that converts: it takes subnormal numbers for zero.
EP_ALWAYS_INLINE __m256i to_bf16_16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), wide(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, wide(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude16(x), wide(plan::kFloatInfBits));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, wide(plan::kBf16Nan)));
}

EP_ALWAYS_INLINE __m512 from_fp16_16(const std::uint16_t* codes) { return _mm512_cvtph_ps(load_16_words(codes)); }

EP_ALWAYS_INLINE __m256i to_fp16_16(__m512 x) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512 cleaned = _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(wide(plan::kFloatMagnitude)));
  return _mm512_cvtps_ph(cleaned, _MM_FROUND_TO_NEAREST_INT);
}

// e4m3 codes of x * factor in the low bytes, which overflow into the others; x is neither negative nor NaN nor
// infinite. A power of two is added whose last place is one step of the code: that rounds, and leaves the number of
// steps in the low bits of the sum. kBias makes the code's exponent count from its lowest: an even number of steps, so
// that ties still go to even.
EP_ALWAYS_INLINE __m512i e4m3_of_16(__m512 x, __m512 factor) {
  constexpr int kShift = 23 - plan::kE4m3Format.mantissa_bits;
  constexpr std::int32_t kLowest = plan::kE4m3Format.lowest_field << 23;
  constexpr std::int32_t kBias = 256 - (kLowest >> kShift) % 256;
  static_assert(kBias % 2 == 0);
  const __m512 product = _mm512_mul_ps(x, factor);
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(product), wide(plan::kFloatInfBits));
  const __m512i power = _mm512_max_epi32(exponent, wide(kLowest));
  const __m512 coarse = _mm512_castsi512_ps(_mm512_add_epi32(power, wide((kShift << 23) + kBias)));
  const __m512i steps = _mm512_castps_si512(_mm512_add_ps(product, coarse));
  return _mm512_add_epi32(steps, _mm512_srli_epi32(power, kShift));
}

constexpr int kAOrBAndC = 0xf8;  // for ternarylogic

// As fp8_encode8: for groups without infinities and NaNs.
EP_ALWAYS_INLINE __m128i fp8_encode16(__m512 x, __m512 factor) {
  const __m512i code = e4m3_of_16(_mm512_castsi512_ps(magnitude16(x)), factor);
  const __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(x), 24);
  return _mm512_cvtepi32_epi8(_mm512_ternarylogic_epi32(code, sign, wide(0x80), kAOrBAndC));
}

// Two bf16 in each lane are worked on as such where that can be, which saves a third of the time of going through
// load_wide() and fp8_encode16().
constexpr int kWideBf16 = 32;

EP_ALWAYS_INLINE __m512i load_32_words(const std::uint16_t* from) { return _mm512_loadu_si512(from); }
EP_ALWAYS_INLINE __m512i magnitude32(__m512i bf16) { return _mm512_and_si512(bf16, wide(0x7fff7fff)); }

// As the bits of a float.
EP_ALWAYS_INLINE std::int32_t largest_bf16(__m512i magnitudes) {
  const __m256i of_16 = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
  const __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(of_16), _mm256_extracti128_si256(of_16, 1));
  // The one horizontal instruction looks for the least.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(of_8, _mm_set1_epi16(-1)));
  return (0xffff ^ (_mm_cvtsi128_si32(least) & 0xffff)) << 16;
}

// As fp8_encode16.
EP_ALWAYS_INLINE __m256i fp8_encode32_bf16(__m512i bf16, __m512 factor) {
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  const __m512i magnitudes = magnitude32(bf16);
  const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(magnitudes, 16));
  const __m512 upper = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(kUpper, magnitudes));
  const __m512i code =
      _mm512_mask_blend_epi16(kUpper, e4m3_of_16(lower, factor), _mm512_slli_epi32(e4m3_of_16(upper, factor), 16));
  return _mm512_cvtepi16_epi8(_mm512_ternarylogic_epi32(code, _mm512_srli_epi16(bf16, 8), wide(0x00800080), kAOrBAndC));
}

constexpr int kTurned = 4;

// As many columns of sixteen rows, from word i of each on.
EP_ALWAYS_INLINE void turn_columns(const std::int32_t* const* rows, std::int64_t i, __m512i* columns) {
  const auto words = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + i)); };
  // Every fourth row: so the unpacking below, which works inside quarters of a register, leaves rows in order.
  const auto every_fourth = [&](int row) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(words(row)), words(row + 4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(words(row + 8)), words(row + 12), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  };
  const __m512i a = every_fourth(0), b = every_fourth(1), c = every_fourth(2), d = every_fourth(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  columns[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  columns[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  columns[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  columns[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

}  // namespace
}  // namespace deep_ep::host
