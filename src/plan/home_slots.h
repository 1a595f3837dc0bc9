// SPDX-License-Identifier: MIT
// Where rows come home in low latency on hosts: which of its home's slots each row of combine takes. Those of one rank
// lie side by side, in the order of their tokens and selections, so that few puts bring them from another node.
#pragma once

#include <cstdint>
#include <vector>

namespace deep_ep::plan {

/// Of one home's tokens.
struct HomeSlots {
  std::vector<std::int32_t> first;  // [num_ranks + 1]: the rows of rank r take first[r] .. first[r + 1] - 1
  std::vector<std::int32_t> of;     // [tokens * topk], -1 where nothing is selected
};

struct HomeRoutes {
  const std::int32_t* dst_rank = nullptr;  // [tokens * topk], -1 where nothing is selected
  std::int64_t num_tokens = 0;
  int num_topk = 0;
  int num_ranks = 0;
  bool one_row_per_rank = false;  // a row for all of a token's selections on one rank
};

HomeSlots make_home_slots(const HomeRoutes& routes);

}  // namespace deep_ep::plan
