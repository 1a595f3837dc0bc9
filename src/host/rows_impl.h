// SPDX-License-Identifier: MIT
// The row operations, written once (those of LogFMT in rows_logfmt.h). rows_baseline.cpp, rows_v3.cpp and rows_v4.cpp
// include these files by way of rows_table.h and are compiled for different instruction sets.
//
// Everything here has internal linkage or is EP_ALWAYS_INLINE, and no inline function of the standard library is
// called: an object file for AVX2 must define no weak function, because the linker may keep that copy for the whole
// program. `nm rows_v3.cpp.o | grep ' [WV] '` is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host/rows.h"
#include "plan/fp8.h"
#include "plan/macros.h"
#include "plan/number.h"

// The sanitizers do not follow streaming stores, so under them a copy is memcpy.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define EP_ROWS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define EP_ROWS_SANITIZED 1
#endif
#endif
#if defined(__x86_64__) && !defined(EP_ROWS_SANITIZED)
#define EP_ROWS_STREAM 1
#include <immintrin.h>
#endif
#ifdef __AVX2__
#include "host/rows_avx2.h"
#endif
#ifdef __AVX512F__
#include "host/rows_avx512.h"
#endif

namespace deep_ep::host {

[[noreturn]] void throw_not_a_number_type(DType dtype);  // rows.cpp

namespace {

// A number type of rows: one element, and with AVX2 a block of eight.
struct Bf16 {
  using Code = std::uint16_t;
  static EP_ALWAYS_INLINE float load(Code code) { return plan::from_bf16(code); }
  static EP_ALWAYS_INLINE Code store(float x) { return plan::to_bf16(x); }
#ifdef __AVX2__
  static EP_ALWAYS_INLINE __m256 load_block(const Code* from) { return from_bf16_8(from); }
  static EP_ALWAYS_INLINE void store_block(Code* to, __m256 x) { to_bf16_8(to, x); }
#endif
#ifdef __AVX512F__
  static EP_ALWAYS_INLINE __m512 load_wide(const Code* from) { return from_bf16_16(from); }
  static EP_ALWAYS_INLINE __m256i round_wide(__m512 x) { return to_bf16_16(x); }
#endif
};

struct Fp16 {
  using Code = std::uint16_t;
  static EP_ALWAYS_INLINE float load(Code code) { return plan::from_fp16(code); }
  static EP_ALWAYS_INLINE Code store(float x) { return plan::to_fp16(x); }
#ifdef __AVX2__
  static EP_ALWAYS_INLINE __m256 load_block(const Code* from) { return from_fp16_8(from); }
  static EP_ALWAYS_INLINE void store_block(Code* to, __m256 x) { to_fp16_8(to, x); }
#endif
#ifdef __AVX512F__
  static EP_ALWAYS_INLINE __m512 load_wide(const Code* from) { return from_fp16_16(from); }
  static EP_ALWAYS_INLINE __m256i round_wide(__m512 x) { return to_fp16_16(x); }
#endif
};

struct Fp32 {
  using Code = float;
  static EP_ALWAYS_INLINE float load(Code code) { return code; }
  static EP_ALWAYS_INLINE Code store(float x) { return x; }
#ifdef __AVX2__
  static EP_ALWAYS_INLINE __m256 load_block(const Code* from) { return _mm256_loadu_ps(from); }
  static EP_ALWAYS_INLINE void store_block(Code* to, __m256 x) { _mm256_storeu_ps(to, x); }
#endif
#ifdef __AVX512F__
  static EP_ALWAYS_INLINE __m512 load_wide(const Code* from) { return _mm512_loadu_ps(from); }
  static EP_ALWAYS_INLINE __m512i round_wide(__m512 x) { return _mm512_castps_si512(x); }
#endif
};

// Calls f with the number type that dtype names.
template <class F>
EP_ALWAYS_INLINE auto with_number_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBf16: return f(Bf16{});
    case DType::kFp16: return f(Fp16{});
    case DType::kFp32: return f(Fp32{});
    case DType::kU8:
    case DType::kFp8E4m3:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: break;
  }
  throw_not_a_number_type(dtype);
}

constexpr std::size_t kLine = 64;

// Rows of this size and more are streamed. Measured on a Xeon (Sapphire Rapids, one core, rows of 2 to 32 KiB): into
// 512 MiB that is not in any cache 19 to 22 GB/s streamed against 6 to 9 with memcpy, which reads each line before
// writing it; into 8 MiB written over and over both reach 20 to 24. Below 2 KiB the partial lines at the ends eat the
// gain.
constexpr std::size_t kStreamFrom = 2048;

#ifdef EP_ROWS_STREAM

// `to` is aligned to a line.
EP_ALWAYS_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  const __m256i* lines = static_cast<const __m256i*>(from);
  const __m256i a = _mm256_loadu_si256(lines), b = _mm256_loadu_si256(lines + 1);
  _mm256_stream_si256(static_cast<__m256i*>(to), a);
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, b);
#else
  for (std::size_t part = 0; part < kLine / sizeof(__m128i); ++part)
    _mm_stream_si128(static_cast<__m128i*>(to) + part, _mm_loadu_si128(static_cast<const __m128i*>(from) + part));
#endif
}

void copy(void* dst, const void* src, std::size_t bytes) {
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  if (bytes < kStreamFrom) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return;
  }
  const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(dst) % kLine) % kLine;
  // Only whole lines are streamed: a line written in part costs a read and two writes of memory.
  std::memcpy(to, from, head);
  std::size_t at = head;
  for (; at + kLine <= bytes; at += kLine) stream_line(to + at, from + at);
  std::memcpy(to + at, from + at, bytes - at);
}

// To two places at once: past the caches to the first, through them to the second. The two ways share little, so they
// take less time together than one after the other by either.
void copy_twice(char* past, char* through, const char* from, std::size_t bytes) {
  const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(past) % kLine) % kLine;
  std::memcpy(past, from, head);
  std::memcpy(through, from, head);
  std::size_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    stream_line(past + at, from + at);
    std::memcpy(through + at, from + at, kLine);
  }
  std::memcpy(past + at, from + at, bytes - at);
  std::memcpy(through + at, from + at, bytes - at);
}

#ifdef __AVX2__
bool can_stream(std::size_t bytes) { return bytes >= kStreamFrom; }

// Both aligned to 32 bytes, which divides `bytes`.
EP_ALWAYS_INLINE void stream_aligned(void* dst, const void* src, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(dst) + at),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(src) + at)));
}
#endif

// Streaming stores wait in write-combining buffers outside the order of ordinary x86 stores, so a release store alone
// (a plain mov) could become visible before them. sfence empties the buffers first; from then on the release covers
// them as it does any store.
void flush() { _mm_sfence(); }

#else

EP_ALWAYS_INLINE void stream_line(void* to, const void* from) { std::memcpy(to, from, kLine); }

void copy(void* dst, const void* src, std::size_t bytes) {
  if (bytes > 0) std::memcpy(dst, src, bytes);
}

void copy_twice(char* past, char* through, const char* from, std::size_t bytes) {
  std::memcpy(past, from, bytes);
  std::memcpy(through, from, bytes);
}

#ifdef __AVX2__
bool can_stream(std::size_t) { return false; }
EP_ALWAYS_INLINE void stream_aligned(void* dst, const void* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }
#endif

// Ordinary stores only: a release store already orders them.
void flush() {}

#endif

void copy_to_all(std::byte* const* dst, int count, const void* src, std::size_t bytes) {
  const char* from = static_cast<const char*>(src);
  int i = 0;
  for (; i + 1 < count && bytes >= kStreamFrom; i += 2)
    copy_twice(reinterpret_cast<char*>(dst[i]), reinterpret_cast<char*>(dst[i + 1]), from, bytes);
  for (; i < count; ++i) copy(dst[i], src, bytes);
}

void zero(void* dst, std::size_t bytes) {
  if (bytes > 0) std::memset(dst, 0, bytes);
}

void turn(const TurnRows& rows) {
  constexpr std::ptrdiff_t kWords = kLine / sizeof(std::int32_t);
  static_assert(TurnRows::kRows == kWords);
  bool whole = reinterpret_cast<std::uintptr_t>(rows.dst) % kLine == 0 && rows.stride % kWords == 0;
  for (const std::int32_t* row : rows.rows) whole = whole && row != nullptr;
  if (whole) {
    std::int64_t i = 0;
#ifdef __AVX512F__
    for (; i + kTurned <= rows.n; i += kTurned) {
      __m512i columns[kTurned];
      turn_columns(rows.rows, i, columns);
      for (int c = 0; c < kTurned; ++c) stream_line(rows.dst + (i + c) * rows.stride, &columns[c]);
    }
#endif
    for (; i < rows.n; ++i) {
      alignas(kLine) std::int32_t line[kWords];
      for (int r = 0; r < kWords; ++r) line[r] = rows.rows[r][i];
      stream_line(rows.dst + i * rows.stride, line);
    }
    return;
  }
  for (std::int64_t i = 0; i < rows.n; ++i)
    for (int r = 0; r < kWords; ++r)
      if (rows.rows[r] != nullptr) rows.dst[i * rows.stride + r] = rows.rows[r][i];
}

// In each loop below the blocks come first and single elements finish; without AVX2 the second loop does it all.

// Rows are read side by side, a line of each at a time: every row is one stream for the prefetcher, and no sum leaves
// the registers. Across rows far apart in memory that is worth a factor of two over adding one row after the other.
constexpr std::size_t kPrefetchBytes = 1024;

#ifdef __AVX2__
#ifdef __AVX512F__
constexpr int kLanes = kWide;
using Lanes = __m512;
template <class Number>
EP_ALWAYS_INLINE Lanes load_lanes(const typename Number::Code* from) {
  return Number::load_wide(from);
}
template <class Number>
EP_ALWAYS_INLINE void store_lanes(typename Number::Code* to, Lanes x) {
  const auto rounded = Number::round_wide(x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}
EP_ALWAYS_INLINE Lanes all_lanes(float x) { return _mm512_set1_ps(x); }
EP_ALWAYS_INLINE Lanes add_lanes(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
EP_ALWAYS_INLINE Lanes fma_lanes(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#else
constexpr int kLanes = kBlock;
using Lanes = __m256;
template <class Number>
EP_ALWAYS_INLINE Lanes load_lanes(const typename Number::Code* from) {
  return Number::load_block(from);
}
template <class Number>
EP_ALWAYS_INLINE void store_lanes(typename Number::Code* to, Lanes x) {
  Number::store_block(to, x);
}
EP_ALWAYS_INLINE Lanes all_lanes(float x) { return _mm256_set1_ps(x); }
EP_ALWAYS_INLINE Lanes add_lanes(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
EP_ALWAYS_INLINE Lanes fma_lanes(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// The sum of kNum vectors of channels, from channel i of every row on.
template <class Number, bool kWeighted, int kNum>
EP_ALWAYS_INLINE void sum_piece(const SumRows& sum, std::int64_t i, typename Number::Code* to) {
  using Code = typename Number::Code;
  Lanes acc[kNum];
  for (Lanes& lanes : acc) lanes = all_lanes(0.0f);
  for (int row = 0; row < sum.count; ++row) {
    const Code* from = static_cast<const Code*>(sum.rows[row]) + i;
    for (std::size_t line = 0; line < kNum * kLanes * sizeof(Code); line += kLine)
      _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes + line, _MM_HINT_T0);  // past the end: no harm
    for (int part = 0; part < kNum; ++part) {
      const Lanes x = load_lanes<Number>(from + part * kLanes);
      acc[part] = kWeighted ? fma_lanes(all_lanes(sum.weights[row]), x, acc[part]) : add_lanes(acc[part], x);
    }
  }
  for (int part = 0; part < kNum; ++part) store_lanes<Number>(to + part * kLanes, acc[part]);
}
#endif

// Channels i up to `past`.
template <class Number, bool kWeighted>
EP_ALWAYS_INLINE void sum_channels(const SumRows& sum, std::int64_t i, std::int64_t past) {
  using Code = typename Number::Code;
  Code* __restrict dst = static_cast<Code*>(sum.dst);
#ifdef __AVX2__
  for (; i + kLanes <= past; i += kLanes) sum_piece<Number, kWeighted, 1>(sum, i, dst + i);
#endif
  for (; i < past; ++i) {
    float acc = 0.0f;
    for (int row = 0; row < sum.count; ++row) {
      const float x = Number::load(static_cast<const Code*>(sum.rows[row])[i]);
      acc = kWeighted ? plan::fma_rn(sum.weights[row], x, acc) : plan::add_rn(acc, x);
    }
    dst[i] = Number::store(acc);
  }
}

template <class Number, bool kWeighted>
void sum_rows(const SumRows& sum) {
  std::int64_t i = 0;
#ifdef __AVX2__
  using Code = typename Number::Code;
  constexpr int kNum = 4, kChannels = kNum * kLanes;
  static_assert(kChannels * sizeof(Code) % kLine == 0);
  Code* dst = static_cast<Code*>(sum.dst);
  if (sum.stream && can_stream(static_cast<std::size_t>(sum.n) * sizeof(Code))) {
    // Whole lines only, wherever the result begins.
    const std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(dst) % kLine) % kLine;
    i = static_cast<std::int64_t>(head / sizeof(Code));
    sum_channels<Number, kWeighted>(sum, 0, i);
    for (; i + kChannels <= sum.n; i += kChannels) {
      alignas(32) Code rounded[kChannels];
      sum_piece<Number, kWeighted, kNum>(sum, i, rounded);
      stream_aligned(dst + i, rounded, sizeof rounded);
    }
  }
  for (; i + kChannels <= sum.n; i += kChannels) sum_piece<Number, kWeighted, kNum>(sum, i, dst + i);
#endif
  sum_channels<Number, kWeighted>(sum, i, sum.n);
}

void sum(const SumRows& rows) {
  with_number_type(rows.dtype, [&](auto number) {
    using Number = decltype(number);
    rows.weights != nullptr ? sum_rows<Number, true>(rows) : sum_rows<Number, false>(rows);
  });
}

template <class To, class From>
void cast_row(void* dst, const void* src, std::int64_t n) {
  typename To::Code* __restrict to = static_cast<typename To::Code*>(dst);
  const typename From::Code* __restrict from = static_cast<const typename From::Code*>(src);
  std::int64_t i = 0;
#ifdef __AVX2__
  for (; i + kBlock <= n; i += kBlock) {
    __m256 x = From::load_block(from + i);
    if constexpr (sizeof(typename From::Code) < sizeof(typename To::Code)) x = quiet8(x);
    To::store_block(to + i, x);
  }
#endif
  for (; i < n; ++i) to[i] = To::store(From::load(from[i]));
}

void cast(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n) {
  with_number_type(dst_dtype, [=](auto to) {
    with_number_type(src_dtype, [=](auto from) { cast_row<decltype(to), decltype(from)>(dst, src, n); });
  });
}

constexpr int kDotLanes = 16;

template <class Number>
float dot_row(const typename Number::Code* a, const typename Number::Code* b, std::int64_t n) {
  float lanes[kDotLanes] = {};
  std::int64_t i = 0;
#ifdef __AVX2__
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
  for (; i + kDotLanes <= n; i += kDotLanes) {
    low = _mm256_fmadd_ps(Number::load_block(a + i), Number::load_block(b + i), low);
    high = _mm256_fmadd_ps(Number::load_block(a + i + kBlock), Number::load_block(b + i + kBlock), high);
  }
  _mm256_storeu_ps(lanes, low);
  _mm256_storeu_ps(lanes + kBlock, high);
#endif
  for (; i < n; ++i) {
    float& lane = lanes[i % kDotLanes];
    lane = plan::fma_rn(Number::load(a[i]), Number::load(b[i]), lane);
  }
  float sum = lanes[0];
  for (int lane = 1; lane < kDotLanes; ++lane) sum = plan::add_rn(sum, lanes[lane]);
  return sum;
}

float dot(const void* a, const void* b, DType dtype, std::int64_t n) {
  return with_number_type(dtype, [=](auto number) {
    using Code = typename decltype(number)::Code;
    return dot_row<decltype(number)>(static_cast<const Code*>(a), static_cast<const Code*>(b), n);
  });
}

// How a group is quantised: its largest magnitude, and its codes once the factor is known.
template <class Number>
struct PlainGroup {
  using Code = typename Number::Code;
  static std::int32_t largest(const Code* __restrict src, int channels) {
    std::int32_t largest = 0;
    for (int i = 0; i < channels; ++i) {
      const std::int32_t magnitude = plan::fp8_magnitude(Number::load(src[i]));
      largest = largest > magnitude ? largest : magnitude;
    }
    return largest;
  }
  static void encode(const Code* __restrict src, std::uint8_t* __restrict codes, int channels, float factor) {
    for (int i = 0; i < channels; ++i) codes[i] = plan::fp8_encode(Number::load(src[i]), factor);
  }
};

// The same for full groups without infinities and NaNs: in a group that has any, largest() is no number.
#if defined(__AVX512F__)
template <class Number>
struct FullGroup {
  using Code = typename Number::Code;
  static EP_ALWAYS_INLINE std::int32_t largest(const Code* src) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < plan::kFp8Group; i += kWide)
      largest = _mm512_max_epi32(largest, magnitude16(Number::load_wide(src + i)));
    return _mm512_reduce_max_epi32(largest);
  }
  static EP_ALWAYS_INLINE void encode(const Code* src, std::uint8_t* codes, float factor) {
    for (int i = 0; i < plan::kFp8Group; i += kWide)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i),
                       fp8_encode16(Number::load_wide(src + i), _mm512_set1_ps(factor)));
  }
};

template <>
struct FullGroup<Bf16> {
  static EP_ALWAYS_INLINE std::int32_t largest(const std::uint16_t* src) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < plan::kFp8Group; i += kWideBf16)
      largest = _mm512_max_epu16(largest, magnitude32(load_32_words(src + i)));
    return largest_bf16(largest);
  }
  static EP_ALWAYS_INLINE void encode(const std::uint16_t* src, std::uint8_t* codes, float factor) {
    for (int i = 0; i < plan::kFp8Group; i += kWideBf16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                          fp8_encode32_bf16(load_32_words(src + i), _mm512_set1_ps(factor)));
  }
};
#elif defined(__AVX2__)
template <class Number>
struct FullGroup {
  using Code = typename Number::Code;
  static EP_ALWAYS_INLINE std::int32_t largest(const Code* src) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < plan::kFp8Group; i += kBlock)
      largest = _mm256_max_epi32(largest, magnitude8(Number::load_block(src + i)));
    return largest_lane(largest);
  }
  static EP_ALWAYS_INLINE void encode(const Code* src, std::uint8_t* codes, float factor) {
    for (int i = 0; i < plan::kFp8Group; i += 4 * kBlock)
      fp8_encode32(codes + i, Number::load_block(src + i), Number::load_block(src + i + kBlock),
                   Number::load_block(src + i + 2 * kBlock), Number::load_block(src + i + 3 * kBlock),
                   _mm256_set1_ps(factor));
  }
};
#else
template <class Number>
struct FullGroup {
  using Code = typename Number::Code;
  static std::int32_t largest(const Code* src) { return PlainGroup<Number>::largest(src, plan::kFp8Group); }
  static void encode(const Code* src, std::uint8_t* codes, float factor) {
    PlainGroup<Number>::encode(src, codes, plan::kFp8Group, factor);
  }
};
#endif

// Fetches what is read a page later, perhaps of the next row: the processor's own prefetch stops at a page's end.
// Measured in dispatch with FP8, where rows come from memory: a quarter less time.
EP_ALWAYS_INLINE void prefetch_ahead(const void* from, std::size_t bytes) {
#ifdef EP_ROWS_STREAM
  constexpr std::size_t kAhead = 4096;
  for (std::size_t at = 0; at < bytes; at += kLine)
    _mm_prefetch(static_cast<const char*>(from) + kAhead + at, _MM_HINT_T0);  // past the end it does no harm
#else
  (void)from, (void)bytes;
#endif
}

void store_scale(const QuantizeRow& row, std::int64_t group_idx, float scale) {
  switch (row.kind) {
    case plan::Fp8Scale::kExact:
    case plan::Fp8Scale::kPowerOfTwo: static_cast<float*>(row.scales)[group_idx * row.scale_stride] = scale; return;
    case plan::Fp8Scale::kUe8m0: break;
  }
  std::int32_t& word = static_cast<std::int32_t*>(row.scales)[group_idx / plan::kUe8m0PerWord * row.scale_stride];
  const std::uint32_t before = group_idx % plan::kUe8m0PerWord == 0 ? 0u : static_cast<std::uint32_t>(word);
  word = static_cast<std::int32_t>(before | plan::ue8m0_in_word(scale, group_idx));
}

// A piece of a row that begins at a line's start, if the row does. As copy_to_all().
EP_ALWAYS_INLINE void copy_codes(const QuantizeRow& row, std::int64_t at, std::size_t bytes) {
  const std::uint8_t* from = row.codes + at;
  for (int i = 0; i < row.num_copies; i += 2) {
    std::uint8_t* past = row.copies[i] + at;
    std::uint8_t* through = i + 1 < row.num_copies ? row.copies[i + 1] + at : nullptr;
    std::size_t done = 0;
    // Only whole lines are streamed, as in copy().
    if (reinterpret_cast<std::uintptr_t>(past) % kLine == 0) {
      for (; done + kLine <= bytes; done += kLine) {
        stream_line(past + done, from + done);
        if (through != nullptr) std::memcpy(through + done, from + done, kLine);
      }
    }
    if (done == bytes) continue;
    std::memcpy(past + done, from + done, bytes - done);
    if (through != nullptr) std::memcpy(through + done, from + done, bytes - done);
  }
}

template <class Number>
[[gnu::noinline, gnu::cold]] void quantize_plainly(const QuantizeRow& row, std::int64_t group_idx, int channels) {
  const std::int64_t at = group_idx * plan::kFp8Group;
  const auto* src = static_cast<const typename Number::Code*>(row.src) + at;
  const plan::Fp8Scaling scaling = plan::fp8_scaling(PlainGroup<Number>::largest(src, channels), row.kind);
  store_scale(row, group_idx, scaling.scale);
  PlainGroup<Number>::encode(src, row.codes + at, channels, scaling.factor);
}

// Codes go to their further places a few groups after they were computed, when the core has them in its first cache,
// and while it computes the next: streaming them takes longer than that, but no arithmetic.
template <class Number>
void quantize_row(const QuantizeRow& row) {
  const auto* src = static_cast<const typename Number::Code*>(row.src);
  const std::int64_t full_groups = row.hidden / plan::kFp8Group;
  for (std::int64_t group_idx = 0; group_idx < full_groups; ++group_idx) {
    const std::int64_t at = group_idx * plan::kFp8Group;
    prefetch_ahead(src + at, plan::kFp8Group * sizeof(*src));
    const std::int32_t largest = FullGroup<Number>::largest(src + at);
    if (largest < plan::kFloatInfBits) {
      const plan::Fp8Scaling scaling = plan::fp8_scaling(largest, row.kind);
      store_scale(row, group_idx, scaling.scale);
      FullGroup<Number>::encode(src + at, row.codes + at, scaling.factor);
    } else {
      quantize_plainly<Number>(row, group_idx, plan::kFp8Group);
    }
    if (group_idx > 0) copy_codes(row, at - plan::kFp8Group, plan::kFp8Group);
  }
  const std::int64_t at = full_groups * plan::kFp8Group;
  if (row.hidden > at) quantize_plainly<Number>(row, full_groups, static_cast<int>(row.hidden - at));
  const std::int64_t copied = full_groups > 0 ? at - plan::kFp8Group : 0;
  copy_codes(row, copied, static_cast<std::size_t>(row.hidden - copied));
}

void quantize(const QuantizeRow& row) {
  with_number_type(row.dtype, [&row](auto number) { quantize_row<decltype(number)>(row); });
}

float load_scale(const DequantizeRow& row, std::int64_t group_idx) {
  switch (row.kind) {
    case plan::Fp8Scale::kExact:
    case plan::Fp8Scale::kPowerOfTwo: return static_cast<const float*>(row.scales)[group_idx * row.scale_stride];
    case plan::Fp8Scale::kUe8m0: break;
  }
  const std::int32_t word =
      static_cast<const std::int32_t*>(row.scales)[group_idx / plan::kUe8m0PerWord * row.scale_stride];
  return plan::ue8m0_from_word(static_cast<std::uint32_t>(word), group_idx);
}

void dequantize(const DequantizeRow& row) {
  with_number_type(row.dtype, [&row](auto number) {
    using Number = decltype(number);
    for (std::int64_t at = 0; at < row.hidden; at += plan::kFp8Group) {
      const std::int64_t rest = row.hidden - at;
      const int channels = rest < plan::kFp8Group ? static_cast<int>(rest) : plan::kFp8Group;
      const float scale = load_scale(row, at / plan::kFp8Group);
      const std::uint8_t* __restrict codes = row.codes + at;
      typename Number::Code* __restrict dst = static_cast<typename Number::Code*>(row.dst) + at;
      int i = 0;
#ifdef __AVX2__
      const __m256 scales = _mm256_set1_ps(scale);
      for (; i + kBlock <= channels; i += kBlock)
        Number::store_block(dst + i, _mm256_mul_ps(from_e4m3_8(codes + i), scales));
#endif
      for (; i < channels; ++i) dst[i] = Number::store(plan::fp8_decode(codes[i], scale));
    }
  });
}

}  // namespace
}  // namespace deep_ep::host
