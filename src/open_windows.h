// SPDX-License-Identifier: MIT
// Windows of this process by serial number: ranks that are threads of one process share one mapping.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "deep_ep/error.h"

namespace deep_ep {

template <typename Window>
class OpenWindows {
 public:
  /// Returns the window's serial number.
  std::uint64_t add(const std::shared_ptr<Window>& window) {
    std::lock_guard lock(mutex_);
    windows_[next_] = window;
    return next_++;
  }

  /// Throws kSystem where it has gone.
  std::shared_ptr<Window> find(std::uint64_t serial) {
    std::lock_guard lock(mutex_);
    const auto found = windows_.find(serial);
    if (found != windows_.end())
      if (auto window = found->second.lock()) return window;
    throw Error(ErrorCode::kSystem,
                fmt::format("window {} of this process was closed while its peers opened it", serial));
  }

  void remove(std::uint64_t serial) {
    std::lock_guard lock(mutex_);
    windows_.erase(serial);
  }

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, std::weak_ptr<Window>> windows_;
  std::uint64_t next_ = 1;
};

}  // namespace deep_ep
