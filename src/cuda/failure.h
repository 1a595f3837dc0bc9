// SPDX-License-Identifier: MIT
// CUDA's error codes as deep_ep::Error.
#pragma once

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <string_view>

#include "deep_ep/error.h"

namespace deep_ep::cuda {

inline void check(cudaError_t code, std::string_view call) {
  if (code == cudaSuccess) return;
  throw Error(ErrorCode::kSystem, fmt::format("{}: {} ({})", call, cudaGetErrorString(code), cudaGetErrorName(code)));
}

}  // namespace deep_ep::cuda
