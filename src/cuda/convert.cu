// SPDX-License-Identifier: MIT
#include "cuda/convert.h"

#include <algorithm>

#include "cuda/failure.h"
#include "cuda/own_stream.h"
#include "plan/fp8.h"
#include "plan/number.h"

namespace deep_ep::cuda {

namespace {

constexpr unsigned kThreads = 256;

dim3 grid_for(std::int64_t elements) {
  constexpr std::int64_t kMost = 64;  // leaves the rest of the GPU to other ranks
  return dim3(static_cast<unsigned>(std::clamp<std::int64_t>((elements + kThreads - 1) / kThreads, 1, kMost)));
}

__global__ void pack(PackRows p) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < p.rows * p.width;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t row = i / p.width, column = i % p.width;
    const float value = column < p.columns ? p.from[row * p.columns + column] : 0.0f;
    if (p.to.dtype == DType::kBf16) {
      static_cast<std::uint16_t*>(p.to.data)[i] = plan::to_bf16(value);
    } else {
      static_cast<float*>(p.to.data)[i] = value;
    }
  }
}

__device__ float element(const UnpackRows& p, std::int64_t row, std::int64_t column) {
  const std::int64_t at = row * p.from.strides[0] + column;
  switch (p.from.dtype) {
    case DType::kBf16: return plan::from_bf16(static_cast<const std::uint16_t*>(p.from.data)[at]);
    case DType::kFp8E4m3: {
      const auto* scales = static_cast<const float*>(p.scales.data);
      const float scale = scales[row * p.scales.strides[0] + column / plan::kFp8Group * p.scales.strides[1]];
      return plan::mul_rn(plan::from_e4m3(static_cast<const std::uint8_t*>(p.from.data)[at]), scale);
    }
    case DType::kFp32:
    case DType::kFp16:
    case DType::kU8:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: break;
  }
  return static_cast<const float*>(p.from.data)[at];
}

__global__ void unpack(UnpackRows p) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < p.rows * p.columns;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t row = i / p.columns, source = row / p.rows_per_source;
    const std::int32_t first = p.first_arrival[source];
    const bool came = first < p.first_arrival[source + 1];
    p.to[i] = came ? element(p, first + row % p.rows_per_source, i % p.columns) : 0.0f;
  }
}

}  // namespace

void pack_rows(const PackRows& p) {
  const OwnStream stream(StreamUse::kShort);
  pack<<<grid_for(p.rows * p.width), kThreads, 0, stream.get()>>>(p);
  stream.wait("pack_rows");
}

void unpack_rows(const UnpackRows& p) {
  const OwnStream stream(StreamUse::kShort);
  unpack<<<grid_for(p.rows * p.columns), kThreads, 0, stream.get()>>>(p);
  stream.wait("unpack_rows");
}

void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const OwnStream stream(StreamUse::kShort);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream.get()), "cudaMemcpyAsync");
  stream.wait("cudaMemcpyAsync");
}

}  // namespace deep_ep::cuda
