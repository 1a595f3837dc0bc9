// SPDX-License-Identifier: MIT
// CUDA's error codes as deep_ep::Error. Nothing that nvcc cannot compile is included here.
#pragma once

#include <cuda_runtime.h>

#include <string_view>

#include "deep_ep/error.h"

namespace deep_ep::cuda {

/// Throws kSystem naming the call and what CUDA says, unless that is success.
void check(cudaError_t code, std::string_view call);

}  // namespace deep_ep::cuda
