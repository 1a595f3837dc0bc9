// SPDX-License-Identifier: MIT
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "cuda/context.h"

namespace deep_ep::cuda {

/// Outputs that captured calls took and their callers dropped: the next captured call may have them, since a graph's
/// calls run one after the other.
struct Context::GraphMemory {
  std::mutex mutex;
  std::multimap<std::size_t, std::shared_ptr<void>> free;  // by bytes

  std::shared_ptr<void> take(std::size_t& bytes) {
    std::lock_guard lock(mutex);
    const auto found = free.lower_bound(bytes);
    if (found == free.end() || found->first > 2 * bytes) return nullptr;
    bytes = found->first;
    std::shared_ptr<void> memory = std::move(found->second);
    free.erase(found);
    return memory;
  }
  void give(std::size_t bytes, std::shared_ptr<void> memory) {
    std::lock_guard lock(mutex);
    free.emplace(bytes, std::move(memory));
  }
};

}  // namespace deep_ep::cuda
