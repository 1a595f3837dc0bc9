// SPDX-License-Identifier: MIT
// A warp turns channels into FP8 codes and scales, by the rule of plan/fp8.h and bit for bit. It works in passes of 512
// channels: eight lanes share a group of 128, and a lane has two runs of eight channels of it, so that loads of sixteen
// bytes and stores of eight fill whole sectors. Everything stays in registers.
#pragma once

#include "cuda/encode.cuh"

namespace deep_ep::cuda {

inline constexpr int kPassChannels = 512;
inline constexpr int kGroupsOfPass = kPassChannels / plan::kFp8Group;
inline constexpr int kLanesOfGroup = 32 / kGroupsOfPass;
inline constexpr int kRunChannels = 8;
inline constexpr int kRunsApart = plan::kFp8Group / 2;  // channels between a lane's two runs

/// A lane's first channel in each pass.
__device__ inline int channel_of_lane(int lane) {
  return lane / kLanesOfGroup * plan::kFp8Group + lane % kLanesOfGroup * kRunChannels;
}

/// Codes of a lane's two runs.
struct Codes {
  uint2 run[2];
};

/// 448 / amax as division rounds it, for 1e-4 <= amax < kLargestQuick: a reciprocal refined once, a quotient corrected
/// once by its exact remainder. Compared with __fdiv_rn for every such float.
inline constexpr std::uint32_t kLargestQuick = 0x7e000000;  // 2^125
__device__ inline float quick_factor(float amax) {
  const float estimate = ptx::reciprocal(amax);
  const float reciprocal = plan::fma_rn(plan::fma_rn(-amax, estimate, 1.0f), estimate, estimate);
  const float quotient = plan::mul_rn(plan::kE4m3Max, reciprocal);
  return plan::fma_rn(plan::fma_rn(-amax, quotient, plan::kE4m3Max), reciprocal, quotient);
}

/// As plan::fp8_scaling, for a group that holds neither NaN nor infinity nor anything from kLargestQuick on.
__device__ inline plan::Fp8Scaling quick_scaling(std::int32_t largest_magnitude, plan::Fp8Scale kind) {
  if (kind != plan::Fp8Scale::kExact) return plan::fp8_scaling(largest_magnitude, kind);
  const float amax = fmaxf(__int_as_float(largest_magnitude), plan::kFp8MinAmax);
  return {plan::mul_rn(amax, 1.0f / plan::kE4m3Max), quick_factor(amax)};
}

__device__ inline std::uint32_t quick_codes(const float* x, float factor) {
#if EP_FP8_CONVERSION
  return ptx::to_e4m3x4(plan::mul_rn(x[0], factor), plan::mul_rn(x[1], factor), plan::mul_rn(x[2], factor),
                        plan::mul_rn(x[3], factor));
#else
  std::uint32_t codes = 0;
  for (int i = 0; i < 4; ++i) codes |= std::uint32_t{plan::fp8_encode(x[i], factor)} << (8 * i);
  return codes;
#endif
}

/// Where a batch of channels lies.
struct Channels {
  const std::byte* at;  // the lane's first
  int left;             // of the row from the batch's first channel on: the same for all lanes
};

/// What one lane holds of a batch of passes. Passes are taken two by two; what lies beyond the row costs nothing.
template <class Number, int kPasses>
class Batch {
 public:
  static constexpr int kChannels = kPasses * kPassChannels;
  static constexpr int kPairs = kPasses / 2;
  static_assert(kPasses % 2 == 0 && kPasses <= kLanesOfGroup);

  /// Of a lane's run, counted from the lane's first.
  __device__ static constexpr int channel(int pass, int run) { return pass * kPassChannels + run * kRunsApart; }
  __device__ static bool has_pair(int pair, int left) { return pair * 2 * kPassChannels < left; }
  /// Nearly all pairs are whole: their loads and stores must not each stand in a branch of its own.
  __device__ static bool whole_pair(int pair, int left) { return (pair + 1) * 2 * kPassChannels <= left; }
  __device__ static bool in_row(int pass, int run, int left, int lane) {
    return channel(pass, run) + channel_of_lane(lane) < left;
  }

  /// Zeros beyond the row.
  __device__ void load_pair(int pair, const Channels& from, int lane) {
    if (whole_pair(pair, from.left)) {
#pragma unroll
      for (int i = 4 * pair; i < 4 * pair + 4; ++i)
        Number::load(from.at + channel(i / 2, i % 2) * Number::kBytes, x_[i / 2][i % 2]);
    } else {
#pragma unroll
      for (int i = 4 * pair; i < 4 * pair + 4; ++i) {
        x_[i / 2][i % 2] = {};
        if (in_row(i / 2, i % 2, from.left, lane))
          Number::load(from.at + channel(i / 2, i % 2) * Number::kBytes, x_[i / 2][i % 2]);
      }
    }
  }

  /// The largest magnitude of one group as a float's bits, in lane i of the group's eight that of pass i; NaN counts as
  /// the largest.
  __device__ std::uint32_t peak(int lane) const {
    constexpr int kWords = kPairs * Number::kWordsOfPair;
    std::uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) Number::peak(x_[2 * i], x_[2 * i + 1], words + i * Number::kWordsOfPair);
#pragma unroll
    for (int lanes = 1; lanes < kLanesOfGroup; lanes *= 2)
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        words[i] = Number::larger_peak(words[i], __shfl_xor_sync(kAllLanes, words[i], lanes));
    // words[pass * kWordsOfPair / 2], bit by bit of that index: an array with a computed index would lie in memory.
    const int pass = lane % kLanesOfGroup, wanted = pass * Number::kWordsOfPair / 2;
#pragma unroll
    for (int step = 1; step < kWords; step *= 2)
#pragma unroll
      for (int i = 0; i + step < kWords; i += 2 * step) words[i] = (wanted & step) != 0 ? words[i + step] : words[i];
    return Number::peak_bits(words[0], pass % 2 != 0);
  }

  /// Codes of one pair of passes. `factor`: of the lane's own group, in lane i that of pass i.
  __device__ void encode_pair(int pair, float factor, Codes (&codes)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pass = 2 * pair + i;
      const float of_pass = __shfl_sync(kAllLanes, factor, pass, kLanesOfGroup);
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        float x[kRunChannels];
        Number::widen_eight(x_[pass][run], x);
        codes[i].run[run] = {quick_codes(x, of_pass), quick_codes(x + 4, of_pass)};
      }
    }
  }

  /// `at`: where the lane's first channel of the batch goes.
  __device__ static void store_pair(int pair, std::byte* at, const Codes (&codes)[2], int left, int lane) {
    if (whole_pair(pair, left)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::store_streaming(at + channel(2 * pair + i / 2, i % 2), codes[i / 2].run[i % 2]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (in_row(2 * pair + i / 2, i % 2, left, lane))
          ptx::store_streaming(at + channel(2 * pair + i / 2, i % 2), codes[i / 2].run[i % 2]);
    }
  }

 private:
  typename Number::Eight x_[kPasses][2];
};

/// One pass by the rule itself, for whatever it may hold; reads the row again.
template <class Number>
__device__ Codes encode_any_pass(const std::byte* at, int left, plan::Fp8Scale kind, float* scale) {
  float x[2][kRunChannels];
  std::int32_t largest = 0;
  for (int run = 0; run < 2; ++run) {
    typename Number::Eight v{};
    if (run * kRunsApart < left) Number::load(at + run * kRunsApart * Number::kBytes, v);
    Number::widen_any(v, x[run]);
    for (float value : x[run]) largest = max(largest, plan::fp8_magnitude(value));
  }
  for (int lanes = 1; lanes < kLanesOfGroup; lanes *= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  const plan::Fp8Scaling scaling = plan::fp8_scaling(largest, kind);
  *scale = scaling.scale;
  Codes codes{};
  for (int run = 0; run < 2; ++run)
    for (int i = 0; i < kRunChannels; ++i) {
      const std::uint32_t code = plan::fp8_encode(x[run][i], scaling.factor);
      (i < 4 ? codes.run[run].x : codes.run[run].y) |= code << (8 * (i % 4));
    }
  return codes;
}

}  // namespace deep_ep::cuda
