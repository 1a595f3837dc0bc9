// SPDX-License-Identifier: MIT
// Ranks and logical nodes. A node is what the configuration says, never a host name: so every path can be tried on one
// machine.
#pragma once

#include <cstdint>
#include <vector>

namespace deep_ep::plan {

struct Topology {
  int num_ranks = 1;
  int num_nodes = 1;
  std::vector<std::int32_t> node_of_rank;        // [num_ranks], ascending
  std::vector<std::int32_t> first_rank_of_node;  // [num_nodes + 1]

  /// From Config::ranks_per_node: empty = one node, one entry = nodes of that size (the last may be smaller), more
  /// entries must add up to num_ranks. Throws kInvalidArgument otherwise.
  static Topology from(const std::vector<int>& ranks_per_node, int num_ranks);

  /// The rank's place among those of its node.
  int member_of(int rank) const { return rank - first_rank_of_node[node_of_rank[rank]]; }
  bool same_node(int a, int b) const { return node_of_rank[a] == node_of_rank[b]; }
};

}  // namespace deep_ep::plan
