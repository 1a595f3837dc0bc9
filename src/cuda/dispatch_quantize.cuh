// SPDX-License-Identifier: MIT
// Dispatch: where quantised rows and their scales are stored.
#pragma once

#include "cuda/dispatch_routes.cuh"
#include "cuda/quantize.cuh"

namespace deep_ep::cuda {
namespace {  // a part of the kernels whose files include it

// Where a row is written.
struct Target {
  std::byte* row;        // null: nowhere
  std::int32_t* scales;  // of the row; quantised rows only
  std::int64_t scale_stride;
};

// The stored words of a batch's scales: of passes first_pass .. + passes, the lane holding the scale of its group in
// the pass that it answers for. The exponents of a pass's four groups share a word.
struct ScaleWord {
  std::int32_t word;
  int at;     // among the row's
  bool mine;  // this lane stores it
};

__device__ ScaleWord scale_word(const DispatchParams& p, float scale, int pass, bool answers, int lane) {
  const int in_pass = lane / kLanesOfGroup;
  const int group = pass * kGroupsOfPass + in_pass;
  const bool mine = answers && group < static_cast<int>(plan::num_fp8_groups(p.hidden));
  if (p.scale_kind != plan::Fp8Scale::kUe8m0) return {__float_as_int(scale), group, mine};
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
        scale_word(p, of_group, (batch.first + at) / kPassChannels, lane % kLanesOfGroup == 0, lane);
    for (int i = 0; i < num_targets; ++i) {
      const Target to = targets[i];
      if (scale.mine) to.scales[scale.at * to.scale_stride] = scale.word;
      if (channel < left) ptx::store_streaming(to.row + batch.first + channel, codes);
    }
  }
}

}  // namespace
}  // namespace deep_ep::cuda
