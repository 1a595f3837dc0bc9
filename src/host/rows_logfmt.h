// SPDX-License-Identifier: MIT
// The row operations of LogFMT-10, eight channels at a time, which share a byte of signs and one of ninth bits. With
// AVX2 these are plan/logfmt.h in intrinsics, bit for bit.
#pragma once

#include "host/rows_impl.h"
#include "plan/logfmt.h"

namespace deep_ep::host {
namespace {

#ifdef __AVX2__

class LogBlockExtremes {
 public:
  EP_ALWAYS_INLINE void add(const float* x) {
    const __m256i magnitude = magnitude8(_mm256_loadu_ps(x));
    const __m256i finite = _mm256_and_si256(magnitude, _mm256_cmpgt_epi32(all(plan::kFloatInfBits), magnitude));
    largest_ = _mm256_max_epi32(largest_, finite);
    smallest_less_1_ = _mm256_min_epu32(smallest_less_1_, _mm256_sub_epi32(finite, all(1)));
  }
  EP_ALWAYS_INLINE plan::LogExtremes joined() const {
    alignas(32) std::uint32_t lanes[kBlock];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), smallest_less_1_);
    plan::LogExtremes joined = {largest_lane(largest_), lanes[0]};
    for (const std::uint32_t lane : lanes)
      joined.smallest_less_1 = lane < joined.smallest_less_1 ? lane : joined.smallest_less_1;
    return joined;
  }

 private:
  __m256i largest_ = _mm256_setzero_si256();
  __m256i smallest_less_1_ = all(-1);
};

EP_ALWAYS_INLINE __m256i log_encode8(__m256 x, const plan::LogScale& scale, float factor) {
  const __m256i magnitude = magnitude8(x), lowest = all(scale.lowest);
  const __m256 distance = _mm256_cvtepi32_ps(_mm256_sub_epi32(magnitude, lowest));
  const __m256 steps = _mm256_mul_ps(distance, _mm256_set1_ps(factor));
  const __m256 within = _mm256_min_ps(steps, _mm256_set1_ps(static_cast<float>(plan::kLogSteps)));
  const __m256i integer = _mm256_castps_si256(_mm256_add_ps(within, _mm256_set1_ps(8388608.0f)));
  const __m256i number = _mm256_add_epi32(_mm256_and_si256(integer, all(0x1ff)), all(1));
  const __m256i code = _mm256_andnot_si256(_mm256_cmpgt_epi32(lowest, magnitude), number);
  const __m256i special = _mm256_sub_epi32(all(plan::kLogInfinity), nan_mask8(magnitude));
  return _mm256_blendv_epi8(special, code, _mm256_cmpgt_epi32(all(plan::kFloatInfBits), magnitude));
}

EP_ALWAYS_INLINE void log_encode_unit(const float* x, const plan::LogScale& scale, float factor, std::uint8_t* low,
                                      std::uint8_t* high) {
  const __m256 values = _mm256_loadu_ps(x);
  const __m256i codes = log_encode8(values, scale, factor);
  const __m256i first_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                               0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8(codes, first_bytes);
  const std::int32_t four[2] = {_mm_cvtsi128_si32(_mm256_castsi256_si128(fours)),
                                _mm_cvtsi128_si32(_mm256_extracti128_si256(fours, 1))};
  std::memcpy(low, four, sizeof four);
  high[0] = static_cast<std::uint8_t>(_mm256_movemask_ps(values));
  high[1] = static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(codes, 23))));
}

// Lane i is all ones where bit i is set.
EP_ALWAYS_INLINE __m256i lanes_of_bits(std::uint8_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(all(bits), each), each);
}

template <class Number>
EP_ALWAYS_INLINE void log_decode_unit(const std::uint8_t* low, const std::uint8_t* high, const plan::LogScale& scale,
                                      typename Number::Code* dst) {
  const __m256i sign = _mm256_slli_epi32(lanes_of_bits(high[0]), 31);
  const __m256i ninth = _mm256_and_si256(lanes_of_bits(high[1]), all(0x100));
  const __m256i code =
      _mm256_or_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low))), ninth);
  const __m256i line = _mm256_add_epi32(all(scale.lowest - scale.step), _mm256_mullo_epi32(code, all(scale.step)));
  const __m256i number = _mm256_andnot_si256(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()), line);
  const __m256i special = _mm256_add_epi32(all(plan::kFloatInfBits),
                                           _mm256_slli_epi32(_mm256_sub_epi32(code, all(plan::kLogInfinity)), 22));
  const __m256i magnitude = _mm256_blendv_epi8(number, special, _mm256_cmpgt_epi32(code, all(plan::kLogInfinity - 1)));
  Number::store_block(dst, _mm256_castsi256_ps(_mm256_or_si256(magnitude, sign)));
}

#else

class LogBlockExtremes {
 public:
  EP_ALWAYS_INLINE void add(const float* x) {
    for (int i = 0; i < plan::kLogUnit; ++i) extremes_.add(x[i]);
  }
  EP_ALWAYS_INLINE plan::LogExtremes joined() const { return extremes_; }

 private:
  plan::LogExtremes extremes_ = plan::LogExtremes::none();
};

EP_ALWAYS_INLINE void log_encode_unit(const float* x, const plan::LogScale& scale, float factor, std::uint8_t* low,
                                      std::uint8_t* high) {
  std::uint32_t signs = 0, ninths = 0;
  for (int i = 0; i < plan::kLogUnit; ++i) {
    const std::int32_t code = plan::log_encode(x[i], scale, factor);
    low[i] = static_cast<std::uint8_t>(code);
    signs |= static_cast<std::uint32_t>(plan::bits_of(x[i])) >> 31 << i;
    ninths |= static_cast<std::uint32_t>(code) >> 8 << i;
  }
  high[0] = static_cast<std::uint8_t>(signs);
  high[1] = static_cast<std::uint8_t>(ninths);
}

template <class Number>
EP_ALWAYS_INLINE void log_decode_unit(const std::uint8_t* low, const std::uint8_t* high, const plan::LogScale& scale,
                                      typename Number::Code* dst) {
  for (int i = 0; i < plan::kLogUnit; ++i) {
    const float magnitude = plan::log_decode(low[i] | (high[1] >> i & 1) << 8, scale);
    const std::uint32_t sign = static_cast<std::uint32_t>(high[0] >> i & 1) << 31;
    dst[i] = Number::store(plan::float_of(plan::bits_of(magnitude) | static_cast<std::int32_t>(sign)));
  }
}

#endif

EP_ALWAYS_INLINE std::int64_t log_block_end(std::int64_t begin, std::int64_t hidden) {
  return begin + plan::kLogBlock < hidden ? begin + plan::kLogBlock : hidden;
}

template <class Number>
EP_ALWAYS_INLINE void load_unit(float* x, const typename Number::Code* src) {
#ifdef __AVX2__
  _mm256_storeu_ps(x, Number::load_block(src));
#else
  for (int i = 0; i < plan::kLogUnit; ++i) x[i] = Number::load(src[i]);
#endif
}

void log_encode(const LogEncodeRow& row) {
  with_number_type(row.dtype, [&row](auto number) {
    using Number = decltype(number);
    const typename Number::Code* src = static_cast<const typename Number::Code*>(row.src);
    for (std::int64_t begin = 0; begin < row.hidden; begin += plan::kLogBlock) {
      const std::int64_t end = log_block_end(begin, row.hidden);
      float x[plan::kLogBlock];
      LogBlockExtremes extremes;
      for (std::int64_t at = begin; at < end; at += plan::kLogUnit) {
        load_unit<Number>(x + (at - begin), src + at);
        extremes.add(x + (at - begin));
      }
      const plan::LogScale scale = plan::LogScale::of(extremes.joined());
      const float factor = scale.factor();
      row.words[begin / plan::kLogBlock] = scale.word();
      for (std::int64_t at = begin; at < end; at += plan::kLogUnit)
        log_encode_unit(x + (at - begin), scale, factor, row.low + at, row.high + at / 4);
    }
  });
}

void log_decode(const LogDecodeRow& row) {
  with_number_type(row.dtype, [&row](auto number) {
    using Number = decltype(number);
    typename Number::Code* dst = static_cast<typename Number::Code*>(row.dst);
    for (std::int64_t begin = 0; begin < row.hidden; begin += plan::kLogBlock) {
      const plan::LogScale scale = plan::LogScale::from(row.words[begin / plan::kLogBlock]);
      for (std::int64_t at = begin; at < log_block_end(begin, row.hidden); at += plan::kLogUnit)
        log_decode_unit<Number>(row.low + at, row.high + at / 4, scale, dst + at);
    }
  });
}

}  // namespace
}  // namespace deep_ep::host
