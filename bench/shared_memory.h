// SPDX-License-Identifier: MIT
// Memory for the measurements: shared between the ranks' processes, or private and aligned; and what a process
// occupies.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <utility>

#include "bench/measure.h"

namespace deep_ep::bench {

inline constexpr const char* kOwnFile = "deep_ep_bench_limit";

struct Unmap {
  std::size_t bytes = 0;
  void operator()(std::byte* memory) const { munmap(memory, bytes); }
};
using Mapping = std::unique_ptr<std::byte[], Unmap>;

inline Mapping checked(void* memory, std::size_t bytes) {
  if (memory == MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), "mmap of " + std::to_string(bytes) + " bytes");
  return Mapping(static_cast<std::byte*>(memory), Unmap{bytes});
}

/// Zeroed memory that stays shared with processes forked later.
inline Mapping map_shared(std::size_t bytes) {
  return checked(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), bytes);
}

/// Private memory, in large pages where the system has them, touched.
inline Mapping map_private(std::size_t bytes) {
  Mapping memory = checked(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), bytes);
  madvise(memory.get(), bytes, MADV_HUGEPAGE);
  std::memset(memory.get(), 1, bytes);
  return memory;
}

/// A memfd, to be mapped by several processes.
class SharedFile {
 public:
  explicit SharedFile(std::size_t bytes) : fd_(memfd_create(kOwnFile, MFD_CLOEXEC)), bytes_(bytes) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
    if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0)
      throw std::system_error(errno, std::generic_category(), "ftruncate");
  }
  SharedFile(SharedFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)), bytes_(other.bytes_) {}
  SharedFile& operator=(SharedFile&&) = delete;
  ~SharedFile() {
    if (fd_ >= 0) close(fd_);
  }
  Mapping map() const {
    Mapping memory = checked(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0), bytes_);
    madvise(memory.get(), bytes_, MADV_HUGEPAGE);
    return memory;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  int fd_;
  std::size_t bytes_;
};

/// The board in a file that whoever starts the ranks has chosen, for ranks that are no children of one process. The
/// file is zero when the first rank comes.
inline Mapping map_board(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
  const bool has_size = ftruncate(fd, sizeof(Board)) == 0;
  void* memory = has_size ? mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
  close(fd);
  return checked(memory, sizeof(Board));
}

/// A field of /proc/self/status in bytes, such as "VmHWM"; 0 if the kernel has none.
inline std::int64_t status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::atoll(line.c_str() + field.size() + 1) * 1024;
  }
  return 0;
}

/// Lets VmHWM start again from what is resident now. Without effect where the kernel does not allow it.
inline void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

/// Bytes in use in all shared-memory files that this process maps, the benchmark's own left out; pages that several
/// processes map count once. Seen through /proc/self/map_files, so it does not matter whether a descriptor is still
/// open; 0 where that is not allowed.
inline std::int64_t shared_file_bytes() {
  std::int64_t bytes = 0;
  std::set<std::uint64_t> seen;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:") == std::string::npos && line.find("/dev/shm/") == std::string::npos) continue;
    if (line.find(kOwnFile) != std::string::npos) continue;
    const std::string path = "/proc/self/map_files/" + line.substr(0, line.find(' '));
    struct stat info = {};
    if (stat(path.c_str(), &info) != 0 || !seen.insert(info.st_ino).second) continue;
    bytes += static_cast<std::int64_t>(info.st_blocks) * 512;
  }
  return bytes;
}

inline Usage usage_now() {
  rusage all = {};
  getrusage(RUSAGE_SELF, &all);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return {seconds(all.ru_utime), seconds(all.ru_stime), all.ru_minflt, all.ru_nvcsw + all.ru_nivcsw};
}

}  // namespace deep_ep::bench
