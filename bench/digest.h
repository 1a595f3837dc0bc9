// SPDX-License-Identifier: MIT
// A fingerprint of results, so that two programs can be seen to have made the same exchange. The order of rows does not
// enter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace deep_ep::bench {

class Digest {
 public:
  /// `place` says where the row belongs where that matters: a slot, say.
  void add(const void* row, std::size_t bytes, std::uint64_t place = 0) {
    std::uint64_t hash = 0x243f6a8885a308d3u ^ (place * 0x9e3779b97f4a7c15u);
    const char* at = static_cast<const char*>(row);
    for (std::size_t i = 0; i < bytes; i += sizeof(std::uint64_t)) {
      std::uint64_t word = 0;
      std::memcpy(&word, at + i, bytes - i < sizeof(word) ? bytes - i : sizeof(word));
      hash = (hash ^ word) * 0xff51afd7ed558ccdu;
      hash ^= hash >> 32;
    }
    sum_ += hash;
  }
  std::int64_t value() const { return static_cast<std::int64_t>(sum_ >> 1); }

 private:
  std::uint64_t sum_ = 0;
};

}  // namespace deep_ep::bench
