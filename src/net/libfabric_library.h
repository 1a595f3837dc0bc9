// SPDX-License-Identifier: MIT
// libfabric, opened when it is first asked for: built with its headers, never linked. So one build of this library (a
// wheel, a package) works on machines with libfabric and without. Only these functions are symbols; all else goes
// through the tables of functions that they return.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_errno.h>

#include <cstdint>
#include <string>

namespace deep_ep::net {

struct LibfabricLibrary {
  decltype(&::fi_getinfo) getinfo = nullptr;
  decltype(&::fi_freeinfo) freeinfo = nullptr;
  decltype(&::fi_dupinfo) dupinfo = nullptr;
  decltype(&::fi_fabric) fabric = nullptr;
  decltype(&::fi_strerror) strerror = nullptr;
  decltype(&::fi_version) version = nullptr;

  /// The library of this machine, or why there is none. Once per process.
  struct Found {
    const LibfabricLibrary* library = nullptr;
    std::string why_not;
  };
  static const Found& find();

  /// The same where it is known to be there.
  static const LibfabricLibrary& get() { return *find().library; }
  /// Of a negative result.
  std::string text(std::int64_t result) const { return strerror(static_cast<int>(-result)); }
};

/// The version of the interface that we speak: the headers' one.
inline constexpr std::uint32_t kLibfabricVersion = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);

}  // namespace deep_ep::net
