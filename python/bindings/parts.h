// SPDX-License-Identifier: MIT
// The parts of the module deep_ep._core, one function each.
#pragma once

#include <nanobind/nanobind.h>

namespace deep_ep::python {

void bind_errors(nanobind::module_& module);
void bind_groups(nanobind::module_& module);
void bind_placement(nanobind::module_& module);
void bind_handle(nanobind::module_& module);
void bind_machine(nanobind::module_& module);
void bind_low_latency(nanobind::module_& module);
void bind_buffer(nanobind::module_& module);

}  // namespace deep_ep::python
