// SPDX-License-Identifier: MIT
#include "device.h"

#include <stdexcept>

#ifdef EP_TEST_CUDA
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#endif

namespace deep_ep::test::device {

#ifdef EP_TEST_CUDA

namespace {

void gpu(cudaError_t code, const char* call) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code));
}

int count() {
  static const int gpus = [] {
    int found = 0;
    gpu(cudaGetDeviceCount(&found), "cudaGetDeviceCount");
    return found;
  }();
  return gpus;
}

int current() {
  int device = 0;
  gpu(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

cudaStream_t make_stream(int device) {
  cudaStream_t made = nullptr;
  gpu(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaMemPool_t pool = nullptr;
  gpu(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
  // All that tests need is taken now, and kept: a pool that grows later may wait for kernels too.
  std::uint64_t keep = UINT64_MAX;
  gpu(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
  void* all = nullptr;
  gpu(cudaMallocAsync(&all, std::size_t{1} << 30, made), "cudaMallocAsync");
  gpu(cudaFreeAsync(all, made), "cudaFreeAsync");
  gpu(cudaStreamSynchronize(made), "cudaStreamSynchronize");
  return made;
}

cudaStream_t stream_of(int device) {
  static std::mutex mutex;
  static std::array<cudaStream_t, 64> streams = {};
  const std::lock_guard lock(mutex);
  cudaStream_t& stream = streams.at(static_cast<std::size_t>(device));
  if (stream == nullptr) {
    const int before = current();
    gpu(cudaSetDevice(device), "cudaSetDevice");
    stream = make_stream(device);
    gpu(cudaSetDevice(before), "cudaSetDevice");
  }
  return stream;
}

// -1: not a GPU's.
int device_of(const void* data) {
  cudaPointerAttributes attributes{};
  const bool known = data != nullptr && cudaPointerGetAttributes(&attributes, data) == cudaSuccess;
  return known && attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
}

}  // namespace

std::string obstacle() {
  int found = 0;
  const cudaError_t code = cudaGetDeviceCount(&found);
  if (code == cudaSuccess && found > 0) return "";
  return std::string("this machine has no CUDA device: ") + cudaGetErrorString(code);
}

int of_rank(int rank) { return rank % count(); }

void use_for(int rank) {
  gpu(cudaSetDevice(of_rank(rank)), "cudaSetDevice");
  stream_of(of_rank(rank));
}

bool holds(const void* data) { return device_of(data) >= 0; }

void copy(void* to, const void* from, std::size_t bytes) {
  const int there = device_of(to) >= 0 ? device_of(to) : device_of(from);
  const cudaStream_t stream = stream_of(there >= 0 ? there : current());
  gpu(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
  gpu(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

std::shared_ptr<void> allocate(std::size_t bytes) {
  const cudaStream_t stream = stream_of(current());
  void* memory = nullptr;
  gpu(cudaMallocAsync(&memory, bytes + 16, stream), "cudaMallocAsync");
  gpu(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return {memory, [stream](void* p) { cudaFreeAsync(p, stream); }};
}

#else

namespace {
[[noreturn]] void no_cuda() { throw std::runtime_error(obstacle()); }
}  // namespace

std::string obstacle() { return "these tests were built without CUDA (DEEP_EP_CUDA=OFF)"; }
int of_rank(int) { no_cuda(); }
void use_for(int) { no_cuda(); }
bool holds(const void*) { return false; }
void copy(void*, const void*, std::size_t) { no_cuda(); }
std::shared_ptr<void> allocate(std::size_t) { no_cuda(); }

#endif

}  // namespace deep_ep::test::device
