// SPDX-License-Identifier: MIT
// Checks a call's arguments once and completes it for the backend. Every rule about arguments is here.
#pragma once

#include <memory>

#include "backend.h"
#include "plan/window.h"

namespace deep_ep {

/// What the checks must know of the buffer.
struct CallScope {
  int rank = 0;
  int num_ranks = 1;
  const Config& config;
  const plan::WindowLayout& layout;
  bool on_device = false;  // tensors are device pointers: what they hold is checked there
};

/// Each throws kInvalidArgument or kUnsupported naming the argument and both values. `even` is the placement to use
/// where the caller brings none; null if the caller brings one.
DispatchCall check_dispatch(Operation operation, const DispatchInput& in, const CallScope& scope,
                            const std::shared_ptr<const Placement>& even);
CombineCall check_combine(Operation operation, const CombineInput& in, const CallScope& scope);

/// Ids are a contiguous matrix of numbers below num_experts, or negative. On a device only the matrix is looked at.
void check_topk_idx(const TensorView& topk_idx, int num_experts, bool on_device = false);

/// A placement fits the group and the buffer.
void check_placement(const Placement& placement, int num_experts, const CallScope& scope);

Support check_support(const CallShape& shape, const CallScope& scope);

}  // namespace deep_ep
