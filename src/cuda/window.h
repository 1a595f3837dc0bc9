// SPDX-License-Identifier: MIT
// Device memory that ranks share: CUDA virtual memory of which only the addresses are taken at first, the pages as they
// are needed. Passed between processes as file descriptors, across machines as fabric handles, between ranks of one
// process as it is.
#pragma once

#include <cuda.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/share.h"

namespace deep_ep::cuda {

/// By what means other processes get at a window.
enum class Sharing : std::uint8_t {
  kDescriptor,  // file descriptors: one machine; the window can grow
  kFabric,      // handles of an NVLink fabric: also across machines; all pages are taken at once
  kIpc,         // cudaIpc: one machine, where the driver exports no descriptors; all pages are taken at once
};
const char* name(Sharing sharing);

/// Whether the GPU is in an NVLink fabric that can join machines.
bool in_fabric(int device);

/// What can do it here: descriptors, or what stands in for them. `machines`: whether ranks are on more than one.
Sharing choose_sharing(int device, bool machines);

/// What tells this process from all others, on all machines.
struct ProcessIdentity {
  std::uint8_t boot_id[16] = {};  // of the machine's kernel
  std::uint64_t number = 0;       // random
  std::int64_t pid = 0;
};
ProcessIdentity this_process();

/// How a peer finds a window: exchanged when a buffer opens.
struct WindowAddress {
  ProcessIdentity process;
  std::uint8_t device_uuid[16] = {};
  std::int32_t device = 0;   // in that process
  std::uint32_t nonce = 0;   // of the socket's name
  std::uint64_t serial = 0;  // of the window in its process
  std::uint64_t bytes = 0;   // of addresses
  std::uint64_t granularity = 0;
  std::uint8_t handle[64] = {};  // kFabric, kIpc
  Sharing sharing = Sharing::kDescriptor;
  std::uint8_t reserved[7] = {};
};

class Window {
 public:
  struct Wanted {
    int device = 0;
    Sharing sharing = Sharing::kDescriptor;
    std::size_t bytes = 0;  // of addresses
    std::size_t first = 0;  // with pages from the start
  };
  /// Who opens a peer's window.
  struct Guest {
    int device = 0;
    int rank = 0;
    std::chrono::milliseconds timeout{0};
  };
  /// A new window. Throws kSystem, kUnsupported.
  static std::shared_ptr<Window> create(const Wanted& wanted);
  /// A peer's, mapped for the guest's device. Throws kUnsupported where the two GPUs cannot reach each other, kSystem.
  static std::shared_ptr<Window> open(const WindowAddress& address, const Guest& guest);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  const WindowAddress& address() const { return address_; }
  std::byte* base() const { return reinterpret_cast<std::byte*>(base_); }
  std::size_t bytes() const { return bytes_; }
  /// So many have pages, from the base on.
  std::size_t mapped() const { return mapped_; }

  /// Lets peers of other processes in until seal().
  void offer();
  void seal();

  /// How a window grew, or why not.
  enum class Growth { kDone, kNoMemory, kPeerSilent };
  /// Takes pages up to `needed` bytes and waits until every peer that came has mapped them; ranks in `skip` are not
  /// waited for. Owner only, one thread at a time.
  Growth grow(std::size_t needed, const std::vector<int>& skip, std::chrono::milliseconds timeout);

  /// The owner is another process, which ended without closing this window.
  bool owner_gone() const { return subscription_ && subscription_->owner_gone(); }

 private:
  struct Chunk {
    CUmemGenericAllocationHandle memory;
    std::size_t at, bytes;
  };
  Window() = default;
  void reserve();
  void map(Chunk chunk);
  void allow(int device, const Chunk& chunk);
  void allow_all(int device);
  bool take_pages(std::size_t upto);
  void share_at_once();
  void open_elsewhere(const Guest& guest);

  WindowAddress address_;
  CUdeviceptr base_ = 0;
  std::size_t bytes_ = 0, mapped_ = 0;
  std::mutex mutex_;  // guards the next two: ranks of this process open windows while others grow
  std::vector<Chunk> chunks_;
  std::vector<int> devices_;  // of this process, that may access it
  std::unique_ptr<Door> door_;
  std::unique_ptr<Subscription> subscription_;
};

}  // namespace deep_ep::cuda
