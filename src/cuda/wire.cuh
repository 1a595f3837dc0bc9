// SPDX-License-Identifier: MIT
// Wire formats of low-latency combine on the device: a lane has sixteen bytes of a row, eight channels in the encoded
// ones, and sixteen lanes share a block of 128. The numbers are those of plan/logfmt.h and plan/fp8.h, bit for bit;
// where the parts of an encoded row lie says plan/wire.h.
#pragma once

#include "cuda/encode.cuh"
#include "cuda/low_latency.cuh"
#include "plan/wire.h"

namespace deep_ep::cuda {

// Each format: Raw, what crosses of a lane's sixteen bytes; load, and decode to sixteen bytes of the row's type. Those
// that encode: encode (all lanes; zeros beyond the row) and store. `byte`: the lane's first in the row itself.

struct AsIs {
  static constexpr bool kEncodes = false;
  using Raw = uint4;
  __device__ static Raw load(const plan::EncodedRow&, const std::byte* slot, std::int64_t byte) {
    return load16(slot + byte);
  }
  template <class Number>
  __device__ static uint4 decode(const Raw& v) {
    return v;
  }
};

inline constexpr int kLanesOfBlock = plan::kLogBlock / plan::kLogUnit;

/// Reads past the first-level cache, where an earlier operation's bytes may still be.
template <typename T>
__device__ __forceinline__ T load_arrived(const std::byte* at) {
  return __ldcg(reinterpret_cast<const T*>(at));
}

template <class Number>
__device__ __forceinline__ uint4 narrow_eight(const float (&x)[2][4]) {
  uint4 v;
  Number::narrow_all(x, *reinterpret_cast<typename Number::Four(*)[2]>(&v));
  return v;
}

struct LogFmt {
  static constexpr bool kEncodes = true;
  struct Raw {
    uint2 low;
    std::uint32_t high, word;
  };

  __device__ static Raw load(const plan::EncodedRow& at, const std::byte* slot, std::int64_t byte) {
    const std::int64_t channel = byte / 2;
    return {load_arrived<uint2>(slot + channel), load_arrived<std::uint16_t>(slot + at.high_at + channel / 4),
            load_arrived<std::uint32_t>(slot + at.words_at + channel / plan::kLogBlock * 4)};
  }
  template <class Number>
  __device__ static uint4 decode(const Raw& raw) {
    const plan::LogScale scale = plan::LogScale::from(raw.word);
    float x[2][4];
#pragma unroll
    for (int i = 0; i < plan::kLogUnit; ++i) {
      const std::uint32_t low = (i < 4 ? raw.low.x : raw.low.y) >> (8 * (i % 4)) & 0xff;
      const std::uint32_t ninth = raw.high >> (8 + i) << 8 & 0x100;
      const float magnitude = plan::log_decode(static_cast<std::int32_t>(low | ninth), scale);
      x[i / 4][i % 4] = __uint_as_float(__float_as_uint(magnitude) | raw.high << (31 - i) & 0x80000000u);
    }
    return narrow_eight<Number>(x);
  }
  template <class Number>
  __device__ static Raw encode(const uint4& v) {
    float x[plan::kLogUnit];
    Number::widen_any(v, x);
    plan::LogExtremes block = plan::LogExtremes::none();
#pragma unroll
    for (float value : x) block.add(value);
#pragma unroll
    for (int lanes = 1; lanes < kLanesOfBlock; lanes *= 2) {
      block.largest = max(block.largest, __shfl_xor_sync(kAllLanes, block.largest, lanes));
      block.smallest_less_1 = min(block.smallest_less_1, __shfl_xor_sync(kAllLanes, block.smallest_less_1, lanes));
    }
    const plan::LogScale scale = plan::LogScale::of(block);
    const float factor = scale.factor();
    Raw raw{{0, 0}, 0, scale.word()};
#pragma unroll
    for (int i = 0; i < plan::kLogUnit; ++i) {
      const auto code = static_cast<std::uint32_t>(plan::log_encode(x[i], scale, factor));
      (i < 4 ? raw.low.x : raw.low.y) |= (code & 0xff) << (8 * (i % 4));
      raw.high |= __float_as_uint(x[i]) >> 31 << i | code >> 8 << (8 + i);
    }
    return raw;
  }
  __device__ static void store(const plan::EncodedRow& at, std::byte* slot, std::int64_t byte, const Raw& raw,
                               int lane) {
    const std::int64_t channel = byte / 2;
    *reinterpret_cast<uint2*>(slot + channel) = raw.low;
    *reinterpret_cast<std::uint16_t*>(slot + at.high_at + channel / 4) = static_cast<std::uint16_t>(raw.high);
    if (lane % kLanesOfBlock == 0)
      *reinterpret_cast<std::uint32_t*>(slot + at.words_at + channel / plan::kLogBlock * 4) = raw.word;
  }
};

struct Fp8 {
  static constexpr bool kEncodes = true;
  struct Raw {
    uint2 codes;
    float scale;
  };

  __device__ static Raw load(const plan::EncodedRow& at, const std::byte* slot, std::int64_t byte) {
    const std::int64_t channel = byte / 2;
    return {load_arrived<uint2>(slot + channel),
            load_arrived<float>(slot + at.words_at + channel / plan::kFp8Group * 4)};
  }
  template <class Number>
  __device__ static uint4 decode(const Raw& raw) {
    float x[2][4];
    decode4(raw.codes.x, raw.scale, x[0]);
    decode4(raw.codes.y, raw.scale, x[1]);
    return narrow_eight<Number>(x);
  }
  template <class Number>
  __device__ static Raw encode(const uint4& v) {
    float x[8];
    Number::widen_any(v, x);
    std::int32_t largest = 0;
    bool plain = true;
#pragma unroll
    for (float value : x) {
      largest = max(largest, plan::fp8_magnitude(value));
      plain = plain && (plan::bits_of(value) & plan::kFloatMagnitude) < plan::kFloatInfBits;
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanesOfBlock; lanes *= 2)
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    const plan::Fp8Scaling scaling = plan::fp8_scaling(largest, plan::Fp8Scale::kExact);
    const float low[4] = {x[0], x[1], x[2], x[3]}, high[4] = {x[4], x[5], x[6], x[7]};
    return {{encode4(low, scaling.factor, plain), encode4(high, scaling.factor, plain)}, scaling.scale};
  }
  __device__ static void store(const plan::EncodedRow& at, std::byte* slot, std::int64_t byte, const Raw& raw,
                               int lane) {
    const std::int64_t channel = byte / 2;
    *reinterpret_cast<uint2*>(slot + channel) = raw.codes;
    if (lane % kLanesOfBlock == 0)
      *reinterpret_cast<float*>(slot + at.words_at + channel / plan::kFp8Group * 4) = raw.scale;
  }
};

}  // namespace deep_ep::cuda
