// SPDX-License-Identifier: MIT
#include "deep_ep/gradient.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "host/rows.h"
#ifdef EP_WITH_CUDA
#include "cuda/gradient.h"
#endif

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

namespace {

void check_weighted(const std::shared_ptr<const Handle>& handle, const TensorView& grad_out, const TensorView& weights,
                    const TensorView& rows) {
  require(handle != nullptr, "handle must be given");
  require(handle->layout == OutputLayout::kByExpert, "handle: weighted_combine_backward needs layout kByExpert");
  require(grad_out.ndim == 2, "grad_out must have 2 dimensions: it is {}", describe(grad_out));
  require(weights.given(), "weights must be given");
  const TensorView wanted(static_cast<void*>(nullptr), grad_out.dtype, {handle->num_rows, grad_out.size(1)});
  require(rows.ndim == 2 && rows.dtype == wanted.dtype && rows.shape == wanted.shape, "rows must be {}: they are {}",
          describe(wanted), describe(rows));
  require(rows.contiguous(), "rows must be contiguous: {} has strides {}, {}", describe(rows), rows.strides[0],
          rows.strides[1]);
}

// Each row's gradient, and the dot product that is its weight's. Padding rows have a zero gradient, so both are 0
// there. Behind the rows that came (a bounded dispatch) there is nothing to read.
void weigh_on_host(const Handle& handle, const DispatchOutput& sent, const TensorView& rows, Tensor& gradients,
                   Tensor& dots) {
  const DType dtype = sent.x.dtype;
  const std::int64_t num_rows = handle.num_rows, hidden = sent.x.size(1);
  const std::int64_t row_bytes = hidden * static_cast<std::int64_t>(item_bytes(dtype));
  gradients = Tensor::allocate(dtype, {num_rows, hidden});
  dots = Tensor::allocate(DType::kFp32, {num_rows});
  const host::RowOps& ops = host::row_ops();
  const std::int64_t rows_there = handle.slot_first_row.as<const std::int32_t>()[handle.slot_first_row.numel() - 1];
  std::memset(gradients.as<std::byte>() + rows_there * row_bytes, 0,
              static_cast<std::size_t>((num_rows - rows_there) * row_bytes));
  std::fill(dots.as<float>() + rows_there, dots.as<float>() + num_rows, 0.0f);
  for (std::int64_t row = 0; row < rows_there; ++row) {
    const void* gradient = sent.x.as<const std::byte>() + row * row_bytes;
    const float* weight = sent.topk_weights.as<const float>() + row;
    ops.sum({&gradient, weight, 1, dtype, hidden, gradients.as<std::byte>() + row * row_bytes});
    dots.as<float>()[row] = ops.dot(gradient, rows.as<const std::byte>() + row * row_bytes, dtype, hidden);
  }
}

// The same, the same bits, by a kernel.
void weigh_on_gpu([[maybe_unused]] Buffer& buffer, [[maybe_unused]] const Handle& handle,
                  [[maybe_unused]] const DispatchOutput& sent, [[maybe_unused]] const TensorView& rows,
                  [[maybe_unused]] Tensor& gradients, [[maybe_unused]] Tensor& dots) {
#ifdef EP_WITH_CUDA
  gradients = buffer.allocate(sent.x.dtype, {handle.num_rows, sent.x.size(1)});
  dots = buffer.allocate(DType::kFp32, {handle.num_rows});
  const auto* there = handle.slot_first_row.as<const std::int32_t>() + handle.slot_first_row.numel() - 1;
  cuda::weigh_rows({sent.x, rows, sent.topk_weights, there, gradients, dots});
#endif
}

}  // namespace

WeightedCombineGradient weighted_combine_backward(Buffer& buffer, const std::shared_ptr<const Handle>& handle,
                                                  const TensorView& grad_out, const TensorView& weights,
                                                  const TensorView& rows) {
  try {
    check_weighted(handle, grad_out, weights, rows);
  } catch (const Error& error) {
    buffer.refuse(Operation::kDispatch, error.what());  // what the peers wait for in the call below
    throw;
  }
  DispatchInput in;
  in.x = grad_out;
  in.handle = handle;
  in.topk_weights = weights;  // they travel beside the gradient, to the rows that they weighed
  const DispatchOutput sent = buffer.dispatch(in);

  Tensor dots;
  WeightedCombineGradient result;
  try {
    if (buffer.backend() == BackendKind::kCuda) {
      weigh_on_gpu(buffer, *handle, sent, rows, result.rows, dots);
    } else {
      weigh_on_host(*handle, sent, rows, result.rows, dots);
    }
  } catch (const std::exception& error) {
    buffer.refuse(Operation::kCombine, error.what());
    throw;
  }
  CombineInput home;
  home.handle = handle;
  home.topk_weights = dots;
  result.weights = buffer.combine(home).topk_weights;
  return result;
}

}  // namespace deep_ep
