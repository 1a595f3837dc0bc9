// SPDX-License-Identifier: MIT
// deep_ep::Error as the Python exception deep_ep.Error, a RuntimeError with `code` and `wait`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "deep_ep/error.h"
#include "parts.h"

namespace deep_ep::python {

namespace nb = nanobind;

namespace {

// Owned by the module; kept for the translator, which may run as long as the module's functions do.
PyObject* error_type = nullptr;

void raise(const Error& error) {
  nb::object instance = nb::borrow(error_type)(error.what());
  instance.attr("code") = error.code();
  instance.attr("wait") = nb::none();
  if (error.wait()) instance.attr("wait") = *error.wait();
  PyErr_SetObject(error_type, instance.ptr());
}

}  // namespace

void bind_errors(nb::module_& m) {
  nb::enum_<ErrorCode>(m, "ErrorCode", "What the caller can do about an error.")
      .value("invalid_argument", ErrorCode::kInvalidArgument)
      .value("unsupported", ErrorCode::kUnsupported)
      .value("system", ErrorCode::kSystem)
      .value("timeout", ErrorCode::kTimeout);
  nb::class_<WaitRecord>(m, "WaitRecord", "One wait that ended at its deadline.")
      .def_ro("rank", &WaitRecord::rank)
      .def_ro("phase", &WaitRecord::phase)
      .def_ro("peer", &WaitRecord::peer)
      .def_ro("epoch", &WaitRecord::epoch)
      .def_ro("expected", &WaitRecord::expected)
      .def_ro("seen", &WaitRecord::seen)
      .def_ro("peer_gone", &WaitRecord::peer_gone);
  error_type = PyErr_NewException("deep_ep.Error", PyExc_RuntimeError, nullptr);
  m.attr("Error") = nb::borrow(error_type);
  nb::register_exception_translator([](const std::exception_ptr& caught, void*) {
    try {
      std::rethrow_exception(caught);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace deep_ep::python
