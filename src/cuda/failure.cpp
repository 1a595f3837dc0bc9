// SPDX-License-Identifier: MIT
#include "cuda/failure.h"

#include <fmt/format.h>

namespace deep_ep::cuda {

void check(cudaError_t code, std::string_view call) {
  if (code == cudaSuccess) return;
  throw Error(ErrorCode::kSystem, fmt::format("{}: {} ({})", call, cudaGetErrorString(code), cudaGetErrorName(code)));
}

}  // namespace deep_ep::cuda
