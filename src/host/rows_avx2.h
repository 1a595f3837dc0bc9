// SPDX-License-Identifier: MIT
// Eight elements at a time with AVX2 and F16C: plan/number.h and plan/fp8.h in intrinsics, bit for bit (g++ 12
// vectorises the scalar forms too, but spends most of its time packing and unpacking). The formulas are explained
// there; rows_test.cpp compares the two over every code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "plan/fp8.h"
#include "plan/macros.h"
#include "plan/number.h"

namespace deep_ep::host {
namespace {

constexpr int kBlock = 8;

EP_ALWAYS_INLINE __m256i all(std::int32_t x) { return _mm256_set1_epi32(x); }
EP_ALWAYS_INLINE __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
EP_ALWAYS_INLINE __m256i magnitude8(__m256 x) {
  return _mm256_and_si256(_mm256_castps_si256(x), all(plan::kFloatMagnitude));
}
EP_ALWAYS_INLINE __m256i nan_mask8(__m256i magnitude) {
  return _mm256_cmpgt_epi32(magnitude, all(plan::kFloatInfBits));
}

// Eight 32-bit values below 2^16 become eight 16-bit ones.
EP_ALWAYS_INLINE void store_low16(void* to, __m256i x) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

EP_ALWAYS_INLINE __m256 widen_magnitude8(__m256i code, plan::SmallFloat format) {
  const int shift = 23 - format.mantissa_bits;
  const __m256i shifted = _mm256_slli_epi32(code, shift);
  const __m256 lowest = _mm256_castsi256_ps(all(format.lowest_field << 23));
  const __m256i above = _mm256_add_epi32(shifted, all(format.lowest_field << 23));
  const __m256 subnormal = _mm256_sub_ps(_mm256_castsi256_ps(above), lowest);
  const __m256 normal = _mm256_castsi256_ps(_mm256_add_epi32(shifted, all((format.lowest_field - 1) << 23)));
  const __m256i is_normal = _mm256_cmpgt_epi32(code, all((1 << format.mantissa_bits) - 1));
  return _mm256_blendv_ps(subnormal, normal, _mm256_castsi256_ps(is_normal));
}

EP_ALWAYS_INLINE __m256i round_magnitude8(__m256i magnitude, plan::SmallFloat format) {
  const int shift = 23 - format.mantissa_bits;
  const __m256i lowest = all(format.lowest_field << 23);
  const __m256i power = _mm256_and_si256(_mm256_max_epi32(magnitude, lowest), all(plan::kFloatInfBits));
  const __m256i coarse = _mm256_add_epi32(power, all(shift << 23));
  const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_castsi256_ps(coarse));
  const __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(sum), coarse);
  return _mm256_add_epi32(steps, _mm256_srli_epi32(_mm256_sub_epi32(power, lowest), shift));
}

// Leaves a signalling NaN as it is: any arithmetic on it makes it quiet, and what does none applies quiet8.
EP_ALWAYS_INLINE __m256 from_bf16_8(const std::uint16_t* codes) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(codes)), 16));
}

EP_ALWAYS_INLINE __m256 quiet8(__m256 x) {
  const __m256i quiet = _mm256_and_si256(nan_mask8(magnitude8(x)), all(0x00400000));
  return _mm256_or_ps(x, _mm256_castsi256_ps(quiet));
}

EP_ALWAYS_INLINE void to_bf16_8(std::uint16_t* codes, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), all(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, all(0x7fff)), odd), 16);
  store_low16(codes, _mm256_blendv_epi8(rounded, all(plan::kBf16Nan), nan_mask8(magnitude8(x))));
}

EP_ALWAYS_INLINE __m256 from_fp16_8(const std::uint16_t* codes) { return _mm256_cvtph_ps(load16(codes)); }

EP_ALWAYS_INLINE void to_fp16_8(std::uint16_t* codes, __m256 x) {
  // The instruction keeps sign and payload of a NaN; plan::to_fp16 has one NaN, so each becomes that one first.
  const __m256 one_nan = _mm256_castsi256_ps(all(plan::kFloatMagnitude));
  const __m256 cleaned = _mm256_blendv_ps(x, one_nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_cvtps_ph(cleaned, _MM_FROUND_TO_NEAREST_INT));
}

EP_ALWAYS_INLINE __m256 from_e4m3_8(const std::uint8_t* codes) {
  const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256i magnitude = _mm256_and_si256(bits, all(0x7f));
  const __m256i sign = _mm256_slli_epi32(_mm256_andnot_si256(all(0x7f), bits), 24);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, all(plan::kE4m3Nan)), all(0x7fc00000));
  const __m256i widened = _mm256_castps_si256(widen_magnitude8(magnitude, plan::kE4m3Format));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_or_si256(widened, nan), sign));
}

// plan::fp8_encode where the product is a number and no larger than rounds to 448, as in a group without infinities and
// NaNs; each result fills 32 bits. The code is round_magnitude's, its terms in an order that needs fewer instructions:
// `coarse` has no bits below its exponent, so the sum's low bits count steps, and are masked out where the numbers are
// packed.
EP_ALWAYS_INLINE __m256i fp8_encode8(__m256 x, __m256 factor) {
  constexpr int kShift = 23 - plan::kE4m3Format.mantissa_bits;
  constexpr std::int32_t kLowest = plan::kE4m3Format.lowest_field << 23;
  const __m256i product = _mm256_castps_si256(_mm256_mul_ps(x, factor));
  const __m256i power = _mm256_max_epi32(_mm256_and_si256(product, all(plan::kFloatInfBits)), all(kLowest));
  const __m256 coarse = _mm256_castsi256_ps(_mm256_add_epi32(power, all(kShift << 23)));
  const __m256i magnitude = _mm256_and_si256(product, all(plan::kFloatMagnitude));
  const __m256i steps = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), coarse));
  const __m256i code = _mm256_add_epi32(steps, _mm256_srli_epi32(_mm256_sub_epi32(power, all(kLowest)), kShift));
  const __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(x), 31);
  // Below 128 and above: the code's eighth bit is 0, so the sign can be put there before the rest is masked out.
  return _mm256_and_si256(_mm256_or_si256(code, _mm256_slli_epi32(sign, 7)), all(0xff));
}

// Encodes 32 elements. Packing works within 128-bit halves, so the last step puts the fours in order.
EP_ALWAYS_INLINE void fp8_encode32(std::uint8_t* codes, __m256 x0, __m256 x1, __m256 x2, __m256 x3, __m256 factor) {
  const __m256i low = _mm256_packus_epi32(fp8_encode8(x0, factor), fp8_encode8(x1, factor));
  const __m256i high = _mm256_packus_epi32(fp8_encode8(x2, factor), fp8_encode8(x3, factor));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
}

EP_ALWAYS_INLINE std::int32_t largest_lane(__m256i x) {
  __m128i largest = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, _MM_SHUFFLE(1, 0, 3, 2)));
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(largest);
}

}  // namespace
}  // namespace deep_ep::host
