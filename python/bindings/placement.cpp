// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "deep_ep/config.h"
#include "parts.h"

namespace deep_ep::python {

namespace nb = nanobind;

void bind_placement(nb::module_& m) {
  nb::class_<Placement>(m, "Placement", "Which ranks host which experts.")
      .def_static(
          "even",
          [](int experts, int ranks) { return std::const_pointer_cast<Placement>(Placement::even(experts, ranks)); },
          nb::arg("num_experts"), nb::arg("num_ranks"))
      .def_static(
          "from_lists",
          [](const std::vector<std::vector<int>>& hosted, int num_experts, bool local_first) {
            const auto policy = local_first ? Placement::Policy::kLocalFirst : Placement::Policy::kSpread;
            return std::const_pointer_cast<Placement>(Placement::from_lists(hosted, num_experts, policy));
          },
          nb::arg("hosted"), nb::arg("num_experts"), nb::arg("local_first") = false)
      .def_prop_ro("num_experts", &Placement::num_experts)
      .def_prop_ro("num_ranks", &Placement::num_ranks)
      .def_prop_ro("fingerprint", &Placement::fingerprint)
      .def("num_slots", &Placement::num_slots, nb::arg("rank"))
      .def("expert_at", &Placement::expert_at, nb::arg("rank"), nb::arg("slot"));
}

}  // namespace deep_ep::python
