// SPDX-License-Identifier: MIT
#include "host/operations.h"

#include <algorithm>
#include <cstring>

namespace deep_ep::host {

DispatchOutput OutputTensors::make(std::byte* block, const std::shared_ptr<void>& owner) const {
  const plan::RowShape& shape = call.shape;
  const bool padded = call.layout == OutputLayout::kPadded;
  const std::int64_t slot_rows = padded ? std::int64_t{num_ranks} * call.max_tokens_per_rank : 0;
  const auto tensor = [&](std::size_t offset, DType dtype, std::initializer_list<std::int64_t> sizes) {
    return Tensor(TensorView(static_cast<void*>(block + offset), dtype, sizes), owner);
  };
  const auto per_row = [&](std::size_t offset, DType dtype, std::int64_t width) {
    return padded ? tensor(offset, dtype, {num_slots, slot_rows, width}) : tensor(offset, dtype, {num_rows, width});
  };
  DispatchOutput out;
  out.x = per_row(at.x_at, call.wire_dtype, call.hidden);
  if (shape.num_scales > 0) {
    out.scales = per_row(at.scales_at, call.scale_dtype, shape.num_scales);
    const int rows = out.scales.ndim - 2;
    out.scales.strides[rows] = at.scale_row_stride;
    out.scales.strides[rows + 1] = at.scale_column_stride;
    if (padded) out.scales.strides[0] = at.scale_group_stride;
  }
  if (shape.topk_idx_bytes > 0)
    out.topk_idx =
        tensor(at.topk_idx_at, shape.topk_idx_bytes == 8 ? DType::kI64 : DType::kI32, {num_arrivals, shape.num_topk});
  if (shape.topk_weights) {
    if (call.layout == OutputLayout::kByRank) {
      out.topk_weights = tensor(at.topk_weights_at, DType::kFp32, {num_arrivals, shape.num_topk});
    } else {
      out.topk_weights = padded ? tensor(at.topk_weights_at, DType::kFp32, {num_slots, slot_rows})
                                : tensor(at.topk_weights_at, DType::kFp32, {num_rows});
    }
  }
  for (int i = 0; i < shape.num_side; ++i)
    out.side.push_back(tensor(at.side_at[i], call.in.side[i].dtype, {num_arrivals, call.in.side[i].size(1)}));
  return out;
}

void clear_row(const plan::RowShape& shape, const plan::OutputBlock& at, std::byte* block, std::int64_t row) {
  std::memset(block + at.x_at + row * shape.row_bytes, 0, shape.row_bytes);
  auto* scales = reinterpret_cast<std::int32_t*>(block + at.scales_at) + at.first_scale(row);
  for (int i = 0; i < shape.num_scales; ++i) scales[i * at.scale_column_stride] = 0;
  if (shape.topk_weights) reinterpret_cast<float*>(block + at.topk_weights_at)[row] = 0;
}

plan::PlacementView view_of(const Placement& placement, const plan::Topology& topology) {
  return {placement.first_replica().data(), placement.all_replicas().data(), topology.node_of_rank.data(),
          placement.policy()};
}

Handle handle_for(const DispatchCall& call, int num_ranks) {
  Handle handle;
  handle.layout = call.layout;
  handle.num_ranks = num_ranks;
  handle.num_topk = call.num_topk;
  handle.num_experts = call.num_experts;
  handle.expert_alignment = call.expert_alignment;
  handle.max_tokens_per_rank = call.max_tokens_per_rank;
  handle.low_latency = call.operation == Operation::kLowLatencyDispatch;
  handle.topk_idx_64 = call.in.topk_idx.dtype == DType::kI64;
  handle.placement = call.placement;
  handle.num_tokens = call.num_tokens;
  return handle;
}

Tensor tensor_of(std::vector<std::int32_t> values, std::initializer_list<std::int64_t> shape) {
  auto owner = std::make_shared<std::vector<std::int32_t>>(std::move(values));
  return Tensor(TensorView(static_cast<void*>(owner->data()), DType::kI32, shape), owner);
}

void add_rows(Statistics& statistics, const std::int32_t* slot_rows, int num_slots) {
  if (statistics.rows_per_slot.size() < static_cast<std::size_t>(num_slots)) statistics.rows_per_slot.resize(num_slots);
  for (int slot = 0; slot < num_slots; ++slot)
    statistics.rows_per_slot[slot] += static_cast<std::uint64_t>(slot_rows[slot]);
}

}  // namespace deep_ep::host
