// SPDX-License-Identifier: MIT
// Device memory that ranks share: CUDA virtual memory, passed between processes as a file descriptor, between ranks of
// one process as it is.
#pragma once

#include <cuda.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace deep_ep::cuda {

/// How a peer finds a window: exchanged when a buffer opens.
struct WindowAddress {
  std::uint8_t boot_id[16] = {};
  std::uint8_t device_uuid[16] = {};
  std::int64_t pid = 0;
  std::int32_t device = 0;   // in that process
  std::uint32_t nonce = 0;   // of the socket's name
  std::uint64_t serial = 0;  // of the window in its process
  std::uint64_t bytes = 0;
};

class Window {
 public:
  /// A new window on `device`, mapped for it. Throws kSystem, kUnsupported.
  static std::shared_ptr<Window> create(int device, std::size_t bytes);
  /// A peer's, mapped for `device`. Throws kUnsupported where the two GPUs cannot reach each other, kSystem.
  static std::shared_ptr<Window> open(const WindowAddress& address, int device, std::chrono::milliseconds timeout);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const WindowAddress& address() const { return address_; }
  std::byte* base() const { return reinterpret_cast<std::byte*>(base_); }
  std::size_t bytes() const { return bytes_; }
  /// Hands the descriptor to peers of other processes until seal().
  void offer();
  void seal();

 private:
  struct Door;  // the socket and its thread
  Window();
  void map(int device);
  void allow(int device);

  WindowAddress address_;
  CUmemGenericAllocationHandle memory_ = 0;
  CUdeviceptr base_ = 0;
  std::size_t bytes_ = 0;
  std::unique_ptr<Door> door_;
};

}  // namespace deep_ep::cuda
