// SPDX-License-Identifier: MIT
// Arguments of the four operations, from Python keywords to the library's structs. Keywords have the structs' names.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "deep_ep/buffer.h"

namespace deep_ep::python {

/// A Buffer that tickets keep open.
using BufferPtr = std::shared_ptr<Buffer>;

DispatchInput dispatch_input(const nanobind::kwargs& keywords);
CombineInput combine_input(const nanobind::kwargs& keywords);

/// (x, scales, topk_idx, topk_weights, [side ...], handle)
nanobind::tuple to_python(const DispatchOutput& output);
/// (x, topk_weights); `out` in place of x where the caller gave one
nanobind::tuple to_python(const CombineOutput& output, const nanobind::object& out);

}  // namespace deep_ep::python
