// SPDX-License-Identifier: MIT
#include "deep_ep/machine.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "parts.h"

namespace deep_ep::python {

namespace nb = nanobind;

void bind_machine(nb::module_& m) {
  nb::class_<GpuInfo>(m, "GpuInfo", "A GPU, as this process numbers it.")
      .def_ro("device", &GpuInfo::device)
      .def_ro("name", &GpuInfo::name)
      .def_ro("pci_address", &GpuInfo::pci_address)
      .def_ro("compute_capability", &GpuInfo::compute_capability)
      .def_ro("num_sms", &GpuInfo::num_sms)
      .def_ro("memory_bytes", &GpuInfo::memory_bytes)
      .def_ro("sharing", &GpuInfo::sharing)
      .def_ro("peers", &GpuInfo::peers)
      .def_ro("atomic_peers", &GpuInfo::atomic_peers);
  nb::class_<InterfaceInfo>(m, "InterfaceInfo", "A network interface, as a provider of libfabric names it.")
      .def_ro("provider", &InterfaceInfo::provider)
      .def_ro("name", &InterfaceInfo::name)
      .def_ro("address", &InterfaceInfo::address);
  nb::class_<Machine>(m, "Machine", "What this machine has for a buffer, and what is missing.")
      .def_ro("version", &Machine::version)
      .def_ro("num_cores", &Machine::num_cores)
      .def_ro("row_arithmetic", &Machine::row_arithmetic)
      .def_ro("gpus", &Machine::gpus)
      .def_ro("interfaces", &Machine::interfaces)
      .def_ro("missing", &Machine::missing)
      .def("__str__", &Machine::to_string);
  m.def("inspect_machine", &inspect_machine, nb::call_guard<nb::gil_scoped_release>(),
        "Looks at CPU, GPUs and network without opening a buffer.");
}

}  // namespace deep_ep::python
