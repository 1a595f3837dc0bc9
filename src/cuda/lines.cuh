// SPDX-License-Identifier: MIT
// Lines (plan/lines.h) on the device: sixteen bytes that carry the number of their operation. No fence and no flag:
// whoever sees the number sees the data beside it, because both were one store. Nothing is acquired by it but the line.
#pragma once

#include "cuda/low_latency.cuh"
#include "plan/lines.h"

namespace deep_ep::cuda {

/// A lane's share of a piece of a row: `count` vectors of sixteen bytes, 512 bytes apart.
struct PieceOfRow {
  uint4 v[plan::kPieceVectors];

  /// How many of a lane's vectors lie in a row of which `left` bytes are left from the piece on.
  __device__ static int count(std::int64_t left, int lane) {
    const std::int64_t mine = left - 16 * lane;
    return mine <= 0 ? 0 : mine > 1024 ? 3 : mine > 512 ? 2 : 1;
  }
  __device__ void load(const std::byte* at, int count, int lane) {
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      v[i] = i < count ? __ldg(reinterpret_cast<const uint4*>(at + 512 * i + 16 * lane)) : uint4{};
  }
  __device__ void send(std::byte* lines, int count, std::uint32_t number, int lane) const {
    std::byte* const at = lines + 16 * lane;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (i < count) ptx::store_whole_system(at + 512 * i, {v[i].x, v[i].y, v[i].z, number});
    if (count > 0) ptx::store_whole_system(at + 512 * plan::kPieceVectors, {v[0].w, v[1].w, v[2].w, number});
  }
};

/// One of a lane's vectors, arriving.
struct VectorLines {
  uint4 line, fourth;

  __device__ void look(const std::byte* piece, int which, int lane) {
    line = ptx::load_whole_system(piece + 512 * which + 16 * lane);
    fourth = ptx::load_whole_system(piece + 512 * plan::kPieceVectors + 16 * lane);
  }
  __device__ bool came(std::uint32_t number) const { return line.w == number && fourth.w == number; }
  __device__ uint4 vector(int which) const {
    return {line.x, line.y, line.z, which == 0 ? fourth.x : which == 1 ? fourth.y : fourth.z};
  }
};

/// Words as lines: a lane brings, or gets, word number `lane` of at most 32.
__device__ inline void send_words(std::byte* lines, int words, std::uint32_t word, std::uint32_t number, int lane) {
  const int first = plan::kLineWords * lane;
  uint4 line;
  line.x = __shfl_sync(kAllLanes, word, first % 32);
  line.y = __shfl_sync(kAllLanes, word, (first + 1) % 32);
  line.z = __shfl_sync(kAllLanes, word, (first + 2) % 32);
  line.w = number;
  if (first < words) ptx::store_whole_system(lines + plan::kLineBytes * lane, line);
}

/// Looked at many times and not there: whether to give up, after a deadline or because another block has.
__device__ __noinline__ inline bool gives_up(const Now& now, bool came, int peer) {
  bool late = has_failed(now);
  if (!late && ptx::nanoseconds() > now.deadline) {
    late = true;
    if (!came) report(now, Fault::kTimeout, peer, 1, 0);
  }
  return __any_sync(kAllLanes, late) != 0;
}
inline constexpr int kLooksBetweenClocks = 64;

/// A warp gets words; false after the deadline.
__device__ inline bool await_words(const Now& now, const std::byte* lines, int words, std::uint32_t& word, int peer,
                                   int lane) {
  const bool mine = plan::kLineWords * lane < words;
  uint4 line{};
  for (int looks = 1;; ++looks) {
    if (mine) line = ptx::load_whole_system(lines + plan::kLineBytes * lane);
    const bool came = !mine || line.w == static_cast<std::uint32_t>(now.epoch);
    if (__all_sync(kAllLanes, came)) break;
    if (looks % kLooksBetweenClocks == 0 && gives_up(now, came, peer)) return false;
  }
  const int from = lane / plan::kLineWords, which = lane % plan::kLineWords;
  const std::uint32_t x = __shfl_sync(kAllLanes, line.x, from), y = __shfl_sync(kAllLanes, line.y, from),
                      z = __shfl_sync(kAllLanes, line.z, from);
  word = which == 0 ? x : which == 1 ? y : z;
  return true;
}

}  // namespace deep_ep::cuda
