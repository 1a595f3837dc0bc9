// SPDX-License-Identifier: MIT
// Streams of our own, used again and again. Where every buffer made new ones, ranks of a process that share a GPU stood
// still now and then in the first dispatch of a new buffer: one rank's first kernel did not begin while the others'
// waited for it (4 of 222 tests on an H200; none of 456 since). What was measured since: of two streams that share one
// of the GPU's 32 queues the second stands still as soon as the first has two operations there, of which the first one
// waits, as notify and dispatch do. So a process has few streams of ours: one for each rank, and one for all copies.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/failure.h"

namespace deep_ep::cuda {

enum class StreamUse {
  kExchange,  // kernels that wait for other ranks
  kShort,     // what waits for nobody: one stream for all, since a GPU has few queues
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
