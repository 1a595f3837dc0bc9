// SPDX-License-Identifier: MIT
// Set-up work in the middle of a stream capture.
#pragma once

#include <cuda_runtime.h>

namespace deep_ep::cuda {

/// Allocations, copies of set-up and questions about events are no part of a capture that the calling thread may be in.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace deep_ep::cuda
