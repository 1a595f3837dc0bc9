// SPDX-License-Identifier: MIT
// Memory that ranks of one machine share: anonymous (memfd), so that nothing is left behind however a process ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace deep_ep::host {

/// Ranks with equal ones can share memory: they run under one kernel, with one set of process numbers.
struct MachineIdentity {
  std::uint8_t boot_id[16] = {};
  std::uint64_t pid_namespace = 0;
};
MachineIdentity machine_identity();

/// How a peer finds a window: exchanged when a buffer opens.
struct WindowAddress {
  MachineIdentity machine;
  std::int64_t pid = 0;
  std::int64_t fd = 0;
  std::uint64_t serial = 0;  // of the window in its process
  std::uint64_t bytes = 0;
};

/// One mapping of a window. Its pages are taken from the system only as they are first touched; they go back when the
/// last process has unmapped it. Ranks of one process share one mapping, so that a race detector sees what they share.
class Window {
 public:
  /// A new window, all zero. Throws kSystem.
  static std::shared_ptr<Window> create(std::size_t bytes);
  /// A peer's. Throws kUnsupported if the peer is on another machine, kSystem if its memory cannot be mapped.
  static std::shared_ptr<Window> open(const WindowAddress& address);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const WindowAddress& address() const { return address_; }
  std::byte* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }
  /// Closes the file descriptor that peers open; the mapping stays. When all peers have mapped the window.
  void seal();

 private:
  Window() = default;
  WindowAddress address_;
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
  int fd_ = -1;
};

/// Tells whether a process has ended; opened while it surely lives, so that a reused number cannot mislead.
class ProcessWatch {
 public:
  ProcessWatch() = default;
  explicit ProcessWatch(std::int64_t pid);
  ~ProcessWatch();
  ProcessWatch(ProcessWatch&& other) noexcept;
  ProcessWatch& operator=(ProcessWatch&& other) noexcept;
  bool ended() const;

 private:
  int fd_ = -1;  // pidfd; -1: unknown, then ended() is false
};

}  // namespace deep_ep::host
