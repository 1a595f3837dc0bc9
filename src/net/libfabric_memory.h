// SPDX-License-Identifier: MIT
// Memory that libfabric may read and write: registered with it, under keys that cannot be guessed where the provider
// lets us choose them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "net/fabric.h"
#include "net/libfabric_open.h"

namespace deep_ep::net {

/// What a peer is told in Fabric::region_key().
struct RegionKey {
  std::uint64_t base;  // of the addresses that writes name
  std::uint64_t bytes;
  std::uint64_t key;
};

/// One rank's regions, by number.
class LibfabricMemory {
 public:
  struct Region {
    Memory memory;
    FidPtr<fid_mr> registration;
  };

  explicit LibfabricMemory(const LibfabricObjects& objects) : objects_(objects), random_(std::random_device{}()) {}

  /// Throws kSystem where the provider refuses.
  FidPtr<fid_mr> registered(const Memory& memory, std::uint64_t access);
  int add(const Memory& memory);
  /// Throws kInvalidArgument where there is none of this number, as remove() does.
  const Region& at(int region) const;
  void remove(int region);
  void clear() { regions_.clear(); }
  RegionKey key(int region) const;

 private:
  const LibfabricObjects& objects_;
  std::mt19937_64 random_;
  std::vector<Region> regions_;
};

}  // namespace deep_ep::net
