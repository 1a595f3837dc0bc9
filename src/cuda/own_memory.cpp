// SPDX-License-Identifier: MIT
#include "cuda/own_memory.h"

#include <cuda_runtime.h>

#include <cstring>

#include "cuda/failure.h"
#include "cuda/pool.h"

namespace deep_ep::cuda {

namespace {

Pool<std::size_t, void*>& pinned_pool() {  // by bytes
  static auto* pool = new Pool<std::size_t, void*>;
  return *pool;
}

}  // namespace

std::shared_ptr<std::byte> own_device_memory(int device, Sharing sharing, std::size_t bytes) {
  auto window = Window::create({device, sharing, bytes, bytes});  // of which nobody is told
  std::byte* const base = window->base();
  return {std::move(window), base};
}

std::shared_ptr<std::byte> own_pinned_memory(std::size_t bytes) {
  void* memory = pinned_pool().take(bytes).value_or(nullptr);
  if (memory == nullptr)
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(memory, 0, bytes);
  return {static_cast<std::byte*>(memory), [bytes](std::byte* p) { pinned_pool().give(bytes, p); }};
}

}  // namespace deep_ep::cuda
