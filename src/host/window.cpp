// SPDX-License-Identifier: MIT
#include "host/window.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "deep_ep/error.h"
#include "open_windows.h"

namespace deep_ep::host {

namespace {

OpenWindows<Window>& open_windows() {
  static OpenWindows<Window> instance;
  return instance;
}

[[noreturn]] void throw_system(const std::string& call) {
  throw Error(ErrorCode::kSystem, fmt::format("{}: {}", call, std::strerror(errno)));
}

std::byte* map_shared(int fd, std::size_t bytes) {
  // NORESERVE: the window is mostly addresses; pages exist where they were touched.
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) throw_system(fmt::format("mmap of a window of {} bytes", bytes));
  return static_cast<std::byte*>(base);
}

}  // namespace

MachineIdentity machine_identity() {
  MachineIdentity machine;
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  std::erase(text, '-');
  for (std::size_t i = 0; i < sizeof machine.boot_id && 2 * i + 1 < text.size(); ++i)
    machine.boot_id[i] = static_cast<std::uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  struct stat info {};
  if (stat("/proc/self/ns/pid", &info) == 0) machine.pid_namespace = info.st_ino;
  return machine;
}

std::shared_ptr<Window> Window::create(std::size_t bytes) {
  std::shared_ptr<Window> window(new Window);
  window->fd_ = memfd_create("deep_ep", MFD_CLOEXEC);
  if (window->fd_ < 0) throw_system("memfd_create");
  if (ftruncate(window->fd_, static_cast<off_t>(bytes)) != 0)
    throw_system(fmt::format("ftruncate of a window to {} bytes", bytes));
  window->bytes_ = bytes;
  window->base_ = map_shared(window->fd_, bytes);
  window->address_.machine = machine_identity();
  window->address_.pid = getpid();
  window->address_.fd = window->fd_;
  window->address_.bytes = bytes;
  window->address_.serial = open_windows().add(window);
  return window;
}

std::shared_ptr<Window> Window::open(const WindowAddress& address) {
  if (address.pid == getpid()) return open_windows().find(address.serial);
  const MachineIdentity machine = machine_identity();
  if (std::memcmp(&machine, &address.machine, sizeof machine) != 0)
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format(
            "process {} is on another machine or in another container: the host backend shares memory within one "
            "machine and one pid namespace. Ranks of several machines form several nodes: say so in "
            "Config::ranks_per_node",
            address.pid));
  const std::string path = fmt::format("/proc/{}/fd/{}", address.pid, address.fd);
  std::shared_ptr<Window> window(new Window);
  window->fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (window->fd_ < 0)
    throw_system(fmt::format("open of a peer's window {} (same user, and ptrace-readable, is needed)", path));
  struct stat info {};
  if (fstat(window->fd_, &info) != 0) throw_system("fstat of a peer's window");
  if (static_cast<std::uint64_t>(info.st_size) != address.bytes)
    throw Error(ErrorCode::kSystem,
                fmt::format("a peer's window {} has {} bytes, {} were announced", path, info.st_size, address.bytes));
  window->address_ = address;
  window->bytes_ = address.bytes;
  window->base_ = map_shared(window->fd_, address.bytes);
  window->seal();
  return window;
}

Window::~Window() {
  if (base_ != nullptr) munmap(base_, bytes_);
  seal();
  if (address_.pid == getpid()) open_windows().remove(address_.serial);
}

void Window::seal() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

ProcessWatch::ProcessWatch(std::int64_t pid)
    : fd_(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0))) {}

ProcessWatch::~ProcessWatch() {
  if (fd_ >= 0) close(fd_);
}

ProcessWatch::ProcessWatch(ProcessWatch&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

ProcessWatch& ProcessWatch::operator=(ProcessWatch&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

bool ProcessWatch::ended() const {
  pollfd watched{fd_, POLLIN, 0};
  return fd_ >= 0 && poll(&watched, 1, 0) == 1;
}

}  // namespace deep_ep::host
