// SPDX-License-Identifier: MIT
// Logical nodes that share no memory, and the networks between them.
#pragma once

#include <cstdint>
#include <vector>

#include "net/loopback.h"
#include "world.h"

namespace deep_ep::test {

/// How ranks are spread over nodes, as in Config::ranks_per_node.
struct Nodes {
  const char* name;
  std::vector<int> sizes;
  int ranks() const {
    int sum = 0;
    for (int size : sizes) sum += size;
    return sum;
  }
};
inline void PrintTo(const Nodes& nodes, std::ostream* out) { *out << nodes.name; }

inline const std::vector<Nodes> kNodes = {
    {"2x4", {4, 4}}, {"4x2", {2, 2, 2, 2}}, {"3+1", {3, 1}}, {"1+2+1", {1, 2, 1}}};

/// A small exchange between such nodes, over the loopback.
inline Shape between(const Nodes& nodes) {
  Shape s;
  s.ranks = nodes.ranks();
  s.ranks_per_node = nodes.sizes;
  s.network = "loopback";
  s.experts = 3 * s.ranks + 1;
  s.topk = 6;
  s.seed = static_cast<std::uint64_t>(s.ranks) + 300;
  return s;
}

/// While one lives, the loopback delays and reorders, and tears puts in two.
class RoughLoopback {
 public:
  explicit RoughLoopback(std::uint64_t seed) {
    net::LoopbackNetwork::set_faults({.seed = seed, .max_delay = 8, .tear = true, .duplicate = 0.05});
  }
  ~RoughLoopback() { net::LoopbackNetwork::set_faults({}); }
  RoughLoopback(const RoughLoopback&) = delete;
  RoughLoopback& operator=(const RoughLoopback&) = delete;
};

}  // namespace deep_ep::test
