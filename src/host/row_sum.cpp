// SPDX-License-Identifier: MIT
#include "host/row_sum.h"

#include <algorithm>

namespace deep_ep::host {

RowSum::RowSum(const CombineCall& call, const plan::Topology& topology, const RowOps& ops)
    : call_(call),
      topology_(topology),
      ops_(ops),
      one_row_per_rank_(call.in.handle->layout == OutputLayout::kByRank),
      steps_(call.in.handle->num_topk),
      rows_(call.in.handle->num_topk),
      sums_(std::make_unique<float[]>(3 * kPiece)),
      of_rank_(sums_.get()),
      of_node_(sums_.get() + kPiece),
      of_all_(sums_.get() + 2 * kPiece),
      rounded_(std::make_unique<std::byte[]>(kPiece * sizeof(float))) {}

int RowSum::plan_steps(const std::int32_t* dst_rank) {
  return plan::make_sum_steps(
      {call_.in.order, one_row_per_rank_, call_.in.handle->num_topk, dst_rank, topology_.node_of_rank.data()},
      steps_.data());
}

void RowSum::add(int token, int count, std::byte* out) {
  const std::size_t item = item_bytes(call_.dtype);
  const float* weights = call_.in.weights.given()
                             ? call_.in.weights.as<const float>() + std::int64_t{token} * call_.in.handle->num_topk
                             : nullptr;
  for (std::int64_t first = 0; first < call_.hidden; first += kPiece) {
    const std::int64_t n = std::min(kPiece, call_.hidden - first);
    std::fill_n(sums_.get(), 3 * kPiece, 0.0f);
    if (call_.in.order.bias_first) add_bias(of_all_, token, first, n);
    for (int i = 0; i < count; ++i) {
      const float weight = weights != nullptr ? weights[steps_[i].k] : 1.0f;
      add_step(steps_[i], rows_[i] + first * item, weight, n);
    }
    if (!call_.in.order.bias_first) add_bias(of_all_, token, first, n);
    ops_.round(out + first * item, of_all_, call_.dtype, n);
  }
}

void RowSum::add_step(const plan::SumStep& step, const void* row, float weight, std::int64_t n) {
  const SumOrder& order = call_.in.order;
  float* sum = order.round_per_rank ? of_rank_ : order.round_per_node ? of_node_ : of_all_;
  if (call_.in.weights.given()) {
    ops_.fma(sum, row, weight, call_.dtype, n);
  } else {
    ops_.add(sum, row, call_.dtype, n);
  }
  if (step.closes_rank) close(of_rank_, order.round_per_node ? of_node_ : of_all_, n);
  if (step.closes_node) close(of_node_, of_all_, n);
}

// A complete sum is rounded to the rows' dtype, as if it had crossed a link, and added one level up.
void RowSum::close(float* sum, float* into, std::int64_t n) {
  ops_.round(rounded_.get(), sum, call_.dtype, n);
  ops_.add(into, rounded_.get(), call_.dtype, n);
  std::fill_n(sum, n, 0.0f);
}

void RowSum::add_bias(float* sum, int token, std::int64_t first, std::int64_t n) {
  const std::size_t item = item_bytes(call_.dtype);
  for (const TensorView& bias : call_.in.bias)
    if (bias.given()) ops_.add(sum, bias.as<const std::byte>() + (token * call_.hidden + first) * item, call_.dtype, n);
}

}  // namespace deep_ep::host
