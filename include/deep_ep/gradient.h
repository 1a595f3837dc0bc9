// SPDX-License-Identifier: MIT
// The backward pass: dispatch and combine are each other's gradient. All three are collective and throw as the
// operations do.
#pragma once

#include <memory>

#include "deep_ep/buffer.h"

namespace deep_ep {

/// Gradient of dispatch with respect to x and topk_weights.
///
/// grad_rows          gradient of DispatchOutput::x, bf16, fp16 or fp32, in its arrangement
/// grad_topk_weights  gradient of DispatchOutput::topk_weights, fp32, in its shape; optional
///
/// Returns x: [num_tokens, hidden], the sum over all rows that the token became, and topk_weights: [num_tokens,
/// num_topk].
CombineOutput dispatch_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_rows, const TensorView& grad_topk_weights = {});

/// Gradient of an unweighted combine with respect to its rows: every row gets its token's grad_out [num_tokens,
/// hidden].
DispatchOutput combine_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_out);

/// What weighted_combine_backward returns.
struct WeightedCombineGradient {
  Tensor rows;  // in the arrangement and dtype of CombineInput::x: weight * grad_out, rounded once; padding rows are 0
  Tensor weights;  // fp32 [num_tokens, num_topk]: dot(grad_out, row), 0 where there was no selection
};

/// Gradient of a weighted combine (CombineInput::weights).
///
/// grad_out  [num_tokens, hidden], dtype of rows
/// weights   [num_tokens, num_topk] fp32, as given to combine, at the token's home
/// rows      CombineInput::x as given to combine; layout kByExpert
WeightedCombineGradient weighted_combine_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                                  const TensorView& grad_out, const TensorView& weights,
                                                  const TensorView& rows);

}  // namespace deep_ep
