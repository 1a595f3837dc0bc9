// SPDX-License-Identifier: MIT
// Where a receiver's rows begin: a pure function of the counts that its sources announced.
#pragma once

#include <cstdint>
#include <vector>

#include "deep_ep/buffer.h"

namespace deep_ep::plan {

/// What a receiver computes from all sources' counts.
struct RowPlan {
  std::int64_t num_arrivals = 0;
  std::int64_t num_rows = 0;                 // padding included; kPadded: slots * num_ranks * max_tokens_per_rank
  std::vector<std::int32_t> first_arrival;   // [num_ranks + 1]
  std::vector<std::int32_t> slot_rows;       // [slots] real rows (kByRank: selections)
  std::vector<std::int32_t> slot_first_row;  // [slots + 1]
  std::vector<std::int32_t> first_row;       // [num_ranks][slots]: where each source's rows of each slot begin; not for
                                             // kByRank
};

struct RowCounts {
  OutputLayout layout = OutputLayout::kByRank;
  int num_ranks = 0;
  int num_slots = 0;
  int expert_alignment = 1;
  int max_tokens_per_rank = 0;            // kPadded
  std::vector<std::int32_t> tokens_from;  // [num_ranks] distinct tokens
  std::vector<std::int32_t> rows_from;    // [num_ranks][num_slots] selections
};

/// Rows of a slot lie in order (source rank, source token, selection). Counts are small integers, sums are checked by
/// the caller against 2^31.
RowPlan make_row_plan(const RowCounts& counts);

}  // namespace deep_ep::plan
