// SPDX-License-Identifier: MIT
// Joins the top-k weights of one token that came home beside its rows. Both kinds of combine end here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend.h"

namespace deep_ep::host {

/// Writes home[num_topk]; 0 where there is no selection. dst_rank[num_topk] has -1 for none. entry(j, k) gives weight k
/// of the row that came back for selection j; a kByRank row stands at its rank's highest selection and brings all
/// num_topk weights.
template <typename Entry>
void join_weights(const CombineInput& in, const std::int32_t* dst_rank, const Entry& entry, float* home) {
  const int topk = in.handle->num_topk;
  const bool by_rank = in.handle->layout == OutputLayout::kByRank;
  const auto highest_of = [&](std::int32_t rank) {
    int k = topk - 1;
    while (k >= 0 && dst_rank[k] != rank) --k;
    return k;
  };
  std::fill_n(home, topk, 0.0f);
  if (!by_rank || in.weights_home == WeightsHome::kFromOwner) {
    for (int k = 0; k < topk; ++k)
      if (dst_rank[k] >= 0) home[k] = entry(by_rank ? highest_of(dst_rank[k]) : k, k);
    return;
  }
  for (std::int32_t rank = 0; rank < in.handle->num_ranks; ++rank) {
    const int row = highest_of(rank);
    for (int k = 0; k < topk && row >= 0; ++k)
      if (dst_rank[k] >= 0) home[k] += entry(row, k);
  }
}

}  // namespace deep_ep::host
