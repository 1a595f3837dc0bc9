// SPDX-License-Identifier: MIT
#include "device.h"

#include <stdexcept>

#ifdef EP_TEST_CUDA
#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "plan/arena.h"
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

// What tests need of one GPU, taken before any rank waits for another, and kept to the end of the process.
struct Supply {
  cudaStream_t stream = nullptr;
  std::shared_ptr<plan::Arena> memory;
};

Supply make_supply(int device) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  const int before = current();
  gpu(cudaSetDevice(device), "cudaSetDevice");
  Supply made;
  int least = 0, greatest = 0;
  gpu(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  // Another priority, another queue: in one with a rank's kernels a copy may stand behind those that wait for its
  // owner.
  gpu(cudaStreamCreateWithPriority(&made.stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  void* all = nullptr;
  gpu(cudaMalloc(&all, kBytes), "cudaMalloc");
  gpu(cudaSetDevice(before), "cudaSetDevice");
  made.memory =
      std::make_shared<plan::Arena>(std::shared_ptr<void>(all, [](void*) {}), static_cast<std::byte*>(all), 0, kBytes);
  return made;
}

const Supply& supply_of(int device) {
  static std::mutex mutex;
  static std::array<Supply, 64> supplies = {};
  const std::lock_guard lock(mutex);
  Supply& supply = supplies.at(static_cast<std::size_t>(device));
  if (supply.stream == nullptr) supply = make_supply(device);
  return supply;
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
  supply_of(of_rank(rank));
}

bool holds(const void* data) { return device_of(data) >= 0; }

void copy(void* to, const void* from, std::size_t bytes) {
  const int there = device_of(to) >= 0 ? device_of(to) : device_of(from);
  const cudaStream_t stream = supply_of(there >= 0 ? there : current()).stream;
  gpu(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
  gpu(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

std::shared_ptr<void> allocate(std::size_t bytes) {
  auto block = supply_of(current()).memory->allocate(bytes + 16, true);
  if (!block.owner) throw std::runtime_error("the tests' own memory on a GPU is used up");
  return block.owner;
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
