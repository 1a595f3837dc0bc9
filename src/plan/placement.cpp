// SPDX-License-Identifier: MIT
#include "plan/placement.h"

#include <algorithm>

#include "check.h"

namespace deep_ep {

namespace {

// FNV-1a: the same on every machine, and good enough to notice a mistake.
void mix(std::uint64_t& hash, std::uint64_t value) {
  for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (value >> (8 * byte) & 0xff)) * 0x100000001b3u;
}

std::uint64_t fingerprint_of(const std::vector<std::vector<int>>& hosted, Placement::Policy policy) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  mix(hash, static_cast<std::uint64_t>(policy));
  for (const auto& experts : hosted) {
    mix(hash, experts.size());
    for (int expert : experts) mix(hash, static_cast<std::uint64_t>(expert));
  }
  return hash;
}

}  // namespace

std::shared_ptr<const Placement> Placement::even(int num_experts, int num_ranks) {
  require(num_experts >= 1, "num_experts must be at least 1: {}", num_experts);
  require(num_ranks >= 1, "num_ranks must be at least 1: {}", num_ranks);
  std::vector<std::vector<int>> hosted(num_ranks);
  int expert = 0;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int share = num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0);
    for (int i = 0; i < share; ++i) hosted[rank].push_back(expert++);
  }
  return from_lists(hosted, num_experts);
}

std::shared_ptr<const Placement> Placement::from_lists(const std::vector<std::vector<int>>& hosted, int num_experts,
                                                       Policy policy) {
  require(num_experts >= 1, "num_experts must be at least 1: {}", num_experts);
  require(!hosted.empty(), "placement: there must be at least one rank");
  std::vector<std::vector<Replica>> by_expert(num_experts);
  int max_slots = 0;
  for (std::size_t rank = 0; rank < hosted.size(); ++rank) {
    max_slots = std::max(max_slots, static_cast<int>(hosted[rank].size()));
    for (std::size_t slot = 0; slot < hosted[rank].size(); ++slot) {
      const int expert = hosted[rank][slot];
      require(expert >= 0 && expert < num_experts, "placement: rank {} hosts expert {}, experts are 0 .. {}", rank,
              expert, num_experts - 1);
      auto& replicas = by_expert[expert];
      require(replicas.empty() || replicas.back().rank != static_cast<int>(rank),
              "placement: rank {} hosts expert {} twice, in slots {} and {}", rank, expert,
              replicas.empty() ? -1 : replicas.back().slot, slot);
      replicas.push_back({static_cast<std::int32_t>(rank), static_cast<std::int32_t>(slot)});
    }
  }
  std::shared_ptr<Placement> placement(new Placement);
  placement->first_replica_.push_back(0);
  for (int expert = 0; expert < num_experts; ++expert) {
    require(!by_expert[expert].empty(), "placement: no rank hosts expert {}", expert);
    placement->replicas_.insert(placement->replicas_.end(), by_expert[expert].begin(), by_expert[expert].end());
    placement->first_replica_.push_back(static_cast<std::int32_t>(placement->replicas_.size()));
  }
  placement->hosted_ = hosted;
  placement->policy_ = policy;
  placement->max_slots_ = max_slots;
  placement->fingerprint_ = fingerprint_of(hosted, policy);
  return placement;
}

}  // namespace deep_ep
