// SPDX-License-Identifier: MIT
// Streams of our own, used again and again: which hardware queue a stream gets is decided when it is made. Two ranks of
// a process whose streams share one can stand still: a kernel that waits there for its predecessor, which waits for the
// other rank, is in front of that rank's kernel. A process that makes few streams has a queue for each
// (CUDA_DEVICE_MAX_CONNECTIONS says how many there are).
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
