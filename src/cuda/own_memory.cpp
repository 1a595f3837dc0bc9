// SPDX-License-Identifier: MIT
#include "cuda/own_memory.h"

#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>

#include "cuda/failure.h"

namespace deep_ep::cuda {

namespace {

// Never destroyed: buffers may be closed after all static objects are gone.
struct PinnedPool {
  std::mutex mutex;
  std::multimap<std::size_t, void*> free;  // by bytes

  void* take(std::size_t bytes) {
    std::lock_guard lock(mutex);
    const auto found = free.find(bytes);
    if (found == free.end()) return nullptr;
    void* memory = found->second;
    free.erase(found);
    return memory;
  }
  void give(std::size_t bytes, void* memory) {
    std::lock_guard lock(mutex);
    free.emplace(bytes, memory);
  }
};

PinnedPool& pinned_pool() {
  static auto* pool = new PinnedPool;
  return *pool;
}

}  // namespace

std::shared_ptr<std::byte> own_device_memory(int device, Sharing sharing, std::size_t bytes) {
  auto window = Window::create({device, sharing, bytes, bytes});  // of which nobody is told
  std::byte* const base = window->base();
  return {std::move(window), base};
}

std::shared_ptr<std::byte> own_pinned_memory(std::size_t bytes) {
  void* memory = pinned_pool().take(bytes);
  if (memory == nullptr)
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(memory, 0, bytes);
  return {static_cast<std::byte*>(memory), [bytes](std::byte* p) { pinned_pool().give(bytes, p); }};
}

}  // namespace deep_ep::cuda
