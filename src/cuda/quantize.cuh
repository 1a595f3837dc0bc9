// SPDX-License-Identifier: MIT
// A warp turns channels into FP8 codes and scales, by the rule of plan/fp8.h and bit for bit. It works in passes of 512
// channels: eight lanes share a group of 128, and a lane has sixteen of them in a row, whose codes it stores at once.
#pragma once

#include <type_traits>

#include "cuda/encode.cuh"

namespace deep_ep::cuda {

namespace {  // for each kernel file its own, as the kernels that it compiles for them

/// Rows as a kernel is compiled for them: they travel as they are, or are quantised from this type.
enum class Rows { kAsTheyAre, kBf16, kFp16, kFp32 };

template <Rows kRows>
using RowsConstant = std::integral_constant<Rows, kRows>;

/// kernel_of(RowsConstant<the rows of a call>()).
template <typename KernelOf>
const void* for_rows(bool quantize, DType dtype, const KernelOf& kernel_of) {
  if (!quantize) return kernel_of(RowsConstant<Rows::kAsTheyAre>());
  if (dtype == DType::kBf16) return kernel_of(RowsConstant<Rows::kBf16>());
  if (dtype == DType::kFp16) return kernel_of(RowsConstant<Rows::kFp16>());
  return kernel_of(RowsConstant<Rows::kFp32>());
}

}  // namespace

inline constexpr int kPassChannels = 512;
inline constexpr int kGroupsOfPass = kPassChannels / plan::kFp8Group;
inline constexpr int kLanesOfGroup = 32 / kGroupsOfPass;
inline constexpr int kLaneChannels = kPassChannels / 32;

/// A lane's first channel in each pass.
__device__ inline int channel_of_lane(int lane) { return lane * kLaneChannels; }

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

/// A lane's codes of one pass: of eight channels each, `first` being of those after the other eight if `swapped` is 1,
/// not 0.
struct Codes {
  uint2 first, second;
  int swapped;
  __device__ uint4 whole() const {
    return {swapped ? second.x : first.x, swapped ? second.y : first.y, swapped ? first.x : second.x,
            swapped ? first.y : second.y};
  }
  /// Into shared memory. Two stores, which need not be brought into order before.
  __device__ void stage(std::byte* at) const {
    *reinterpret_cast<uint2*>(at + 8 * swapped) = first;
    *reinterpret_cast<uint2*>(at + 8 - 8 * swapped) = second;
  }
};

/// The channels of a batch of passes that one lane holds.
template <class Number, int kPasses>
class Batch {
 public:
  static constexpr int kChannels = kPasses * kPassChannels;

  /// `piece`: the batch's first channel; zeros from its channel `left` on. Nearly all batches are whole: their loads
  /// and stores must not each stand in a branch of its own.
  __device__ void load(const std::byte* piece, int left, int lane) {
    const std::byte* const at = piece + channel_of_lane(lane) * Number::kBytes;
    swapped_ = (lane / 4 ^ lane / 8) & 1;
    if (left >= kChannels) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) load_pass(at, pass);
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        x_[pass][0] = x_[pass][1] = {};
        if (in_row(pass, left, lane)) load_pass(at, pass);
      }
    }
  }

  /// The largest magnitude of one group as a float's bits: of the lane's own, in the pass that it answers for. NaN
  /// counts as the largest.
  __device__ std::uint32_t peak(int lane) const {
    std::uint32_t words[kWords] = {};
#pragma unroll
    for (int i = 0; i < kPasses; i += 2) {
      // Where there is no second pass the first stands for it: nobody asks, and nothing is computed.
      Number::peak(x_[i], x_[i + 1 < kPasses ? i + 1 : i], words + i / 2 * Number::kWordsOfPair);
    }
    // Each step halves either the words, of which a lane keeps those that it answers for, or nothing.
    int left = kWords;
#pragma unroll
    for (int lanes = kLanesOfGroup / 2; lanes > 0; lanes /= 2) {
      const bool upper = (lane & lanes) != 0;
      if (left == 1) {
        words[0] = Number::larger_peak(words[0], __shfl_xor_sync(kAllLanes, words[0], lanes));
      } else {
        left /= 2;
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i) {
          if (i >= left) continue;
          const std::uint32_t given = upper ? words[i] : words[i + left], kept = upper ? words[i + left] : words[i];
          words[i] = Number::larger_peak(kept, __shfl_xor_sync(kAllLanes, given, lanes));
        }
      }
    }
    return Number::peak_bits(words[0], lane % 2 != 0);
  }
  /// Lanes of a group answer for passes in turn; where there are more lanes than passes, several for one.
  __device__ static int pass_of_lane(int lane) { return lane % kLanesOfGroup / kLanesOfPass; }
  __device__ static bool answers(int lane) { return lane % kLanesOfPass == 0 && pass_of_lane(lane) < kPasses; }

  /// put(pass, codes) for each pass. `factor`: of the lane's own group, in the pass that it answers for.
  template <class Put>
  __device__ void encode(float factor, const Put& put) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const float of_pass = __shfl_sync(kAllLanes, factor, pass * kLanesOfPass, kLanesOfGroup);
      put(pass, Codes{codes_of(x_[pass][0], of_pass), codes_of(x_[pass][1], of_pass), swapped_});
    }
  }
  /// Whether the row, of which `left` channels are left where the batch begins, has the lane's channels of a pass.
  __device__ static bool in_row(int pass, int left, int lane) {
    return pass * kPassChannels + channel_of_lane(lane) < left;
  }

 private:
  // Words that hold the peaks of a power of two of passes.
  static constexpr int kPassesHeld = kPasses <= 2 ? 2 : kPasses <= 4 ? 4 : 8;
  static constexpr int kWords = kPassesHeld / 2 * Number::kWordsOfPair;
  static constexpr int kLanesOfPass = kLanesOfGroup / kPassesHeld;
  static_assert(kPasses <= kLanesOfGroup);
  // Where two passes share a word, a lane's parity says which of them it answers for.
  static_assert(Number::kWordsOfPair > 1 || kLanesOfPass == 1);

  // Half of the lanes load their two halves the other way round: so each load of a warp meets all banks of shared
  // memory alike, four lanes after four, and each store of eight codes, eight lanes after eight.
  __device__ void load_pass(const std::byte* at, int pass) {
    constexpr int kHalf = kLaneChannels / 2 * Number::kBytes;
    at += pass * kPassChannels * Number::kBytes;
    Number::load(at + kHalf * swapped_, x_[pass][0]);
    Number::load(at + kHalf - kHalf * swapped_, x_[pass][1]);
  }
  __device__ static uint2 codes_of(const typename Number::Eight& eight, float factor) {
    float x[8];
    Number::widen_finite(eight, x);
    return {quick_codes(x, factor), quick_codes(x + 4, factor)};
  }

  typename Number::Eight x_[kPasses][2];
  int swapped_;
};

/// A lane's codes of one pass by the rule itself, for whatever it may hold.
template <class Number>
__device__ uint4 encode_any_pass(const std::byte* at, bool in_row, plan::Fp8Scale kind, float* scale) {
  float x[2][8];
  std::int32_t largest = 0;
  for (int half = 0; half < 2; ++half) {
    typename Number::Eight v{};
    if (in_row) Number::load(at + half * 8 * Number::kBytes, v);
    Number::widen_any(v, x[half]);
    for (float value : x[half]) largest = max(largest, plan::fp8_magnitude(value));
  }
  for (int lanes = 1; lanes < kLanesOfGroup; lanes *= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  const plan::Fp8Scaling scaling = plan::fp8_scaling(largest, kind);
  *scale = scaling.scale;
  std::uint32_t codes[4] = {};
  for (int i = 0; i < kLaneChannels; ++i)
    codes[i / 4] |= std::uint32_t{plan::fp8_encode(x[i / 8][i % 8], scaling.factor)} << (8 * (i % 4));
  return {codes[0], codes[1], codes[2], codes[3]};
}

}  // namespace deep_ep::cuda
