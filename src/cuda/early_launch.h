// SPDX-License-Identifier: MIT
// Launching a kernel that may begin while the kernel before it ends, and waits for that end itself: its first step is
// ptx::await_kernel_before(). What a launch takes passes meanwhile.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace deep_ep::cuda {

/// Whether a kernel is compiled for GPUs that have ptx::await_kernel_before().
inline bool can_begin_early(const void* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.binaryVersion >= 90 &&
         attributes.ptxVersion >= 90;
}

/// All kernels are compiled for the same GPUs: the first that is asked about speaks for all.
inline void launch_early(const void* kernel, dim3 blocks, dim3 threads, void** arguments, std::size_t shared,
                         cudaStream_t stream) {
  static const bool early = can_begin_early(kernel);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace deep_ep::cuda
