// SPDX-License-Identifier: MIT
// Ranks as threads with the GPUs of this machine in turn, and tensors that go there and back. Everything here is
// skipped, with the reason, where there is no GPU.
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

#include "device.h"
#include "ranks.h"

namespace deep_ep::test {

#define EP_NEEDS_GPU() \
  if (!::deep_ep::test::device::obstacle().empty()) GTEST_SKIP() << ::deep_ep::test::device::obstacle()

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
        device::use_for(rank);
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

/// On the calling thread's GPU.
inline Options on_gpu(int sms = 0) {
  Options options;
  options.backend = BackendKind::kCuda;
  options.num_workers = sms;
  return options;
}

/// Bytes of a tensor whose strides leave no holes, wherever it lies.
inline std::vector<std::byte> bytes_of(const TensorView& tensor) {
  std::vector<std::byte> bytes(tensor.bytes());
  if (!bytes.empty()) device::copy(bytes.data(), tensor.data, bytes.size());
  return bytes;
}

/// A copy in device memory with the same shape and strides.
inline Tensor to_gpu(const TensorView& tensor) {
  if (!tensor.given()) return {};
  auto memory = device::allocate(tensor.bytes());
  if (tensor.bytes() > 0) device::copy(memory.get(), tensor.data, tensor.bytes());
  TensorView view = tensor;
  view.data = memory.get();
  return Tensor(view, std::move(memory));
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

/// What a call throws, and its text; ErrorCode{} where it throws nothing.
inline ErrorCode code_of(const std::function<void()>& call, std::string* text = nullptr) {
  try {
    call();
  } catch (const Error& error) {
    if (text != nullptr) *text = error.what();
    return error.code();
  }
  return ErrorCode{};
}

}  // namespace deep_ep::test
