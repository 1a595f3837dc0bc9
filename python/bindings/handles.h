// SPDX-License-Identifier: MIT
// Handles in Python's hands: small tensors made for a handle, and the way back from such a tensor to the handle.
#pragma once

#include <initializer_list>
#include <memory>

#include "deep_ep/buffer.h"

namespace deep_ep::python {

using HandlePtr = std::shared_ptr<const Handle>;

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

/// The handle that a KeyTensor with this memory stands for; null if there is none.
HandlePtr handle_at(const void* data);

/// [shape] of int32, every item `value`.
Tensor filled(std::initializer_list<std::int64_t> shape, std::int32_t value);

/// Ordinary memory with the contents of a contiguous view.
Tensor copy_of(const TensorView& view);

}  // namespace deep_ep::python
