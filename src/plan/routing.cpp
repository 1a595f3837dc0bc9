// SPDX-License-Identifier: MIT
#include "plan/routing.h"

#include <algorithm>

namespace deep_ep::plan {

Routes make_routes(const TensorView& topk_idx, const PlacementView& placement, int num_ranks, int max_slots,
                   int src_rank) {
  Routes routes;
  routes.num_tokens = static_cast<int>(topk_idx.size(0));
  routes.num_topk = static_cast<int>(topk_idx.size(1));
  routes.num_ranks = num_ranks;
  routes.max_slots = max_slots;
  const std::size_t selections = static_cast<std::size_t>(routes.num_tokens) * routes.num_topk;
  routes.rank.assign(selections, -1);
  routes.slot.assign(selections, -1);
  routes.arrival.assign(selections, -1);
  routes.row.assign(selections, -1);
  routes.tokens_to.assign(num_ranks, 0);
  routes.rows_to.assign(static_cast<std::size_t>(num_ranks) * max_slots, 0);

  // The latest token that went to a rank: tells a first selection from a further one.
  std::vector<int> last_token(num_ranks, -1);
  std::size_t at = 0;
  for (int token = 0; token < routes.num_tokens; ++token) {
    for (int k = 0; k < routes.num_topk; ++k, ++at) {
      const std::int64_t expert = expert_id(topk_idx, static_cast<std::int64_t>(at));
      if (expert < 0) continue;
      const Placement::Replica to = route(placement, static_cast<int>(expert), src_rank, token);
      if (last_token[to.rank] != token) {
        last_token[to.rank] = token;
        ++routes.tokens_to[to.rank];
      }
      routes.rank[at] = to.rank;
      routes.slot[at] = to.slot;
      routes.arrival[at] = routes.tokens_to[to.rank] - 1;
      routes.row[at] = routes.rows_to_rank(to.rank)[to.slot]++;
    }
  }
  return routes;
}

void leave_out(Routes& routes, const std::vector<char>& left_out) {
  for (std::size_t i = 0; i < routes.rank.size(); ++i)
    if (routes.rank[i] >= 0 && left_out[routes.rank[i]])
      routes.rank[i] = routes.slot[i] = routes.arrival[i] = routes.row[i] = -1;
  for (int rank = 0; rank < routes.num_ranks; ++rank) {
    if (!left_out[rank]) continue;
    routes.tokens_to[rank] = 0;
    std::fill_n(routes.rows_to_rank(rank), routes.max_slots, 0);
  }
}

}  // namespace deep_ep::plan
