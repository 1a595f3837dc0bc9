// SPDX-License-Identifier: MIT
// Packed outputs and staged inputs: blocks of a rank's own window, handed out by that rank alone, read or written by
// its peers. Only addresses are computed here: the memory may be a host's or a GPU's.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

namespace deep_ep::plan {

/// First-fit over the arena region. A block goes back when its last owner drops it, on any thread, also after the
/// buffer closed. The last quarter is the landing zone: outputs take it only to be copied out at once, so that a caller
/// who keeps every result still can receive the next.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  struct Block {
    std::shared_ptr<void> owner;  // null: no room
    std::size_t at = 0;           // offset in the window
    std::size_t bytes = 0;
    bool landing = false;
  };
  /// The region `at` .. `at + bytes` of the memory that begins at `base`; `memory` keeps it alive.
  Arena(std::shared_ptr<void> memory, std::byte* base, std::size_t at, std::size_t bytes);

  /// A block outside the landing zone, or with `anywhere` also in it. Never throws for want of room.
  Block allocate(std::size_t bytes, bool anywhere);
  /// For an output whose size is not known yet: up to `most` bytes that end before the offset `end` and the landing
  /// zone, fewer where no hole has so many. To be settled once it is known.
  Block reserve(std::size_t most, std::size_t end);
  /// Keeps the first `bytes` of a reservation, which has as many, and gives the rest back.
  void settle(Block& reservation, std::size_t bytes);

  bool contains(const void* data, std::size_t bytes) const;
  /// One more owner of the block that `data` lies in; null where it lies in none.
  std::shared_ptr<void> share(const void* data) const;
  std::size_t offset_of(const void* data) const {
    return static_cast<std::size_t>(static_cast<const std::byte*>(data) - base_);
  }

  std::size_t capacity() const { return bytes_; }
  std::size_t largest_free() const;
  std::size_t in_use() const;
  std::size_t high_water() const;

 private:
  Block take(std::map<std::size_t, std::size_t>::iterator hole, std::size_t bytes);
  void release(std::size_t at);
  void give_back(std::size_t at, std::size_t bytes);

  const std::shared_ptr<void> memory_;
  std::byte* const base_;
  const std::size_t at_, bytes_, landing_at_;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes, neighbours joined
  struct Taken {
    std::size_t bytes;
    std::weak_ptr<void> owner;
  };
  std::map<std::size_t, Taken> taken_;  // by offset
  std::size_t in_use_ = 0, high_water_ = 0;
};

}  // namespace deep_ep::plan
