// SPDX-License-Identifier: MIT
#include "cuda/own_stream.h"

#include <map>
#include <mutex>
#include <utility>

namespace deep_ep::cuda {

namespace {

using Kind = std::pair<int, StreamUse>;  // GPU, use

// Never destroyed: buffers may be closed after all static objects are gone.
struct Pool {
  std::mutex mutex;
  std::multimap<Kind, cudaStream_t> free;

  cudaStream_t take(Kind kind) {
    const std::lock_guard lock(mutex);
    for (auto found = free.find(kind); found != free.end(); found = free.find(kind)) {
      const cudaStream_t stream = found->second;
      free.erase(found);
      // Not where the GPU was reset meanwhile.
      if (cudaStreamQuery(stream) == cudaSuccess) return stream;
      (void)cudaGetLastError();
    }
    return nullptr;
  }
  void give(Kind kind, cudaStream_t stream) {
    const std::lock_guard lock(mutex);
    free.emplace(kind, stream);
  }
};

Pool& pool() {
  static auto* streams = new Pool;
  return *streams;
}

cudaStream_t make(StreamUse use) {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t made = nullptr;
  check(cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, use == StreamUse::kShort ? greatest : least),
        "cudaStreamCreateWithPriority");
  return made;
}

}  // namespace

OwnStream::OwnStream(StreamUse use) {
  Kind kind{0, use};
  check(cudaGetDevice(&kind.first), "cudaGetDevice");
  cudaStream_t stream = pool().take(kind);
  if (stream == nullptr) stream = make(use);
  stream_ = {stream, [kind](cudaStream_t s) { pool().give(kind, s); }};
}

}  // namespace deep_ep::cuda
