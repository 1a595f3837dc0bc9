// SPDX-License-Identifier: MIT
// Arguments of the four operations, from Python keywords to the library's structs, and their results back. Keywords
// have the structs' names.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "deep_ep/buffer.h"
#include "seat.h"

namespace deep_ep::python {

DispatchInput dispatch_input(const Seat& seat, const nanobind::kwargs& keywords);
CombineInput combine_input(const Seat& seat, const nanobind::kwargs& keywords);

/// The same outputs, in the hands of the stream that uses them; and of a handle that this call made.
DispatchOutput lent(const Seat& seat, DispatchOutput output, bool new_handle);
CombineOutput lent(const Seat& seat, CombineOutput output);

/// (x, scales, topk_idx, topk_weights, [side ...], handle)
nanobind::tuple to_python(const DispatchOutput& output, Device device);
/// (x, topk_weights); `out` in place of x where the caller gave one
nanobind::tuple to_python(const CombineOutput& output, const nanobind::object& out, Device device);

}  // namespace deep_ep::python
