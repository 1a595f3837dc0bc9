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

// As fp8_encode8: for groups without infinities and NaNs, its low bytes are the codes.
EP_ALWAYS_INLINE __m512i fp8_encode16(__m512 x, __m512 factor) {
  constexpr int kShift = 23 - plan::kE4m3Format.mantissa_bits;
  constexpr std::int32_t kLowest = plan::kE4m3Format.lowest_field << 23;
  constexpr int kAOrBAndC = 0xf8;
  const __m512i product = _mm512_castps_si512(_mm512_mul_ps(x, factor));
  const __m512i power = _mm512_max_epi32(_mm512_and_si512(product, wide(plan::kFloatInfBits)), wide(kLowest));
  const __m512 coarse = _mm512_castsi512_ps(_mm512_add_epi32(power, wide(kShift << 23)));
  const __m512i magnitude = _mm512_and_si512(product, wide(plan::kFloatMagnitude));
  const __m512i steps = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), coarse));
  const __m512i code = _mm512_add_epi32(steps, _mm512_srli_epi32(_mm512_sub_epi32(power, wide(kLowest)), kShift));
  return _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(_mm512_castps_si512(x), 24), wide(0x80), kAOrBAndC);
}

}  // namespace
}  // namespace deep_ep::host
