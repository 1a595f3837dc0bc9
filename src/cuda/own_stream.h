// SPDX-License-Identifier: MIT
// A stream for one short piece of work: unlike the default stream it waits for no kernel of another rank.
#pragma once

#include <cuda_runtime.h>

#include "cuda/failure.h"

namespace deep_ep::cuda {

class OwnStream {
 public:
  OwnStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }
  void wait(const char* what) const {
    check(cudaGetLastError(), what);
    check(cudaStreamSynchronize(stream_), what);
  }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace deep_ep::cuda
