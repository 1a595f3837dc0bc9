// SPDX-License-Identifier: MIT
// deep_ep._core: the C++ library as Python sees it. It converts and forwards; rules live in the library.
#include <nanobind/nanobind.h>

#include "deep_ep/version.h"
#include "parts.h"
#include "torch_tensor.h"

NB_MODULE(_core, m) {
  using namespace deep_ep::python;
  // Objects may outlive the interpreter where a program ends in the middle of its work; that is no leak worth a report.
  nanobind::set_leak_warnings(false);
  m.attr("__version__") = DEEP_EP_VERSION;
  m.def("use_torch", &use_torch, nb::arg("from_dlpack"), nb::arg("dtypes"), nb::arg("tensor_type"));
  bind_errors(m);
  bind_groups(m);
  bind_placement(m);
  bind_handle(m);
  bind_low_latency(m);
  bind_buffer(m);
  bind_machine(m);
}
