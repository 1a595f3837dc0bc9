// SPDX-License-Identifier: MIT
// The order in which combine adds the rows of one token, as a list of steps that every backend walks alike.
#pragma once

#include <cstdint>

#include "deep_ep/buffer.h"
#include "plan/macros.h"

namespace deep_ep::plan {

/// One row to add, and which sums are complete after it: those are rounded and added one level up.
struct SumStep {
  std::int32_t k;
  std::int32_t rank;
  bool closes_rank;
  bool closes_node;
};

struct SumPlanInput {
  SumOrder order;
  bool one_row_per_rank = false;  // kByRank: a rank's row stands at its highest selection
  int num_topk = 0;
  const std::int32_t* dst_rank = nullptr;  // [num_topk], -1: no selection
  const std::int32_t* node_of_rank = nullptr;
};

/// A rank (or node) among a token's selections.
struct SumGroup {
  std::int32_t number;
  std::int32_t highest;  // its highest selection
};

/// Contributions are added in the order of this number: node by node and rank by rank, where sums of these are rounded
/// or ranks are what counts; a group stands at its number or at its highest selection.
EP_HOST_DEVICE inline std::uint64_t sum_key(const SumOrder& order, int k, SumGroup rank, SumGroup node) {
  const bool by_rank = order.key == SumOrder::Key::kRank;
  const auto place = [&](SumGroup group) { return static_cast<std::uint64_t>(by_rank ? group.number : group.highest); };
  const std::uint64_t of_node = order.round_per_node ? place(node) : 0;
  const std::uint64_t of_rank = by_rank || order.round_per_rank ? place(rank) : 0;
  return of_node << 42 | of_rank << 21 | static_cast<std::uint64_t>(k);
}

/// Writes the steps of one token to steps[num_topk]; returns how many. Quadratic in num_topk, which is small. A rank
/// for which takes_part(rank) is false is left out as if nothing had gone there: a node stands at its highest selection
/// of a rank that takes part.
template <class TakesPart>
EP_HOST_DEVICE inline int make_sum_steps(const SumPlanInput& in, SumStep* steps, const TakesPart& takes_part) {
  const bool by_highest = in.order.key == SumOrder::Key::kTopK && (in.order.round_per_rank || in.order.round_per_node);
  const auto counts = [&](int k) { return in.dst_rank[k] >= 0 && takes_part(in.dst_rank[k]); };
  const auto key_of = [&](int k) {
    SumGroup rank{in.dst_rank[k], k}, node{in.node_of_rank[in.dst_rank[k]], k};
    for (int j = k + 1; by_highest && j < in.num_topk; ++j) {
      if (in.dst_rank[j] == rank.number) rank.highest = j;
      if (counts(j) && in.node_of_rank[in.dst_rank[j]] == node.number) node.highest = j;
    }
    return sum_key(in.order, k, rank, node);
  };

  int count = 0;
  for (int k = 0; k < in.num_topk; ++k) {
    if (!counts(k)) continue;
    if (in.one_row_per_rank) {
      bool is_highest = true;
      for (int j = k + 1; j < in.num_topk; ++j) is_highest = is_highest && in.dst_rank[j] != in.dst_rank[k];
      if (!is_highest) continue;
    }
    const std::uint64_t key = key_of(k);
    int at = count++;
    for (; at > 0 && key < key_of(steps[at - 1].k); --at) steps[at] = steps[at - 1];
    steps[at] = {k, in.dst_rank[k], false, false};
  }
  for (int i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    const bool rank_ends = last || steps[i + 1].rank != steps[i].rank;
    const bool node_ends = last || in.node_of_rank[steps[i + 1].rank] != in.node_of_rank[steps[i].rank];
    steps[i].closes_rank = in.order.round_per_rank && rank_ends;
    steps[i].closes_node = in.order.round_per_node && node_ends;
  }
  return count;
}

}  // namespace deep_ep::plan
