// SPDX-License-Identifier: MIT
// Ranks as threads of one GPU, and tensors that go there and back. Everything here is skipped, with the reason, where
// there is no GPU.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ranks.h"

namespace deep_ep::test {

inline bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
#define EP_NEEDS_GPU() \
  if (!::deep_ep::test::has_gpu()) GTEST_SKIP() << "this machine has no CUDA device"

inline void gpu(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

/// For copies and memory of tests: the default stream, cudaMalloc and cudaFree would wait for kernels of other ranks,
/// which may wait for this one.
inline cudaStream_t test_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    gpu(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    cudaMemPool_t pool = nullptr;
    gpu(cudaDeviceGetDefaultMemPool(&pool, 0));
    // All that tests need is taken now, and kept: a pool that grows later may wait for kernels too.
    std::uint64_t keep = UINT64_MAX;
    gpu(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    void* all = nullptr;
    gpu(cudaMallocAsync(&all, std::size_t{1} << 30, made));
    gpu(cudaFreeAsync(all, made));
    gpu(cudaStreamSynchronize(made));
    return made;
  }();
  return stream;
}

/// One thread per rank with an open buffer; the first exception of any rank is thrown here.
inline void run_ranks(int num_ranks, const Config& config, const Options& options,
                      const std::function<void(Buffer&)>& body) {
  test_stream();
  auto groups = in_process_group(num_ranks);
  std::vector<std::exception_ptr> failures(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank)
    threads.emplace_back([&, rank] {
      try {
        auto buffer = Buffer::open(groups[rank], config, options);
        body(*buffer);
      } catch (...) {
        failures[rank] = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  for (auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

inline Options on_gpu(int sms = 0) {
  Options options;
  options.backend = BackendKind::kCuda;
  options.cuda_device = 0;
  options.num_workers = sms;
  return options;
}

inline void copy_now(void* to, const void* from, std::size_t bytes) {
  gpu(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, test_stream()));
  gpu(cudaStreamSynchronize(test_stream()));
}

/// Bytes of a tensor whose strides leave no holes, wherever it lies.
inline std::vector<std::byte> bytes_of(const TensorView& tensor) {
  std::vector<std::byte> bytes(tensor.bytes());
  if (!bytes.empty()) copy_now(bytes.data(), tensor.data, bytes.size());
  return bytes;
}

/// A copy in device memory with the same shape and strides.
inline Tensor to_gpu(const TensorView& tensor) {
  if (!tensor.given()) return {};
  void* memory = nullptr;
  gpu(cudaMallocAsync(&memory, tensor.bytes() + 16, test_stream()));
  if (tensor.bytes() > 0) copy_now(memory, tensor.data, tensor.bytes());
  gpu(cudaStreamSynchronize(test_stream()));
  Tensor copy(tensor, std::shared_ptr<void>(memory, [](void* p) { cudaFreeAsync(p, test_stream()); }));
  copy.data = memory;
  return copy;
}

/// One thread per rank with an open buffer on each backend.
inline void run_pairs(int num_ranks, const Config& config, const Options& options,
                      const std::function<void(Buffer& host, Buffer& device)>& body) {
  auto groups = in_process_group(num_ranks);
  Options one_worker;
  one_worker.num_workers = 1;
  run_ranks(num_ranks, config, options, [&](Buffer& device) {
    auto host = Buffer::open(groups[device.rank()], config, one_worker);
    body(*host, device);
  });
}

}  // namespace deep_ep::test
