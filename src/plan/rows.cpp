// SPDX-License-Identifier: MIT
#include "plan/rows.h"

namespace deep_ep::plan {

RowPlan make_row_plan(const RowCounts& counts) {
  RowPlan plan;
  plan.first_arrival.push_back(0);
  for (int src = 0; src < counts.num_ranks; ++src) {
    plan.num_arrivals += counts.tokens_from[src];
    plan.first_arrival.push_back(static_cast<std::int32_t>(plan.num_arrivals));
  }
  const bool padded = counts.layout == OutputLayout::kPadded;
  const std::int64_t rows_of_padded_slot = static_cast<std::int64_t>(counts.num_ranks) * counts.max_tokens_per_rank;
  plan.slot_rows.assign(counts.num_slots, 0);
  plan.first_row.assign(static_cast<std::size_t>(counts.num_ranks) * counts.num_slots, 0);
  std::int64_t end = 0;
  for (int slot = 0; slot < counts.num_slots; ++slot) {
    plan.slot_first_row.push_back(static_cast<std::int32_t>(end));
    std::int64_t row = end;
    for (int src = 0; src < counts.num_ranks; ++src) {
      const std::size_t at = static_cast<std::size_t>(src) * counts.num_slots + slot;
      plan.first_row[at] = static_cast<std::int32_t>(row);
      row += counts.rows_from[at];
    }
    plan.slot_rows[slot] = static_cast<std::int32_t>(row - end);
    const std::int64_t aligned =
        (row - end + counts.expert_alignment - 1) / counts.expert_alignment * counts.expert_alignment;
    end += padded ? rows_of_padded_slot : aligned;
  }
  plan.slot_first_row.push_back(static_cast<std::int32_t>(end));
  plan.num_rows = counts.layout == OutputLayout::kByRank ? plan.num_arrivals : end;
  return plan;
}

}  // namespace deep_ep::plan
