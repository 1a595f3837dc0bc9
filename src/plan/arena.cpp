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
    if (hole->second < bytes) continue;
    if (hole->first + bytes > landing_at_ && !anywhere) break;  // holes further on lie in the landing zone too
    Block block = take(hole, bytes);
    high_water_ = std::max(high_water_, in_use_);
    return block;
  }
  return {};
}

Arena::Block Arena::reserve(std::size_t most, std::size_t end) {
  const std::size_t wanted = align_up(std::max<std::size_t>(most, 1), kRegionAlignment);
  const std::size_t last = std::min(landing_at_, end / kRegionAlignment * kRegionAlignment);
  std::lock_guard lock(mutex_);
  auto best = free_.end();
  std::size_t there = 0;
  for (auto hole = free_.begin(); hole != free_.end() && hole->first < last && there < wanted; ++hole) {
    const std::size_t bytes = std::min({hole->second, last - hole->first, wanted});
    if (bytes > there) best = hole, there = bytes;
  }
  return best == free_.end() ? Block{} : take(best, there);
}

void Arena::settle(Block& reservation, std::size_t wanted) {
  const std::size_t bytes = align_up(std::max<std::size_t>(wanted, 1), kRegionAlignment);
  std::lock_guard lock(mutex_);
  high_water_ = std::max(high_water_, in_use_ - (reservation.bytes - bytes));
  if (bytes == reservation.bytes) return;
  taken_[reservation.at].bytes = bytes;
  give_back(reservation.at + bytes, reservation.bytes - bytes);
  reservation.bytes = bytes;
}

// Under the mutex: the first bytes of a hole.
Arena::Block Arena::take(std::map<std::size_t, std::size_t>::iterator hole, std::size_t bytes) {
  const auto [at, size] = *hole;
  free_.erase(hole);
  if (size > bytes) free_[at + bytes] = size - bytes;
  in_use_ += bytes;
  auto release = [arena = shared_from_this(), at = at](void*) { arena->release(at); };
  std::shared_ptr<void> owner(base_ + at, std::move(release));
  taken_[at] = {bytes, owner};
  return {std::move(owner), at, bytes, at + bytes > landing_at_};
}

void Arena::release(std::size_t at) {
  std::lock_guard lock(mutex_);
  const auto block = taken_.find(at);
  const std::size_t bytes = block->second.bytes;
  taken_.erase(block);
  give_back(at, bytes);
}

// Under the mutex.
void Arena::give_back(std::size_t at, std::size_t bytes) {
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

std::shared_ptr<void> Arena::share(const void* data) const {
  std::lock_guard lock(mutex_);
  const std::size_t at = offset_of(data);
  const auto next = taken_.upper_bound(at);
  if (next == taken_.begin()) return nullptr;
  const auto& [begin, block] = *std::prev(next);
  return at < begin + block.bytes ? block.owner.lock() : nullptr;
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
