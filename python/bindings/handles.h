// SPDX-License-Identifier: MIT
// Handles in Python's hands: small tensors made for a handle, and the way back from such a tensor to the handle.
#pragma once

#include <array>
#include <initializer_list>
#include <memory>

#include "deep_ep/buffer.h"

namespace deep_ep::python {

using HandlePtr = std::shared_ptr<const Handle>;

/// A handle's tensors, and what Python calls them.
inline constexpr std::array kHandleTensors{&Handle::dst_rank,      &Handle::dst_row,        &Handle::dst_arrival,
                                           &Handle::first_arrival, &Handle::src_token,      &Handle::arrival_row,
                                           &Handle::slot_rows,     &Handle::slot_first_row, &Handle::tokens_between};
inline constexpr std::array kHandleTensorNames{"dst_rank",      "dst_row",        "dst_arrival",
                                               "first_arrival", "src_token",      "arrival_row",
                                               "slot_rows",     "slot_first_row", "tokens_between"};
static_assert(kHandleTensors.size() == kHandleTensorNames.size());
/// Those that low latency on a GPU makes besides; they are not saved.
inline constexpr std::array kLowLatencyTensors{&Handle::arrival_weights, &Handle::row_token, &Handle::source_range,
                                               &Handle::own_row, &Handle::own_weights};

/// A tensor from which its handle can be found again, through any alias of its memory: DeepEP's users take handle
/// tuples apart and put them together again. The handle may be set later than the tensor is made.
class KeyTensor {
 public:
  KeyTensor(DType dtype, std::initializer_list<std::int64_t> shape);
  const Tensor& tensor() const { return tensor_; }
  void set(HandlePtr handle) const;

 private:
  struct Entry;
  Tensor tensor_;
  std::shared_ptr<Entry> entry_;
};

/// One of a handle's tensors, which keeps the handle alive and from which it can be found again.
Tensor tensor_of(const HandlePtr& handle, Tensor Handle::*field);

/// The handle that a KeyTensor with this memory stands for, or of whose tensors it is one; null if there is none.
HandlePtr handle_at(const void* data);

/// [shape] of int32, every item `value`.
Tensor filled(std::initializer_list<std::int64_t> shape, std::int32_t value);

/// Ordinary memory with the contents of a contiguous view.
Tensor copy_of(const TensorView& view);

}  // namespace deep_ep::python
