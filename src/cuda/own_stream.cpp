// SPDX-License-Identifier: MIT
#include "cuda/own_stream.h"

#include <utility>

#include "cuda/pool.h"

namespace deep_ep::cuda {

namespace {

using Kind = std::pair<int, StreamUse>;  // GPU, use

Pool<Kind, cudaStream_t>& pool() {
  static auto* streams = new Pool<Kind, cudaStream_t>;
  return *streams;
}

// Not one that was made before the GPU was reset.
cudaStream_t take(Kind kind) {
  while (const auto stream = pool().take(kind)) {
    if (cudaStreamQuery(*stream) == cudaSuccess) return *stream;
    (void)cudaGetLastError();
  }
  return nullptr;
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
  cudaStream_t stream = take(kind);
  if (stream == nullptr) stream = make(use);
  stream_ = {stream, [kind](cudaStream_t s) { pool().give(kind, s); }};
}

}  // namespace deep_ep::cuda
