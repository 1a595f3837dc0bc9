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
};
static_assert(std::size(kFieldNames) == Signature::kNumFields);

// Enums print as words.
std::string value_of(int field, std::int64_t value) {
  if (field == Signature::kOperation) return name(static_cast<Operation>(value));
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

void Signature::require_same(const Signature& theirs, int my_rank, int their_rank) const {
  for (int field = 0; field < kNumFields; ++field)
    require(fields[field] == theirs.fields[field], "ranks differ in {}: rank {} has {}, rank {} has {}",
            kFieldNames[field], my_rank, value_of(field, fields[field]), their_rank,
            value_of(field, theirs.fields[field]));
}

}  // namespace deep_ep
