// SPDX-License-Identifier: MIT
// The four operations of the host backend, and what more than one of them needs to make its result.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "backend.h"
#include "host/context.h"
#include "plan/placement.h"

namespace deep_ep::host {

DispatchOutput dispatch(Context& context, const DispatchCall& call);
CombineOutput combine(Context& context, const CombineCall& call);
DispatchLayout dispatch_layout(const LayoutCall& call, const plan::Topology& topology, int rank);
/// The tickets keep the context alive: they may outlive the buffer.
Ticket<DispatchOutput> low_latency_dispatch(const std::shared_ptr<Context>& context, const DispatchCall& call);
Ticket<CombineOutput> low_latency_combine(const std::shared_ptr<Context>& context, const CombineCall& call);

/// Zeroes a row that no source writes: its values, scales and weight.
void clear_row(const plan::RowShape& shape, const plan::OutputBlock& at, std::byte* block, std::int64_t row);

plan::PlacementView view_of(const Placement& placement, const plan::Topology& topology);

/// Takes over a vector.
Tensor tensor_of(std::vector<std::int32_t> values, std::initializer_list<std::int64_t> shape);

void add_rows(Statistics& statistics, const std::int32_t* slot_rows, int num_slots);

}  // namespace deep_ep::host
