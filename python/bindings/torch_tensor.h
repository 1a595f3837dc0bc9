// SPDX-License-Identifier: MIT
// Tensors across the border, without torch at build time: in by their Python attributes, out by DLPack.
#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/tensor.h"

namespace deep_ep::python {

namespace nb = nanobind;

/// Where tensors are: the number of a GPU, or kCpu.
using Device = int;
inline constexpr Device kCpu = -1;

/// Told once by the package: how a DLPack capsule becomes a tensor, which dtype objects stand for which DType, and
/// torch.Tensor, which may offer a shorter way.
void use_torch(nb::object from_dlpack, nb::dict dtypes, nb::object tensor_type);

/// Borrows a torch tensor of that device; None is "not given". `what` names it in errors. Throws kUnsupported for
/// another device or dtype. The caller keeps the object alive as long as the view is used.
TensorView view_of(nb::handle tensor, const char* what, Device device = kCpu);

/// As view_of, of whatever device, and keeps the torch tensor alive itself. None: not given.
Tensor hold(nb::handle tensor, const char* what);

/// Where a torch tensor's memory begins. `what` names it in errors.
const void* data_of(nb::handle tensor, const char* what);

/// Of a torch tensor. Throws kUnsupported where it is neither a CPU nor a CUDA tensor.
Device device_of(nb::handle tensor, const char* what);

/// A torch tensor over the same memory, which it keeps alive; None if `tensor` is not given.
nb::object to_torch(const Tensor& tensor, Device device = kCpu);

}  // namespace deep_ep::python
