// SPDX-License-Identifier: MIT
#include "cuda/window.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "cuda/driver.h"

namespace deep_ep::cuda {

namespace {

[[noreturn]] void throw_system(const std::string& call) {
  throw Error(ErrorCode::kSystem, fmt::format("{}: {}", call, std::strerror(errno)));
}

// Windows of this process, for ranks that are threads of it.
struct Registry {
  std::mutex mutex;
  std::map<std::uint64_t, std::weak_ptr<Window>> windows;
  std::uint64_t next = 1;
};
Registry& registry() {
  static Registry instance;
  return instance;
}

void read_boot_id(std::uint8_t (&id)[16]) {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  std::erase(text, '-');
  for (std::size_t i = 0; i < sizeof id && 2 * i + 1 < text.size(); ++i)
    id[i] = static_cast<std::uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
}

CUmemAllocationProp properties_of(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}

// An abstract name: nothing is left in any folder, however a process ends.
socklen_t name_socket(sockaddr_un& name, const WindowAddress& of) {
  const std::string text = fmt::format("deep_ep-{}-{}-{:08x}", of.pid, of.serial, of.nonce);
  name = {};
  name.sun_family = AF_UNIX;
  text.copy(name.sun_path + 1, sizeof name.sun_path - 1);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

// One descriptor as ancillary data of a one-byte message.
struct Parcel {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  Parcel() {
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
  }
};

void send_descriptor(int socket, int fd) {
  Parcel parcel;
  cmsghdr* header = CMSG_FIRSTHDR(&parcel.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  (void)!sendmsg(socket, &parcel.message, MSG_NOSIGNAL);  // a peer that went away reports it itself
}

int receive_descriptor(int socket) {
  Parcel parcel;
  if (recvmsg(socket, &parcel.message, MSG_CMSG_CLOEXEC) <= 0) throw_system("recvmsg of a peer's window");
  const cmsghdr* header = CMSG_FIRSTHDR(&parcel.message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS)
    throw Error(ErrorCode::kSystem, "a peer sent no descriptor of its window");
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return fd;
}

int connect_to(const WindowAddress& address, std::chrono::milliseconds timeout) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw_system("socket");
  const timeval limit{timeout.count() / 1000, timeout.count() % 1000 * 1000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  sockaddr_un name;
  const socklen_t length = name_socket(name, address);
  if (connect(fd, reinterpret_cast<sockaddr*>(&name), length) != 0) {
    close(fd);
    throw_system(fmt::format("connect to process {} for its window", address.pid));
  }
  return fd;
}

}  // namespace

// Serves the window's descriptor to processes of the same user.
struct Window::Door {
  int listener = -1;
  int memory = -1;
  std::atomic<bool> closing{false};
  std::thread thread;

  void serve() {
    while (!closing) {
      pollfd watched{listener, POLLIN, 0};
      if (poll(&watched, 1, 20) != 1) continue;
      const int peer = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (peer < 0) continue;
      ucred who{};
      socklen_t length = sizeof who;
      if (getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &who, &length) == 0 && who.uid == geteuid())
        send_descriptor(peer, memory);
      close(peer);
    }
  }
  ~Door() {
    closing = true;
    if (thread.joinable()) thread.join();
    if (listener >= 0) close(listener);
    if (memory >= 0) close(memory);
  }
};

Window::Window() = default;

std::shared_ptr<Window> Window::create(int device, std::size_t bytes) {
  int shareable = 0;
  EP_DRIVER(cuDeviceGetAttribute, &shareable, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
  if (shareable == 0)
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("GPU {} cannot share its memory by file descriptor (CUDA virtual memory management)", device));
  const CUmemAllocationProp properties = properties_of(device);
  std::size_t granularity = 0;
  EP_DRIVER(cuMemGetAllocationGranularity, &granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  std::shared_ptr<Window> window(new Window);
  window->bytes_ = (bytes + granularity - 1) / granularity * granularity;
  EP_DRIVER(cuMemCreate, &window->memory_, window->bytes_, &properties, 0);
  window->map(device);
  WindowAddress& address = window->address_;
  read_boot_id(address.boot_id);
  cudaDeviceProp info;
  check(cudaGetDeviceProperties(&info, device), "cudaGetDeviceProperties");
  std::memcpy(address.device_uuid, info.uuid.bytes, sizeof address.device_uuid);
  address.pid = getpid();
  address.device = device;
  address.nonce = std::random_device()();
  address.bytes = window->bytes_;
  std::lock_guard lock(registry().mutex);
  address.serial = registry().next++;
  registry().windows[address.serial] = window;
  return window;
}

void Window::map(int device) {
  EP_DRIVER(cuMemAddressReserve, &base_, bytes_, 0, 0, 0);
  EP_DRIVER(cuMemMap, base_, bytes_, 0, memory_, 0);
  allow(device);
}

void Window::allow(int device) {
  CUmemAccessDesc access = {};
  access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  EP_DRIVER(cuMemSetAccess, base_, bytes_, &access, 1);
}

std::shared_ptr<Window> Window::open(const WindowAddress& address, int device, std::chrono::milliseconds timeout) {
  if (address.pid == getpid()) {
    std::lock_guard lock(registry().mutex);
    const auto found = registry().windows.find(address.serial);
    auto window = found != registry().windows.end() ? found->second.lock() : nullptr;
    if (!window)
      throw Error(ErrorCode::kSystem,
                  fmt::format("window {} of this process was closed while its peers opened it", address.serial));
    if (address.device == device) return window;
    int reachable = 0;
    check(cudaDeviceCanAccessPeer(&reachable, device, address.device), "cudaDeviceCanAccessPeer");
    if (reachable == 0)
      throw Error(ErrorCode::kUnsupported,
                  fmt::format("GPU {} cannot access the memory of GPU {}: there is neither NVLink nor PCIe peer access "
                              "between them",
                              device, address.device));
    window->allow(device);
    return window;
  }
  std::uint8_t boot_id[16] = {};
  read_boot_id(boot_id);
  if (std::memcmp(boot_id, address.boot_id, sizeof boot_id) != 0)
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("process {} is on another machine: the CUDA backend shares memory within one", address.pid));
  const int socket = connect_to(address, timeout);
  int fd = -1;
  try {
    fd = receive_descriptor(socket);
  } catch (...) {
    close(socket);
    throw;
  }
  close(socket);
  std::shared_ptr<Window> window(new Window);
  window->address_ = address;
  window->bytes_ = address.bytes;
  try {
    EP_DRIVER(cuMemImportFromShareableHandle, &window->memory_, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(fd);
    fd = -1;
    window->map(device);
  } catch (const Error& error) {
    if (fd >= 0) close(fd);
    throw Error(error.code(), fmt::format("window of process {}: {}", address.pid, error.what()));
  }
  return window;
}

void Window::offer() {
  auto door = std::make_unique<Door>();
  EP_DRIVER(cuMemExportToShareableHandle, &door->memory, memory_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  door->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (door->listener < 0) throw_system("socket");
  sockaddr_un name;
  const socklen_t length = name_socket(name, address_);
  if (bind(door->listener, reinterpret_cast<sockaddr*>(&name), length) != 0) throw_system("bind of a window's socket");
  if (listen(door->listener, 128) != 0) throw_system("listen on a window's socket");
  door->thread = std::thread([of = door.get()] { of->serve(); });
  door_ = std::move(door);
}

void Window::seal() { door_.reset(); }

Window::~Window() {
  seal();
  // Errors have nobody to go to here: the process may be ending and the driver gone.
  if (base_ != 0) {
    (void)driver::find<decltype(cuMemUnmap)>("cuMemUnmap")(base_, bytes_);
    (void)driver::find<decltype(cuMemAddressFree)>("cuMemAddressFree")(base_, bytes_);
  }
  if (memory_ != 0) (void)driver::find<decltype(cuMemRelease)>("cuMemRelease")(memory_);
  if (address_.pid == getpid()) {
    std::lock_guard lock(registry().mutex);
    registry().windows.erase(address_.serial);
  }
}

}  // namespace deep_ep::cuda
