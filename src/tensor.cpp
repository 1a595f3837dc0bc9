// SPDX-License-Identifier: MIT
#include "deep_ep/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <new>

namespace deep_ep {

namespace {

// Rows start where vector loads and a cache line want them.
constexpr std::align_val_t kAlignment{128};

}  // namespace

const char* name(DType dtype) noexcept {
  switch (dtype) {
    case DType::kU8: return "u8";
    case DType::kFp8E4m3: return "fp8_e4m3";
    case DType::kBf16: return "bf16";
    case DType::kFp16: return "fp16";
    case DType::kFp32: return "fp32";
    case DType::kI32: return "i32";
    case DType::kI64: return "i64";
    case DType::kBool: return "bool";
  }
  return "?";
}

TensorView::TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> sizes)
    : data(data), dtype(dtype), ndim(static_cast<int>(std::min<std::size_t>(sizes.size(), kMaxDims))) {
  std::copy_n(sizes.begin(), ndim, shape.begin());
  std::int64_t stride = 1;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= shape[dim];
  }
}

std::int64_t TensorView::numel() const {
  if (ndim == 0) return 0;
  std::int64_t count = 1;
  for (int dim = 0; dim < ndim; ++dim) count *= shape[dim];
  return count;
}

bool TensorView::contiguous() const {
  if (numel() == 0) return true;
  std::int64_t stride = 1;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    if (shape[dim] != 1 && strides[dim] != stride) return false;
    stride *= shape[dim];
  }
  return true;
}

Tensor Tensor::allocate(DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view(static_cast<void*>(nullptr), dtype, shape);
  void* memory = ::operator new(std::max<std::size_t>(view.bytes(), 1), kAlignment);
  view.data = memory;
  return Tensor(view, std::shared_ptr<void>(memory, [](void* p) { ::operator delete(p, kAlignment); }));
}

std::string describe(const TensorView& view) {
  if (!view.given()) return "nothing";
  return fmt::format("{}[{}]", name(view.dtype), fmt::join(view.shape.begin(), view.shape.begin() + view.ndim, ", "));
}

}  // namespace deep_ep
