// SPDX-License-Identifier: MIT
// What a process keeps to use again because CUDA makes others wait where it is made or given back.
#pragma once

#include <map>
#include <mutex>
#include <optional>

namespace deep_ep::cuda {

/// Items by kind, from any thread. Pools are made with `new` and never destroyed: buffers may be closed after all
/// static objects are gone.
template <class Kind, class Item>
class Pool {
 public:
  /// One that was given back; nothing where there is none of that kind.
  std::optional<Item> take(const Kind& kind) {
    const std::lock_guard lock(mutex_);
    const auto found = free_.find(kind);
    if (found == free_.end()) return std::nullopt;
    const Item item = found->second;
    free_.erase(found);
    return item;
  }
  void give(const Kind& kind, Item item) {
    const std::lock_guard lock(mutex_);
    free_.emplace(kind, item);
  }

 private:
  std::mutex mutex_;
  std::multimap<Kind, Item> free_;
};

}  // namespace deep_ep::cuda
