// SPDX-License-Identifier: MIT
#include "plan/home_slots.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

namespace deep_ep::plan {

HomeSlots make_home_slots(const HomeRoutes& routes) {
  const std::size_t topk = static_cast<std::size_t>(routes.num_topk);
  HomeSlots slots;
  slots.first.assign(static_cast<std::size_t>(routes.num_ranks) + 1, 0);
  slots.of.assign(static_cast<std::size_t>(routes.num_tokens) * topk, -1);
  // Rows are numbered for each rank first; how many come before them is known when all are.
  for (std::size_t token = 0; token < slots.of.size(); token += topk)
    for (std::size_t k = 0; k < topk; ++k) {
      const std::int32_t* const rank = routes.dst_rank + token;
      if (rank[k] < 0) continue;
      const std::size_t same = routes.one_row_per_rank ? std::find(rank, rank + k, rank[k]) - rank : k;
      slots.of[token + k] = same < k ? slots.of[token + same] : slots.first[rank[k] + 1]++;
    }
  std::partial_sum(slots.first.begin(), slots.first.end(), slots.first.begin());
  for (std::size_t i = 0; i < slots.of.size(); ++i)
    if (slots.of[i] >= 0) slots.of[i] += slots.first[routes.dst_rank[i]];
  return slots;
}

}  // namespace deep_ep::plan
