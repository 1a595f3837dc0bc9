// SPDX-License-Identifier: MIT
// The tensors of the oracle.
#include "oracle.h"

namespace deep_ep::oracle {

Array::Array(DType dtype, std::vector<std::int64_t> shape) : dtype(dtype), shape(std::move(shape)) {
  std::size_t items = 1;
  for (const std::int64_t n : this->shape) items *= static_cast<std::size_t>(n);
  bytes.resize(items * item_bytes(dtype));
}

std::size_t Array::row_bytes() const {
  std::size_t items = 1;
  for (std::size_t d = 1; d < shape.size(); ++d) items *= static_cast<std::size_t>(shape[d]);
  return items * item_bytes(dtype);
}

TensorView Array::view() const {
  TensorView view;
  if (shape.empty()) return view;
  view.data = const_cast<std::byte*>(bytes.data());
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

std::int64_t DispatchRank::expert(std::int64_t token, int k, int num_topk) const {
  const std::int64_t at = token * num_topk + k;
  return topk_idx.dtype == DType::kI64 ? topk_idx.get<std::int64_t>(at) : topk_idx.get<std::int32_t>(at);
}

}  // namespace deep_ep::oracle
