// SPDX-License-Identifier: MIT
// The driver calls that the runtime library has no form of, found at run time: nothing links against libcuda, so that
// the library loads on a machine without a GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <fmt/format.h>

#include "cuda/failure.h"

namespace deep_ep::cuda::driver {

template <typename Function>
Function* find(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess || entry == nullptr)
    throw Error(ErrorCode::kUnsupported, fmt::format("the CUDA driver has no {}: it is older than 12.0", name));
  return reinterpret_cast<Function*>(entry);
}

inline void check(CUresult code, const char* name) {
  if (code == CUDA_SUCCESS) return;
  const char* text = nullptr;
  find<decltype(cuGetErrorString)>("cuGetErrorString")(code, &text);
  throw Error(ErrorCode::kSystem, fmt::format("{}: {}", name, text != nullptr ? text : "unknown error"));
}

/// Calls a driver function and throws kSystem where it fails.
#define EP_DRIVER(function, ...) \
  ::deep_ep::cuda::driver::check(::deep_ep::cuda::driver::find<decltype(function)>(#function)(__VA_ARGS__), #function)

}  // namespace deep_ep::cuda::driver
