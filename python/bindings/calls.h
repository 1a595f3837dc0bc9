// SPDX-License-Identifier: MIT
// Arguments of the four operations, from Python keywords to the library's structs, and their results back. Keywords
// have the structs' names.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>
#include <memory>
#include <string>

#include "deep_ep/buffer.h"
#include "seat.h"

namespace deep_ep::python {

/// The result of parse(). Arguments that cannot even be read are refused like those that the library rejects, so that
/// the peers' same call says so.
template <typename Parse>
auto parsed(const Seat& seat, Operation operation, const Parse& parse) {
  try {
    return parse();
  } catch (const std::exception& error) {
    const std::string why = error.what();  // before the interpreter's lock goes: an error of Python lives there
    nanobind::gil_scoped_release unlocked;
    seat->refuse(operation, why);
    throw;
  }
}

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
