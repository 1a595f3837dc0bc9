// SPDX-License-Identifier: MIT
#include "deep_ep/gradient.h"

#include "check.h"
#include "host/rows.h"

namespace deep_ep {

CombineOutput dispatch_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_rows, const TensorView& grad_topk_weights) {
  CombineInput in;
  in.x = grad_rows;
  in.handle = handle;
  in.topk_weights = grad_topk_weights;
  in.weights_home = WeightsHome::kFromOwner;
  return buffer.combine(in);
}

DispatchOutput combine_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_out) {
  DispatchInput in;
  in.x = grad_out;
  in.handle = handle;
  return buffer.dispatch(in);
}

WeightedCombineGradient weighted_combine_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                                  const TensorView& grad_out, const TensorView& weights,
                                                  const TensorView& rows) {
  require(handle != nullptr && handle->layout == OutputLayout::kByExpert,
          "handle: weighted_combine_backward needs layout kByExpert");
  DispatchInput in;
  in.x = grad_out;
  in.handle = handle;
  in.topk_weights = weights;  // they travel beside the gradient, to the rows that they weighed
  const DispatchOutput sent = buffer.dispatch(in);

  const std::int64_t num_rows = handle->num_rows, hidden = grad_out.size(1);
  const std::int64_t row_bytes = hidden * static_cast<std::int64_t>(item_bytes(grad_out.dtype));
  WeightedCombineGradient result;
  result.rows = Tensor::allocate(grad_out.dtype, {num_rows, hidden});
  Tensor dots = Tensor::allocate(DType::kFp32, {num_rows});
  std::vector<float> scaled(hidden);
  const host::RowOps& ops = host::row_ops();
  // Every row, padding included: there the gradient and so both results are 0 as dispatch left them.
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::byte* gradient = sent.x.as<const std::byte>() + row * row_bytes;
    std::fill(scaled.begin(), scaled.end(), 0.0f);
    ops.fma(scaled.data(), gradient, sent.topk_weights.as<const float>()[row], grad_out.dtype, hidden);
    ops.round(result.rows.as<std::byte>() + row * row_bytes, scaled.data(), grad_out.dtype, hidden);
    dots.as<float>()[row] = ops.dot(gradient, rows.as<const std::byte>() + row * row_bytes, grad_out.dtype, hidden);
  }
  CombineInput home;
  home.handle = handle;
  home.topk_weights = dots;
  result.weights = buffer.combine(home).topk_weights;
  return result;
}

}  // namespace deep_ep
