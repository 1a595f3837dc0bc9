// SPDX-License-Identifier: MIT
// Who gets how much, counted from this rank's ids alone.
#include <algorithm>
#include <utility>

#include "host/operations.h"
#include "plan/routing.h"

namespace deep_ep::host {

namespace {

Tensor zeros(DType dtype, std::initializer_list<std::int64_t> shape) {
  Tensor tensor = Tensor::allocate(dtype, shape);
  std::fill_n(tensor.as<std::byte>(), tensor.bytes(), std::byte{0});
  return tensor;
}

}  // namespace

DispatchLayout dispatch_layout(const LayoutCall& call, const plan::Topology& topology, int rank) {
  const Placement& placement = *call.placement;
  const plan::Routes routes =
      plan::make_routes(call.topk_idx, view_of(placement, topology), topology.num_ranks, placement.max_slots(), rank);
  const std::int64_t tokens = routes.num_tokens, ranks = topology.num_ranks, nodes = topology.num_nodes;
  DispatchLayout layout{zeros(DType::kI32, {ranks}), zeros(DType::kI32, {nodes}),
                        zeros(DType::kI32, {call.num_experts}), zeros(DType::kBool, {tokens, ranks})};
  std::copy(routes.tokens_to.begin(), routes.tokens_to.end(), layout.tokens_per_rank.as<std::int32_t>());
  std::vector<std::int64_t> last_token(nodes, -1);
  for (std::int64_t i = 0; i < call.topk_idx.numel(); ++i) {
    if (routes.rank[i] < 0) continue;
    const std::int64_t token = i / routes.num_topk;
    const int node = topology.node_of_rank[routes.rank[i]];
    ++layout.tokens_per_expert.as<std::int32_t>()[plan::expert_id(call.topk_idx, i)];
    layout.is_token_in_rank.as<std::uint8_t>()[token * ranks + routes.rank[i]] = 1;
    if (std::exchange(last_token[node], token) != token) ++layout.tokens_per_node.as<std::int32_t>()[node];
  }
  return layout;
}

}  // namespace deep_ep::host
