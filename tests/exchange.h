// SPDX-License-Identifier: MIT
// Whole exchanges against the oracle, in one call each.
#pragma once

#include "difference.h"
#include "world.h"

namespace deep_ep::test {

/// The dispatch that the shape asks for: high throughput, or low latency received at once.
DispatchOutput dispatch(AnyBuffer& buffer, const DispatchInput& input, bool low_latency);
CombineOutput combine(AnyBuffer& buffer, const CombineInput& input, bool low_latency);

/// Opens a buffer on every rank, dispatches, and compares every rank's output with the oracle's.
void expect_dispatch(const World& world, const Options& options = {});

/// Dispatches, then combines random rows in every given order, and compares with the oracle's sums.
void expect_combine(const World& world, const HomewardShape& shape, const std::vector<SumOrder>& orders,
                    const Options& options = {});

}  // namespace deep_ep::test
