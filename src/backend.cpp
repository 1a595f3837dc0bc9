// SPDX-License-Identifier: MIT
#include "backend.h"

#include "check.h"

namespace deep_ep {

namespace {

constexpr const char* kFieldNames[] = {
    "operation",
    "layout",
    "dtype of rows on the wire",
    "row bytes on the wire",
    "top-k",
    "num_experts",
    "placement",
    "expert_alignment",
    "max_tokens_per_rank",
    "bytes of a topk_idx entry",
    "topk_weights given",
    "num_scales",
    "dtype of scales",
    "scale_order",
    "side tensors",
    "cached handle given",
    "pre_reduce (2: with weights)",
    "wire",
};
static_assert(std::size(kFieldNames) == Signature::kNumFields);

// Enums print as words.
std::string value_of(int field, std::int64_t value) {
  if (field == Signature::kOperation) return name(static_cast<Operation>(value));
  if (field == Signature::kWireFormat) return name(static_cast<WireFormat>(value));
  if (field == Signature::kRowDType || field == Signature::kScaleDType) return name(static_cast<DType>(value));
  return fmt::format("{}", value);
}

}  // namespace

const char* name(Operation operation) noexcept {
  switch (operation) {
    case Operation::kDispatch: return "dispatch";
    case Operation::kCombine: return "combine";
    case Operation::kLowLatencyDispatch: return "low_latency_dispatch";
    case Operation::kLowLatencyCombine: return "low_latency_combine";
  }
  return "?";
}

const char* name(WireFormat format) noexcept {
  switch (format) {
    case WireFormat::kAsIs: return "as is";
    case WireFormat::kLogFmt10: return "LogFMT-10";
    case WireFormat::kFp8: return "fp8";
  }
  return "?";
}

void Signature::require_same(const Signature& theirs, int my_rank, int their_rank) const {
  for (int field = 0; field < kNumFields; ++field)
    require(fields[field] == theirs.fields[field], "ranks differ in {}: rank {} has {}, rank {} has {}",
            kFieldNames[field], my_rank, value_of(field, fields[field]), their_rank,
            value_of(field, theirs.fields[field]));
}

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

}  // namespace deep_ep
