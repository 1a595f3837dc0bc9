// SPDX-License-Identifier: MIT
#include "cuda/own_stream.h"

#include <map>
#include <memory>
#include <mutex>
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

// One for all who want it at a time; afterwards it goes to the pool.
std::shared_ptr<CUstream_st> shared(Kind kind) {
  static auto* const mutex = new std::mutex;
  static auto* const streams = new std::map<Kind, std::weak_ptr<CUstream_st>>;
  const std::lock_guard lock(*mutex);
  std::weak_ptr<CUstream_st>& known = (*streams)[kind];
  if (auto stream = known.lock()) return stream;
  cudaStream_t stream = take(kind);
  if (stream == nullptr) stream = make(kind.second);
  std::shared_ptr<CUstream_st> made(stream, [kind](cudaStream_t s) { pool().give(kind, s); });
  known = made;
  return made;
}

}  // namespace

OwnStream::OwnStream(StreamUse use) {
  Kind kind{0, use};
  check(cudaGetDevice(&kind.first), "cudaGetDevice");
  if (use == StreamUse::kShort) {
    stream_ = shared(kind);
    return;
  }
  cudaStream_t stream = take(kind);
  if (stream == nullptr) stream = make(use);
  stream_ = {stream, [kind](cudaStream_t s) { pool().give(kind, s); }};
}

}  // namespace deep_ep::cuda
