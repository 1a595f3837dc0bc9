// SPDX-License-Identifier: MIT
#include "host/operations.h"

#include <algorithm>
#include <cstring>

namespace deep_ep::host {

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
