// SPDX-License-Identifier: MIT
// Streams of our own, used again and again. Where every buffer made new ones, ranks of a process that share a GPU stood
// still now and then in the first dispatch of a new buffer: one rank's first kernel did not begin while the others'
// waited for it (4 of 222 tests on an H200; none of 456 since). Why is not known; it is not that two streams share a
// queue: with CUDA_DEVICE_MAX_CONNECTIONS=32 none of 80 streams held up another.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/failure.h"

namespace deep_ep::cuda {

enum class StreamUse {
  kExchange,  // kernels that wait for other ranks
  kShort,     // what waits for nobody: of higher priority, and so in other queues
};

/// A stream of the calling thread's GPU; unlike the default stream it waits for no other. Whoever drops it knows that
/// nothing runs there any more.
class OwnStream {
 public:
  explicit OwnStream(StreamUse use);
  cudaStream_t get() const { return stream_.get(); }
  void wait(const char* what) const {
    check(cudaGetLastError(), what);
    check(cudaStreamSynchronize(get()), what);
  }

 private:
  std::shared_ptr<CUstream_st> stream_;
};

}  // namespace deep_ep::cuda
