// SPDX-License-Identifier: MIT
#include "plan/arena.h"

#include <algorithm>
#include <iterator>

#include "plan/align.h"

namespace deep_ep::plan {

Arena::Arena(std::shared_ptr<void> memory, std::byte* base, std::size_t at, std::size_t bytes)
    : memory_(std::move(memory)),
      base_(base),
      at_(at),
      bytes_(bytes),
      landing_at_(at + align_up(bytes / 4 * 3, kRegionAlignment)) {
  if (bytes > 0) free_[at_] = bytes_;
}

Arena::Block Arena::allocate(std::size_t wanted, bool anywhere) {
  const std::size_t bytes = align_up(std::max<std::size_t>(wanted, 1), kRegionAlignment);
  std::lock_guard lock(mutex_);
  for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
    const auto [at, size] = *hole;
    if (size < bytes) continue;
    const bool landing = at + bytes > landing_at_;
    if (landing && !anywhere) break;  // holes further on lie in the landing zone too
    free_.erase(hole);
    if (size > bytes) free_[at + bytes] = size - bytes;
    in_use_ += bytes;
    high_water_ = std::max(high_water_, in_use_);
    auto give_back = [arena = shared_from_this(), at = at, bytes](void*) { arena->release(at, bytes); };
    return {std::shared_ptr<void>(base_ + at, std::move(give_back)), at, bytes, landing};
  }
  return {};
}

void Arena::release(std::size_t at, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  in_use_ -= bytes;
  auto hole = free_.emplace(at, bytes).first;
  if (const auto next = std::next(hole); next != free_.end() && at + bytes == next->first) {
    hole->second += next->second;
    free_.erase(next);
  }
  if (hole != free_.begin()) {
    const auto previous = std::prev(hole);
    if (previous->first + previous->second == at) {
      previous->second += hole->second;
      free_.erase(hole);
    }
  }
}

bool Arena::contains(const void* data, std::size_t bytes) const {
  const auto* first = static_cast<const std::byte*>(data);
  const std::byte* begin = base_ + at_;
  return first >= begin && first + bytes <= begin + bytes_;
}

std::size_t Arena::largest_free() const {
  std::lock_guard lock(mutex_);
  std::size_t largest = 0;
  for (const auto& [at, size] : free_) largest = std::max(largest, size);
  return largest;
}

std::size_t Arena::in_use() const {
  std::lock_guard lock(mutex_);
  return in_use_;
}

std::size_t Arena::high_water() const {
  std::lock_guard lock(mutex_);
  return high_water_;
}

}  // namespace deep_ep::plan
