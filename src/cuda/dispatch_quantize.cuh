// SPDX-License-Identifier: MIT
// Dispatch: where quantised rows and their scales are stored.
#pragma once

#include "cuda/dispatch_routes.cuh"
#include "cuda/quantize.cuh"

namespace deep_ep::cuda {
namespace {  // a part of the kernels whose files include it

// The stored words of a batch's scales: the lane holds the scale of its group in the pass that it answers for. The
// exponents of a pass's four groups share a word.
struct ScaleWord {
  std::int32_t word;
  unsigned at;  // among the row's
  bool mine;    // this lane stores it
};

// Where a row is written.
struct Target {
  std::byte* row;        // null: nowhere
  std::int32_t* scales;  // of the row; quantised rows only
  std::uint32_t scale_stride;
  __device__ void store_scale(const ScaleWord& scale) const {
    scales[std::uint64_t{scale.at} * scale_stride] = scale.word;
  }
};

// Which scale a lane has.
struct ScaleAt {
  int first, pass;  // the batch's first channel, in the row; the lane's pass of the batch
  int left;         // channels from the first on
  bool answers;     // for its group in that pass
};

__device__ ScaleWord scale_word(plan::Fp8Scale kind, float scale, const ScaleAt& at, int lane) {
  const int in_pass = lane / kLanesOfGroup;
  const bool mine = at.answers && at.pass * kPassChannels + in_pass * plan::kFp8Group < at.left;
  const unsigned pass = static_cast<unsigned>(at.first) / kPassChannels + at.pass;
  if (kind != plan::Fp8Scale::kUe8m0) return {__float_as_int(scale), pass * kGroupsOfPass + in_pass, mine};
  static_assert(plan::kUe8m0PerWord == kGroupsOfPass);
  std::uint32_t word = mine ? plan::ue8m0_in_word(scale, in_pass) : 0;
  for (int lanes = kLanesOfGroup; lanes < 32; lanes *= 2) word |= __shfl_xor_sync(kAllLanes, word, lanes);
  return {static_cast<std::int32_t>(word), pass, mine && in_pass == 0};
}

// Channels of a row that are quantised together.
struct Channels {
  const std::byte* x;
  int first, count;
};

// A batch that holds a NaN, an infinity or what is nearly one. Not inlined: the quick path needs the registers.
template <class Number>
__device__ __noinline__ void write_any_batch(const DispatchParams& p, const Target* targets, int num_targets,
                                             const Channels& batch, int lane) {
  const int left = static_cast<int>(p.hidden) - batch.first;
  for (int at = 0; at < batch.count && at < left; at += kPassChannels) {
    const int channel = at + channel_of_lane(lane);
    float of_group;
    const uint4 codes =
        encode_any_pass<Number>(batch.x + channel * Number::kBytes, channel < left, p.scale_kind, &of_group);
    const ScaleWord scale =
        scale_word(p.scale_kind, of_group, {batch.first + at, 0, left - at, lane % kLanesOfGroup == 0}, lane);
    for (int i = 0; i < num_targets; ++i) {
      const Target to = targets[i];
      if (scale.mine) to.store_scale(scale);
      if (channel < left) ptx::store_streaming(to.row + batch.first + channel, codes);
    }
  }
}

}  // namespace
}  // namespace deep_ep::cuda
