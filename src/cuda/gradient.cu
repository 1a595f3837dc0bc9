// SPDX-License-Identifier: MIT
#include "cuda/gradient.h"

#include <algorithm>

#include "cuda/own_stream.h"
#include "plan/number.h"

namespace deep_ep::cuda {

namespace {

constexpr unsigned kThreads = 256;
constexpr int kLanes = 16;  // of a dot product: its order is part of the result

template <DType kType>
struct Item;
template <>
struct Item<DType::kBf16> {
  using Code = std::uint16_t;
  __device__ static float widen(Code code) { return plan::from_bf16(code); }
  __device__ static Code narrow(float x) { return plan::to_bf16(x); }
};
template <>
struct Item<DType::kFp16> {
  using Code = std::uint16_t;
  __device__ static float widen(Code code) { return plan::from_fp16(code); }
  __device__ static Code narrow(float x) { return plan::to_fp16(x); }
};
template <>
struct Item<DType::kFp32> {
  using Code = float;
  __device__ static float widen(Code code) { return code; }
  __device__ static Code narrow(float x) { return x; }
};

// Half a warp per row: lane l takes the elements l, l + 16, ...
template <class Number>
__global__ void weigh(WeighRows p) {
  using Code = typename Number::Code;
  const std::int64_t hidden = p.gradient.shape[1], num_rows = p.gradient.shape[0], there = *p.num_rows_there;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x / kLanes;
  const std::int64_t first = (blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x) / kLanes;
  const unsigned half = 0xffffu << (threadIdx.x % 32 / kLanes * kLanes);
  for (std::int64_t row = first; row < num_rows; row += step) {
    const bool came = row < there;
    const auto* gradient = static_cast<const Code*>(p.gradient.data) + row * hidden;
    const auto* values = static_cast<const Code*>(p.rows.data) + row * hidden;
    auto* out = static_cast<Code*>(p.rows_out.data) + row * hidden;
    const float weight = came ? static_cast<const float*>(p.weights.data)[row] : 0.0f;
    float sum = 0;
    for (std::int64_t i = lane; i < hidden; i += kLanes) {
      const float g = came ? Number::widen(gradient[i]) : 0.0f;
      out[i] = Number::narrow(came ? plan::fma_rn(weight, g, 0.0f) : 0.0f);
      if (came) sum = plan::fma_rn(g, Number::widen(values[i]), sum);
    }
    float dot = __shfl_sync(half, sum, 0, kLanes);
    for (int other = 1; other < kLanes; ++other) dot = plan::add_rn(dot, __shfl_sync(half, sum, other, kLanes));
    if (lane == 0) static_cast<float*>(p.dots.data)[row] = dot;
  }
}

}  // namespace

void weigh_rows(const WeighRows& p) {
  if (p.gradient.numel() == 0) return;
  constexpr std::int64_t kRowsPerBlock = kThreads / kLanes, kMostBlocks = 64;
  const auto blocks = std::min<std::int64_t>((p.gradient.shape[0] + kRowsPerBlock - 1) / kRowsPerBlock, kMostBlocks);
  const OwnStream stream(StreamUse::kShort);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (p.gradient.dtype == DType::kBf16) {
    weigh<Item<DType::kBf16>><<<grid, kThreads, 0, stream.get()>>>(p);
  } else if (p.gradient.dtype == DType::kFp16) {
    weigh<Item<DType::kFp16>><<<grid, kThreads, 0, stream.get()>>>(p);
  } else {
    weigh<Item<DType::kFp32>><<<grid, kThreads, 0, stream.get()>>>(p);
  }
  stream.wait("weigh_rows");
}

}  // namespace deep_ep::cuda
