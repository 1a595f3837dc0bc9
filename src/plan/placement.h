// SPDX-License-Identifier: MIT
// Where a selection goes: from (expert, source rank, source token) to a rank and a slot there.
#pragma once

#include <cstdint>

#include "deep_ep/config.h"
#include "plan/macros.h"

namespace deep_ep::plan {

/// A Placement as plain arrays, for host and device alike; borrows the Placement's memory or a device copy of it.
struct PlacementView {
  const std::int32_t* first_replica = nullptr;   // [num_experts + 1]
  const Placement::Replica* replicas = nullptr;  // by expert, then rank
  const std::int32_t* node_of_rank = nullptr;    // [num_ranks]
  Placement::Policy policy = Placement::Policy::kSpread;
};

/// The replica that a token takes: a pure function, so that every rank, backend and test agrees without talking.
EP_HOST_DEVICE inline Placement::Replica route(const PlacementView& placement, int expert, int src_rank,
                                               std::int64_t src_token) {
  const std::int32_t first = placement.first_replica[expert];
  const std::int32_t count = placement.first_replica[expert + 1] - first;
  const Placement::Replica* replicas = placement.replicas + first;
  if (count == 1) return replicas[0];
  const std::int64_t turn = src_rank + src_token;
  if (placement.policy == Placement::Policy::kLocalFirst) {
    std::int32_t on_node = 0;
    for (std::int32_t i = 0; i < count; ++i) {
      if (replicas[i].rank == src_rank) return replicas[i];
      on_node += placement.node_of_rank[replicas[i].rank] == placement.node_of_rank[src_rank];
    }
    if (on_node > 0) {
      std::int64_t skip = turn % on_node;
      for (std::int32_t i = 0; i < count; ++i) {
        const bool near = placement.node_of_rank[replicas[i].rank] == placement.node_of_rank[src_rank];
        if (near && skip-- == 0) return replicas[i];
      }
    }
  }
  return replicas[turn % count];
}

}  // namespace deep_ep::plan
