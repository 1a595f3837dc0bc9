// SPDX-License-Identifier: MIT
// The layer without communication: what the exchange must reproduce.
#pragma once

#include <vector>

#include "numbers.h"
#include "router.h"
#include "settings.h"

namespace moe {

/// The layer's output for one rank's tokens, every expert computed here: [tokens, hidden] BF16. Uses nothing of DeepEP.
///
/// The order of the sum is the one that SumOrder::by_topk() documents: start at 0, add the token's selections in
/// ascending k, each with one fused multiply-add in FP32, round once at the end.
std::vector<Bf16> layer_without_communication(const Settings& settings, const std::vector<Bf16>& x,
                                              const Routing& routing);

}  // namespace moe
