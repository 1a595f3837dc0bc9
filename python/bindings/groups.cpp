// SPDX-License-Identifier: MIT
// How ranks meet, from Python: threads of one process, TCP, or the caller's own all-gather of bytes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>

#include "deep_ep/bootstrap.h"
#include "parts.h"

namespace deep_ep::python {

namespace nb = nanobind;

namespace {

nb::bytes to_bytes(const Bootstrap::Blob& blob) { return nb::bytes(blob.data(), blob.size()); }

Bootstrap::Blob to_blob(nb::handle bytes) {
  const nb::bytes given = nb::cast<nb::bytes>(bytes);
  Bootstrap::Blob blob(given.size());
  std::memcpy(blob.data(), given.c_str(), given.size());
  return blob;
}

// Called while a Buffer opens, which has let go of the interpreter lock.
AllGather all_gather_of(nb::object callable) {
  // The object is released under the lock, whoever drops the group last.
  auto* kept = new nb::object(std::move(callable));
  std::shared_ptr<nb::object> function(kept, [](nb::object* object) {
    if (nb::is_alive()) {
      nb::gil_scoped_acquire lock;
      delete object;
    }
  });
  return [function](const Bootstrap::Blob& mine) {
    nb::gil_scoped_acquire lock;
    const nb::object all = (*function)(to_bytes(mine));
    std::vector<Bootstrap::Blob> blobs;
    for (nb::handle bytes : all) blobs.push_back(to_blob(bytes));
    return blobs;
  };
}

}  // namespace

void bind_groups(nb::module_& m) {
  nb::class_<Bootstrap>(m, "Group", "Ranks that can exchange small blobs while a Buffer opens.")
      .def_prop_ro("rank", &Bootstrap::rank)
      .def_prop_ro("num_ranks", &Bootstrap::num_ranks)
      .def(
          "all_gather",
          [](Bootstrap& group, nb::bytes mine, double timeout_secs) {
            const Bootstrap::Blob blob = to_blob(mine);
            std::vector<Bootstrap::Blob> all;
            {
              nb::gil_scoped_release unlocked;
              all = group.all_gather(blob, std::chrono::milliseconds(static_cast<std::int64_t>(timeout_secs * 1000)));
            }
            nb::list result;
            for (const auto& each : all) result.append(to_bytes(each));
            return result;
          },
          nb::arg("mine"), nb::arg("timeout_secs") = 60.0);
  m.def("in_process_group", &in_process_group, nb::arg("num_ranks"));
  m.def(
      "callback_group",
      [](int rank, int num_ranks, nb::object all_gather) {
        return callback_group(rank, num_ranks, all_gather_of(std::move(all_gather)));
      },
      nb::arg("rank"), nb::arg("num_ranks"), nb::arg("all_gather"));
  m.def(
      "tcp_group_from_environment",
      [] {
        const TcpRendezvous where = TcpRendezvous::from_environment();
        nb::gil_scoped_release unlocked;
        return tcp_group(where);
      },
      "Meets the ranks that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE name.");
}

}  // namespace deep_ep::python
