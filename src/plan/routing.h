// SPDX-License-Identifier: MIT
// Which token goes where, and as the how-manieth: everything a source can decide before it hears from anybody.
#pragma once

#include <cstdint>
#include <vector>

#include "deep_ep/tensor.h"
#include "plan/placement.h"

namespace deep_ep::plan {

/// The routes of one rank's tokens. Indices are relative to what the receiver will say: arrival and row numbers count
/// from 0 for each destination (rows: for each destination and slot) until the receiver's first ones are added.
struct Routes {
  int num_tokens = 0;
  int num_topk = 0;
  int num_ranks = 0;
  int max_slots = 0;

  // [num_tokens * num_topk], -1 where nothing is selected
  std::vector<std::int32_t> rank;
  std::vector<std::int32_t> slot;
  std::vector<std::int32_t> arrival;  // the same for all selections of a token on one rank: it travels there once
  std::vector<std::int32_t> row;  // among this source's selections of that (rank, slot), in (token, selection) order

  std::vector<std::int32_t> tokens_to;  // [num_ranks] distinct tokens
  std::vector<std::int32_t> rows_to;    // [num_ranks * max_slots] selections

  std::int32_t* rows_to_rank(int dst) { return rows_to.data() + static_cast<std::size_t>(dst) * max_slots; }
  const std::int32_t* rows_to_rank(int dst) const { return rows_to.data() + static_cast<std::size_t>(dst) * max_slots; }
};

/// Takes selections of ranks that are left out away again.
void leave_out(Routes& routes, const std::vector<char>& left_out);

/// Expert number of one selection, from i32 or i64 ids; negative: none.
inline std::int64_t expert_id(const TensorView& topk_idx, std::int64_t at) {
  return topk_idx.dtype == DType::kI64 ? topk_idx.as<const std::int64_t>()[at] : topk_idx.as<const std::int32_t>()[at];
}

/// Routes every token. topk_idx [num_tokens, num_topk] holds valid expert numbers or negatives.
Routes make_routes(const TensorView& topk_idx, const PlacementView& placement, int num_ranks, int max_slots,
                   int src_rank);

}  // namespace deep_ep::plan
