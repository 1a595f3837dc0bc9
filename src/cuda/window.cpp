// SPDX-License-Identifier: MIT
#include "cuda/window.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <random>
#include <string>

#include "check.h"
#include "cuda/driver.h"
#include "environment.h"
#include "open_windows.h"

namespace deep_ep::cuda {

namespace {

OpenWindows<Window>& open_windows() {
  static OpenWindows<Window> instance;
  return instance;
}

CUmemAllocationHandleType handle_type(Sharing sharing) {
  switch (sharing) {
    case Sharing::kDescriptor: return CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    case Sharing::kFabric: return CU_MEM_HANDLE_TYPE_FABRIC;
    case Sharing::kIpc: break;
  }
  return CU_MEM_HANDLE_TYPE_NONE;
}

CUmemAllocationProp properties_of(int device, Sharing sharing) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  properties.requestedHandleTypes = handle_type(sharing);
  return properties;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::string door_name(const WindowAddress& of) {
  return fmt::format("deep_ep-{}-{}-{:08x}", of.process.pid, of.serial, of.nonce);
}

bool has(int device, CUdevice_attribute attribute) {
  int value = 0;
  EP_DRIVER(cuDeviceGetAttribute, &value, attribute, device);
  return value != 0;
}

[[noreturn]] void throw_unreachable(int from, const std::string& to) {
  throw Error(ErrorCode::kUnsupported,
              fmt::format("GPU {} cannot access the memory of {}: there is neither NVLink nor PCIe peer access between "
                          "them",
                          from, to));
}

// The peer's GPU as this process numbers it; -1 where it does not see it.
int visible_device(const std::uint8_t (&uuid)[16]) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp info;
    check(cudaGetDeviceProperties(&info, device), "cudaGetDeviceProperties");
    if (std::memcmp(info.uuid.bytes, uuid, sizeof uuid) == 0) return device;
  }
  return -1;
}

void require_access(int from, int to) {
  if (from == to || to < 0) return;
  int reachable = 0;
  check(cudaDeviceCanAccessPeer(&reachable, from, to), "cudaDeviceCanAccessPeer");
  if (reachable == 0) throw_unreachable(from, fmt::format("GPU {}", to));
}

}  // namespace

// By what means
// ---------------------------------------------------------------------------------------------------------------------

const char* name(Sharing sharing) {
  switch (sharing) {
    case Sharing::kDescriptor: return "descriptor";
    case Sharing::kFabric: return "fabric";
    case Sharing::kIpc: return "ipc";
  }
  return "?";
}

bool in_fabric(int device) { return has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED); }

Sharing choose_sharing(int device, bool machines) {
  if (const auto wanted = environment("DEEP_EP_CUDA_SHARING")) {
    for (Sharing sharing : {Sharing::kDescriptor, Sharing::kFabric, Sharing::kIpc})
      if (*wanted == name(sharing)) return sharing;
    require(false, "environment variable DEEP_EP_CUDA_SHARING: '{}' is none of descriptor, fabric, ipc", *wanted);
  }
  if (machines) {
    if (in_fabric(device)) return Sharing::kFabric;
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("ranks of one node are on several machines, and GPU {} is in no NVLink fabric that joins them: "
                    "ranks_per_node says what a node is",
                    device));
  }
  return has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) ? Sharing::kDescriptor
                                                                                      : Sharing::kIpc;
}

ProcessIdentity this_process() {
  static const std::uint64_t number = std::random_device()() | std::uint64_t{std::random_device()()} << 32;
  ProcessIdentity identity;
  identity.number = number;
  identity.pid = getpid();
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  std::erase(text, '-');
  for (std::size_t i = 0; i < sizeof identity.boot_id && 2 * i + 1 < text.size(); ++i)
    identity.boot_id[i] = static_cast<std::uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  return identity;
}

// Addresses and pages
// ---------------------------------------------------------------------------------------------------------------------

void Window::reserve() { EP_DRIVER(cuMemAddressReserve, &base_, bytes_, 0, 0, 0); }

void Window::allow(int device, const Chunk& chunk) {
  CUmemAccessDesc access = {};
  access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  EP_DRIVER(cuMemSetAccess, base_ + chunk.at, chunk.bytes, &access, 1);
}

// The chunk is ours from here on, whatever happens.
void Window::map(Chunk chunk) {
  std::lock_guard lock(mutex_);
  try {
    EP_DRIVER(cuMemMap, base_ + chunk.at, chunk.bytes, 0, chunk.memory, 0);
  } catch (...) {
    (void)driver::find<decltype(cuMemRelease)>("cuMemRelease")(chunk.memory);
    throw;
  }
  chunks_.push_back(chunk);
  for (int device : devices_) allow(device, chunk);
  mapped_ = chunk.at + chunk.bytes;
}

void Window::allow_all(int device) {
  std::lock_guard lock(mutex_);
  if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
  for (const Chunk& chunk : chunks_) allow(device, chunk);
  devices_.push_back(device);
}

// False where the GPU has no such memory.
bool Window::take_pages(std::size_t upto) {
  Chunk chunk{0, mapped_, round_up(upto, address_.granularity) - mapped_};
  const CUmemAllocationProp properties = properties_of(address_.device, address_.sharing);
  const auto create = driver::find<decltype(cuMemCreate)>("cuMemCreate");
  const CUresult code = create(&chunk.memory, chunk.bytes, &properties, 0);
  if (code == CUDA_ERROR_OUT_OF_MEMORY) return false;
  driver::check(code,
                fmt::format("cuMemCreate of {} bytes to share by {}", chunk.bytes, name(address_.sharing)).c_str());
  map(chunk);
  return true;
}

std::shared_ptr<Window> Window::create(const Wanted& wanted) {
  std::shared_ptr<Window> window(new Window);
  WindowAddress& address = window->address_;
  address.process = this_process();
  address.sharing = wanted.sharing;
  address.device = wanted.device;
  address.nonce = std::random_device()();
  cudaDeviceProp info;
  check(cudaGetDeviceProperties(&info, wanted.device), "cudaGetDeviceProperties");
  std::memcpy(address.device_uuid, info.uuid.bytes, sizeof address.device_uuid);
  if (wanted.sharing == Sharing::kIpc) {
    window->bytes_ = window->mapped_ = wanted.bytes;
    void* memory = nullptr;
    check(cudaMalloc(&memory, wanted.bytes), fmt::format("cudaMalloc of {} bytes", wanted.bytes));
    window->base_ = reinterpret_cast<CUdeviceptr>(memory);
  } else {
    const CUmemAllocationProp properties = properties_of(wanted.device, wanted.sharing);
    EP_DRIVER(cuMemGetAllocationGranularity, &address.granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    window->bytes_ = round_up(wanted.bytes, address.granularity);
    window->devices_ = {wanted.device};
    window->reserve();
    const std::size_t first = wanted.sharing == Sharing::kDescriptor ? wanted.first : wanted.bytes;
    if (!window->take_pages(first))
      throw Error(ErrorCode::kSystem, fmt::format("GPU {} has no {} bytes left for a window", wanted.device, first));
  }
  address.bytes = window->bytes_;
  address.serial = open_windows().add(window);
  return window;
}

Window::~Window() {
  subscription_.reset();  // before the addresses go
  door_.reset();
  const bool ours = address_.process.number == this_process().number;
  // Errors have nobody to go to here: the process may be ending and the driver gone.
  if (address_.sharing == Sharing::kIpc) {
    if (base_ != 0 && ours) cudaFree(base());
    if (base_ != 0 && !ours) cudaIpcCloseMemHandle(base());
  } else if (base_ != 0) {
    for (const Chunk& chunk : chunks_) {
      (void)driver::find<decltype(cuMemUnmap)>("cuMemUnmap")(base_ + chunk.at, chunk.bytes);
      (void)driver::find<decltype(cuMemRelease)>("cuMemRelease")(chunk.memory);
    }
    (void)driver::find<decltype(cuMemAddressFree)>("cuMemAddressFree")(base_, bytes_);
  }
  if (ours) open_windows().remove(address_.serial);
}

// Sharing
// ---------------------------------------------------------------------------------------------------------------------

// The handle goes into the address, which is exchanged when the buffer opens.
void Window::share_at_once() {
  if (address_.sharing == Sharing::kIpc) {
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, base()), "cudaIpcGetMemHandle");
    static_assert(sizeof handle == sizeof address_.handle);
    std::memcpy(address_.handle, &handle, sizeof handle);
  } else {
    CUmemFabricHandle handle;
    EP_DRIVER(cuMemExportToShareableHandle, &handle, chunks_.front().memory, CU_MEM_HANDLE_TYPE_FABRIC, 0);
    static_assert(sizeof handle == sizeof address_.handle);
    std::memcpy(address_.handle, &handle, sizeof handle);
  }
}

void Window::offer() {
  if (address_.sharing != Sharing::kDescriptor) return share_at_once();
  int memory = -1;
  const Chunk& first = chunks_.front();
  EP_DRIVER(cuMemExportToShareableHandle, &memory, first.memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  door_ = std::make_unique<Door>(door_name(address_), Piece{first.at, first.bytes}, memory);
}

void Window::seal() {
  if (door_) door_->seal();
}

Window::Growth Window::grow(std::size_t needed, const std::vector<int>& skip, std::chrono::milliseconds timeout) {
  if (needed <= mapped_) return Growth::kDone;
  // By a quarter at least, so that growing ends soon; but no more than is needed where that is all there is.
  const std::size_t least = std::min(bytes_, mapped_ + mapped_ / 4);
  if (!take_pages(std::max(needed, least)) && !take_pages(needed)) return Growth::kNoMemory;
  if (!door_) return Growth::kDone;
  int memory = -1;
  const Chunk& last = chunks_.back();
  EP_DRIVER(cuMemExportToShareableHandle, &memory, last.memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  return door_->give({last.at, last.bytes}, memory, skip, timeout).empty() ? Growth::kDone : Growth::kPeerSilent;
}

std::shared_ptr<Window> Window::open(const WindowAddress& address, const Guest& guest) {
  if (address.process.number == this_process().number && address.process.pid == getpid()) {
    auto window = open_windows().find(address.serial);
    require_access(guest.device, address.device);
    if (address.sharing != Sharing::kIpc) {
      window->allow_all(guest.device);
    } else if (address.device != guest.device) {
      const cudaError_t code = cudaDeviceEnablePeerAccess(address.device, 0);
      if (code == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError();
      } else {
        check(code, "cudaDeviceEnablePeerAccess");
      }
    }
    return window;
  }
  std::shared_ptr<Window> window(new Window);
  window->address_ = address;
  window->bytes_ = address.bytes;
  try {
    const int there = visible_device(address.device_uuid);
    require_access(guest.device, there);
    window->open_elsewhere(guest);
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("window of process {}: {}", address.process.pid, error.what()));
  }
  return window;
}

void Window::open_elsewhere(const Guest& guest) {
  if (address_.sharing == Sharing::kIpc) {
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, address_.handle, sizeof handle);
    void* memory = nullptr;
    check(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    base_ = reinterpret_cast<CUdeviceptr>(memory);
    mapped_ = bytes_;
    return;
  }
  devices_ = {guest.device};
  reserve();
  if (address_.sharing == Sharing::kFabric) {
    Chunk all{0, 0, bytes_};
    EP_DRIVER(cuMemImportFromShareableHandle, &all.memory, address_.handle, CU_MEM_HANDLE_TYPE_FABRIC);
    map(all);
    return;
  }
  subscription_ = std::make_unique<Subscription>(
      door_name(address_), guest.rank, guest.timeout, [this, device = guest.device](Piece piece, int memory) {
        check(cudaSetDevice(device), "cudaSetDevice");
        Chunk chunk{0, piece.at, piece.bytes};
        const auto import = driver::find<decltype(cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
        const CUresult code = import(&chunk.memory, reinterpret_cast<void*>(static_cast<std::intptr_t>(memory)),
                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
        close(memory);
        driver::check(code, "cuMemImportFromShareableHandle");
        map(chunk);
      });
}

}  // namespace deep_ep::cuda
