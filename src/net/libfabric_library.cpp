// SPDX-License-Identifier: MIT
#include "net/libfabric_library.h"

#include <dlfcn.h>

#include "deep_ep/error.h"

namespace deep_ep::net {

namespace {

// fi_info has grown over the years, and the library keeps one version of these functions for each of its shapes. The
// headers know only theirs; up to libfabric 1.19 that is this one, and a newer library still has it.
#if FI_MAJOR_VERSION == 1 && FI_MINOR_VERSION < 20
constexpr const char* kInfoVersion = "FABRIC_1.3";
#else
constexpr const char* kInfoVersion = nullptr;  // the library's newest
#endif

template <typename Function>
bool load(void* handle, const char* name, const char* version, Function& function) {
  void* found = version != nullptr ? dlvsym(handle, name, version) : dlsym(handle, name);
  function = reinterpret_cast<Function>(found);
  return found != nullptr;
}

LibfabricLibrary::Found open() {
  // Never closed: providers start threads and keep state until the process ends.
  void* handle = dlopen("libfabric.so.1", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return {nullptr, dlerror()};
  static LibfabricLibrary library;
  const bool complete =
      load(handle, "fi_getinfo", kInfoVersion, library.getinfo) &&
      load(handle, "fi_freeinfo", kInfoVersion, library.freeinfo) &&
      load(handle, "fi_dupinfo", kInfoVersion, library.dupinfo) && load(handle, "fi_fabric", nullptr, library.fabric) &&
      load(handle, "fi_strerror", nullptr, library.strerror) && load(handle, "fi_version", nullptr, library.version);
  if (!complete) return {nullptr, "libfabric.so.1 lacks a function of the version that this build knows"};
  return {&library, ""};
}

}  // namespace

const LibfabricLibrary::Found& LibfabricLibrary::find() {
  static const Found found = open();
  return found;
}

}  // namespace deep_ep::net
