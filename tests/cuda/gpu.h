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

#include "deep_ep/buffer.h"

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

/// One thread per rank with an open buffer; the first exception of any rank is thrown here.
inline void run_ranks(int num_ranks, const Config& config, const Options& options,
                      const std::function<void(Buffer&)>& body) {
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

inline Config small_config() {
  Config config;
  config.arena_bytes = std::size_t{64} << 20;
  config.timeout = std::chrono::milliseconds(10000);
  return config;
}

/// Bytes of a tensor whose strides leave no holes, wherever it lies.
inline std::vector<std::byte> bytes_of(const TensorView& tensor) {
  std::vector<std::byte> bytes(tensor.bytes());
  if (!bytes.empty()) gpu(cudaMemcpy(bytes.data(), tensor.data, bytes.size(), cudaMemcpyDefault));
  return bytes;
}

/// A copy in device memory with the same shape and strides.
inline Tensor to_gpu(const TensorView& tensor) {
  if (!tensor.given()) return {};
  void* memory = nullptr;
  gpu(cudaMalloc(&memory, tensor.bytes() + 16));
  if (tensor.bytes() > 0) gpu(cudaMemcpy(memory, tensor.data, tensor.bytes(), cudaMemcpyHostToDevice));
  Tensor copy(tensor, std::shared_ptr<void>(memory, [](void* p) { cudaFree(p); }));
  copy.data = memory;
  return copy;
}

}  // namespace deep_ep::test
