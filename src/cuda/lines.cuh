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

/// The same, arriving whole.
struct PieceLines {
  uint4 line[plan::kPieceVectors + 1];

  __device__ void look(const std::byte* lines, int count, int lane) {
    const std::byte* const at = lines + 16 * lane;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i)
      if (i < count) line[i] = ptx::load_whole_system(at + 512 * i);
    if (count > 0) line[plan::kPieceVectors] = ptx::load_whole_system(at + 512 * plan::kPieceVectors);
  }
  __device__ bool came(int count, std::uint32_t number) const {
    bool all = count <= 0 || line[plan::kPieceVectors].w == number;
#pragma unroll
    for (int i = 0; i < plan::kPieceVectors; ++i) all = all && (i >= count || line[i].w == number);
    return all;
  }
  __device__ uint4 vector(int i) const {
    const uint4 last = line[plan::kPieceVectors];
    return {line[i].x, line[i].y, line[i].z, i == 0 ? last.x : i == 1 ? last.y : last.z};
  }
};

/// One of a lane's vectors, arriving.
struct VectorLines {
  uint4 line, fourth;

  __device__ void look(const std::byte* at, int to_fourth) {
    line = ptx::load_whole_system(at);
    fourth = ptx::load_whole_system(at + to_fourth);
  }
  __device__ bool came(std::uint32_t number) const { return line.w == number && fourth.w == number; }
  __device__ uint4 vector(int which) const {
    return {line.x, line.y, line.z, which == 0 ? fourth.x : which == 1 ? fourth.y : fourth.z};
  }
};

/// Words as lines: a lane brings word number `lane` of at most 32.
__device__ inline void send_words(std::byte* lines, int words, std::uint32_t word, std::uint32_t number, int lane) {
  const int first = plan::kLineWords * lane;
  uint4 line;
  line.x = __shfl_sync(kAllLanes, word, first % 32);
  line.y = __shfl_sync(kAllLanes, word, (first + 1) % 32);
  line.z = __shfl_sync(kAllLanes, word, (first + 2) % 32);
  line.w = number;
  if (first < words) ptx::store_whole_system(lines + plan::kLineBytes * lane, line);
}

__device__ inline std::uint32_t word_of(uint4 line, int which) {
  return which == 0 ? line.x : which == 1 ? line.y : line.z;
}

/// One thread, which has looked many times: whether to give up, after the deadline or because another block has.
__device__ __noinline__ inline bool is_late(Now now, int peer) {
  if (has_failed(now)) return true;
  if (ptx::nanoseconds() <= now.deadline) return false;
  report(now, Fault::kTimeout, peer, 1, 0);
  return true;
}
/// A warp, of which some lanes miss something of `peer`.
__device__ __noinline__ inline bool gives_up(Now now, bool came, int peer) {
  return __any_sync(kAllLanes, !came && is_late(now, peer)) != 0;
}
inline constexpr int kLooksBetweenClocks = 64;

/// One thread waits for a line. False: in vain.
__device__ inline bool await_line(const Now& now, const std::byte* at, uint4& line, int peer) {
  const auto number = static_cast<std::uint32_t>(now.epoch);
  line = ptx::load_whole_system(at);
  for (int looks = 1; line.w != number; ++looks, line = ptx::load_whole_system(at))
    if (looks % kLooksBetweenClocks == 0 && is_late(now, peer)) return false;
  return true;
}

/// A warp, each lane for a line of its own or none. False: in vain.
__device__ inline bool await_watched(const Now& now, const std::byte* at, int peer) {
  for (int looks = 1;; ++looks) {
    const bool came = at == nullptr || ptx::load_whole_system(at).w == static_cast<std::uint32_t>(now.epoch);
    if (__all_sync(kAllLanes, came)) return true;
    if (looks % kLooksBetweenClocks == 0 && gives_up(now, came, peer)) return false;
  }
}

/// A warp: any number of words from memory as lines, and back.
__device__ inline void send_array(std::byte* lines, const std::int32_t* words, int count, std::uint32_t number,
                                  int lane) {
  for (int line = lane, first = plan::kLineWords * lane; first < count; line += 32, first += 32 * plan::kLineWords) {
    const auto word = [&](int i) { return first + i < count ? static_cast<std::uint32_t>(words[first + i]) : 0; };
    ptx::store_whole_system(lines + plan::kLineBytes * line, {word(0), word(1), word(2), number});
  }
}
template <class Write>
__device__ bool receive_array(const Now& now, const std::byte* lines, int count, int peer, int lane,
                              const Write& write) {
  bool good = true;
  for (int line = lane, first = plan::kLineWords * lane; first < count && good;
       line += 32, first += 32 * plan::kLineWords) {
    uint4 v;
    good = await_line(now, lines + plan::kLineBytes * line, v, peer);
    for (int i = 0; i < plan::kLineWords && good; ++i)
      if (first + i < count) write(first + i, static_cast<std::int32_t>(word_of(v, i)));
  }
  return __all_sync(kAllLanes, good) != 0;
}

}  // namespace deep_ep::cuda
