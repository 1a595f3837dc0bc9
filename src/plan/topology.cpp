// SPDX-License-Identifier: MIT
#include "plan/topology.h"

#include <numeric>

#include "check.h"

namespace deep_ep::plan {

Topology Topology::from(const std::vector<int>& ranks_per_node, int num_ranks) {
  require(num_ranks >= 1, "num_ranks must be at least 1: {}", num_ranks);
  for (int size : ranks_per_node) require(size >= 1, "ranks_per_node: every node has at least 1 rank, not {}", size);
  Topology topology;
  topology.num_ranks = num_ranks;
  if (ranks_per_node.size() <= 1) {
    const int size = ranks_per_node.empty() ? num_ranks : ranks_per_node[0];
    for (int rank = 0; rank < num_ranks; ++rank) topology.node_of_rank.push_back(rank / size);
  } else {
    require_eq(std::accumulate(ranks_per_node.begin(), ranks_per_node.end(), 0), num_ranks,
               "sum of ranks_per_node == num_ranks");
    for (std::size_t node = 0; node < ranks_per_node.size(); ++node)
      topology.node_of_rank.insert(topology.node_of_rank.end(), ranks_per_node[node], static_cast<std::int32_t>(node));
  }
  topology.num_nodes = topology.node_of_rank.back() + 1;
  for (int rank = 0; rank < num_ranks; ++rank)
    if (rank == 0 || !topology.same_node(rank - 1, rank)) topology.first_rank_of_node.push_back(rank);
  topology.first_rank_of_node.push_back(num_ranks);
  return topology;
}

}  // namespace deep_ep::plan
