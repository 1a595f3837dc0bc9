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

/// Writes the steps of one token to steps[num_topk]; returns how many. Quadratic in num_topk, which is small.
EP_HOST_DEVICE inline int make_sum_steps(const SumPlanInput& in, SumStep* steps) {
  const bool by_rank = in.order.key == SumOrder::Key::kRank;
  // A group's place: its number, or its highest selection.
  const auto place_of_rank = [&](int k) {
    const std::int32_t rank = in.dst_rank[k];
    if (by_rank) return rank;
    int highest = k;
    for (int j = k + 1; j < in.num_topk; ++j)
      if (in.dst_rank[j] == rank) highest = j;
    return static_cast<std::int32_t>(highest);
  };
  const auto place_of_node = [&](int k) {
    const std::int32_t node = in.node_of_rank[in.dst_rank[k]];
    if (by_rank) return node;
    int highest = k;
    for (int j = k + 1; j < in.num_topk; ++j)
      if (in.dst_rank[j] >= 0 && in.node_of_rank[in.dst_rank[j]] == node) highest = j;
    return static_cast<std::int32_t>(highest);
  };
  const auto before = [&](int a, int b) {
    if (in.order.round_per_node) {
      const std::int32_t node_a = place_of_node(a), node_b = place_of_node(b);
      if (node_a != node_b) return node_a < node_b;
    }
    if (by_rank || in.order.round_per_rank) {
      const std::int32_t rank_a = place_of_rank(a), rank_b = place_of_rank(b);
      if (rank_a != rank_b) return rank_a < rank_b;
    }
    return a < b;
  };

  int count = 0;
  for (int k = 0; k < in.num_topk; ++k) {
    if (in.dst_rank[k] < 0) continue;
    if (in.one_row_per_rank) {
      bool is_highest = true;
      for (int j = k + 1; j < in.num_topk; ++j) is_highest = is_highest && in.dst_rank[j] != in.dst_rank[k];
      if (!is_highest) continue;
    }
    int at = count++;
    for (; at > 0 && before(k, steps[at - 1].k); --at) steps[at] = steps[at - 1];
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
