// SPDX-License-Identifier: MIT
// Copies between ordinary memory and a GPU's. Stream-ordered, on a stream of our own: cudaMalloc, cudaFree and the
// default stream would wait for kernels of other ranks, which may wait for this one.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef EP_TEST_CUDA
#include <cuda_runtime.h>
#endif

namespace deep_ep::test {

Backend backend_under_test() {
  static const Backend backend = [] {
    const char* wanted = std::getenv("EP_TEST_BACKEND");
    if (wanted == nullptr || std::string(wanted) == "host") return Backend::kHost;
    if (std::string(wanted) == "cuda") return Backend::kCuda;
    throw std::runtime_error(std::string("EP_TEST_BACKEND is '") + wanted + "', but must be host or cuda");
  }();
  return backend;
}

std::string name(Backend backend) {
  switch (backend) {
    case Backend::kHost: return "host";
    case Backend::kCuda: return "cuda";
  }
  return "?";
}

namespace {

// From the first element to the last, holes between strides included.
std::size_t extent(const TensorView& tensor) {
  if (tensor.numel() == 0) return 0;
  std::int64_t last = 0;
  for (int d = 0; d < tensor.ndim; ++d) last += (tensor.shape[d] - 1) * tensor.strides[d];
  return static_cast<std::size_t>(last + 1) * item_bytes(tensor.dtype);
}

#ifdef EP_TEST_CUDA

void gpu(cudaError_t code, const char* call) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code));
}

cudaStream_t copies() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    gpu(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaMemPool_t pool = nullptr;
    gpu(cudaDeviceGetDefaultMemPool(&pool, 0), "cudaDeviceGetDefaultMemPool");
    // All that tests need is taken now, and kept: a pool that grows later may wait for kernels too.
    std::uint64_t keep = UINT64_MAX;
    gpu(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
    void* all = nullptr;
    gpu(cudaMallocAsync(&all, std::size_t{1} << 30, made), "cudaMallocAsync");
    gpu(cudaFreeAsync(all, made), "cudaFreeAsync");
    gpu(cudaStreamSynchronize(made), "cudaStreamSynchronize");
    return made;
  }();
  return stream;
}

bool in_device_memory(const void* data) {
  cudaPointerAttributes attributes{};
  return data != nullptr && cudaPointerGetAttributes(&attributes, data) == cudaSuccess &&
         attributes.type == cudaMemoryTypeDevice;
}

void copy(void* to, const void* from, std::size_t bytes) {
  gpu(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, copies()), "cudaMemcpyAsync");
  gpu(cudaStreamSynchronize(copies()), "cudaStreamSynchronize");
}

std::shared_ptr<void> device_memory(std::size_t bytes) {
  void* memory = nullptr;
  gpu(cudaMallocAsync(&memory, bytes + 16, copies()), "cudaMallocAsync");
  gpu(cudaStreamSynchronize(copies()), "cudaStreamSynchronize");
  return {memory, [](void* p) { cudaFreeAsync(p, copies()); }};
}

#else

[[noreturn]] void no_cuda() { throw std::runtime_error("these tests were built without CUDA"); }
bool in_device_memory(const void*) { return false; }
void copy(void*, const void*, std::size_t) { no_cuda(); }
std::shared_ptr<void> device_memory(std::size_t) { no_cuda(); }

#endif

}  // namespace

std::string obstacle() {
  if (!on_cuda()) return "";
#ifdef EP_TEST_CUDA
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && count > 0) return "";
  return std::string("this machine has no CUDA device: ") + cudaGetErrorString(code);
#else
  return "these tests were built without CUDA (DEEP_EP_CUDA=OFF)";
#endif
}

void prepare_copies() {
#ifdef EP_TEST_CUDA
  if (on_cuda()) copies();
#endif
}

Tensor to_host(const TensorView& tensor) {
  if (!on_cuda() || !in_device_memory(tensor.data)) return Tensor(tensor, nullptr);
  const std::size_t bytes = extent(tensor);
  Tensor copied = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(bytes)});
  if (bytes > 0) copy(copied.data, tensor.data, bytes);
  TensorView view = tensor;
  view.data = copied.data;
  return Tensor(view, copied.owner);
}

Tensor to_host(const Tensor& tensor) {
  Tensor there = to_host(static_cast<const TensorView&>(tensor));
  if (!there.owner) there.owner = tensor.owner;
  return there;
}

Tensor to_backend(const TensorView& tensor) {
  if (!on_cuda() || !tensor.given() || in_device_memory(tensor.data)) return Tensor(tensor, nullptr);
  const std::size_t bytes = tensor.data != nullptr ? extent(tensor) : 0;
  auto memory = device_memory(bytes);
  if (bytes > 0) copy(memory.get(), tensor.data, bytes);
  TensorView view = tensor;
  view.data = memory.get();
  return Tensor(view, std::move(memory));
}

void overwrite(const TensorView& tensor, const void* bytes) {
  if (tensor.bytes() == 0) return;
  if (on_cuda()) {
    copy(tensor.data, bytes, tensor.bytes());
  } else {
    std::memcpy(tensor.data, bytes, tensor.bytes());
  }
}

Handle to_host(const Handle& handle) {
  Handle there = handle;
  for (Tensor* tensor : {&there.dst_rank, &there.dst_row, &there.dst_arrival, &there.first_arrival, &there.src_token,
                         &there.arrival_row, &there.slot_rows, &there.slot_first_row, &there.tokens_between})
    *tensor = to_host(*tensor);
  return there;
}

DispatchOutput to_host(const DispatchOutput& output) {
  DispatchOutput there = output;
  for (Tensor* tensor : {&there.x, &there.scales, &there.topk_idx, &there.topk_weights}) *tensor = to_host(*tensor);
  for (Tensor& side : there.side) side = to_host(side);
  if (there.handle) there.handle = std::make_shared<const Handle>(to_host(*there.handle));
  return there;
}

CombineOutput to_host(const CombineOutput& output) { return {to_host(output.x), to_host(output.topk_weights)}; }

}  // namespace deep_ep::test
