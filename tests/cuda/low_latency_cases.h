// SPDX-License-Identifier: MIT
// What tests of low latency on GPUs share: a case's configuration, and its inputs where they lie.
#pragma once

#include <algorithm>

#include "cases.h"

namespace deep_ep::test {

inline Config config_of(const Case& c) {
  Config config = small_config();
  config.max_experts = 4096;
  config.ranks_per_node = c.nodes;
  config.network.provider = c.network;
  config.low_latency.max_tokens_per_rank = std::max(c.tokens, 1);
  config.low_latency.row_bytes = static_cast<std::size_t>(c.hidden) * item_bytes(c.dtype);
  config.low_latency.num_topk = c.topk;
  config.low_latency.side_bytes = 4096;
  return config;
}

// Where one rank's inputs lie while its calls run. Freeing device memory waits for the whole GPU, also for a peer's
// kernel that waits for our next call: a test makes all it needs first and keeps it to the end.
struct Placed {
  Placed(const Case& c, const Inputs& in, bool device) {
    const auto there = [&](const Tensor& tensor) { return device ? to_gpu(tensor) : tensor; };
    x = there(in.x), idx = there(in.idx), weights = there(in.weights), scales = there(in.scales), side = there(in.side);
    home = there(in.home_weights), bias = there(in.bias);
    call.x = x;
    call.topk_idx = idx;
    call.topk_weights = weights;
    call.num_experts = c.experts;
    if (c.replicas) call.placement = placement_of(c);
    call.layout = c.layout;
    call.expert_alignment = c.alignment;
    call.max_tokens_per_rank = std::max(c.tokens, 1);
    call.mask_topk_weights = c.mask_weights;
  }
  DispatchInput quantised(const Case& c) const {
    DispatchInput in = call;
    in.scales = scales;
    if (c.side > 0) in.side = {side};
    if (c.fp8) in.fp8 = Fp8Options{c.round_scale, c.ue8m0};
    if (c.column_major) in.scale_order = ScaleOrder::kColumnMajor;
    return in;
  }
  Tensor x, idx, weights, scales, side, home, bias;
  DispatchInput call;  // rows as they are
};

/// Rounds of one case.
struct Series {
  explicit Series(const Case& shape) : c(shape) {}
  Case c;
  // Inputs that differ from round to round.
  Inputs inputs(int rank, int round) const {
    Inputs in = inputs_of(c, rank);
    std::mt19937 random(static_cast<unsigned>(rank + 131 * round));
    in.x = random_numbers(random, c.dtype, {in.x.shape[0], c.hidden});
    for (std::int64_t i = 0; i < in.idx.numel(); ++i)
      in.idx.as<std::int64_t>()[i] = random() % 8 == 0 ? -1 : static_cast<std::int64_t>(random() % c.experts);
    // Fewer tokens: the rest of them select nothing.
    const std::int64_t tokens = round % 3 == 2 ? in.idx.shape[0] / 2 : in.idx.shape[0];
    for (std::int64_t i = tokens * c.topk; i < in.idx.numel(); ++i) in.idx.as<std::int64_t>()[i] = -1;
    in.home_weights = random_numbers(random, DType::kFp32, {in.x.shape[0], c.topk});
    return in;
  }
};

}  // namespace deep_ep::test
