// SPDX-License-Identifier: MIT
// Tensors across the border, without torch at build time: in by their Python attributes, out by DLPack.
#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/tensor.h"

namespace deep_ep::python {

namespace nb = nanobind;

/// Told once by the package: how a DLPack capsule becomes a tensor, and which dtype objects stand for which DType.
void use_torch(nb::object from_dlpack, nb::dict dtypes);

/// Borrows a torch tensor; None is "not given". `what` names it in errors. Throws kUnsupported for another device or
/// dtype. The caller keeps the object alive as long as the view is used.
TensorView view_of(nb::handle tensor, const char* what);

/// A torch tensor over the same memory, which it keeps alive; None if `tensor` is not given.
nb::object to_torch(const Tensor& tensor);

}  // namespace deep_ep::python
