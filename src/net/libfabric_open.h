// SPDX-License-Identifier: MIT
// libfabric's objects, opened and owned: which provider and interface, fabric, domain, endpoint, queue of completions.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>

#include <memory>
#include <string>
#include <vector>

#include "net/engines.h"
#include "net/libfabric_library.h"

namespace deep_ep::net {

struct FreeInfo {
  void operator()(fi_info* info) const { LibfabricLibrary::get().freeinfo(info); }
};
using InfoPtr = std::unique_ptr<fi_info, FreeInfo>;

/// Throws kSystem naming the call unless it returned 0.
void require_ok(std::int64_t result, const char* call);

/// Closes an object of libfabric, whatever its type.
template <typename T>
struct CloseFid {
  void operator()(T* object) const { fi_close(&object->fid); }
};
template <typename T>
using FidPtr = std::unique_ptr<T, CloseFid<T>>;

/// The names of libfabric's providers that can do what we need, best first. With a name wanted, only those that it
/// names: "tcp" names "tcp;ofi_rxm", as long as none is called "tcp" itself.
std::vector<std::string> libfabric_providers(const std::string& wanted);

/// What one of them could go through, as it lists them.
std::vector<Interface> libfabric_interfaces(const std::string& provider);

/// An endpoint that is ready for addresses. Destroyed from the last member to the first.
struct LibfabricObjects {
  InfoPtr info;
  std::string interface;  // as FabricReport has it
  FidPtr<fid_fabric> fabric;
  FidPtr<fid_domain> domain;
  FidPtr<fid_av> addresses;
  FidPtr<fid_cq> completions;
  FidPtr<fid_ep> endpoint;
  int wait_fd = -1;

  bool needs(int mr_mode_bit) const { return (info->domain_attr->mr_mode & mr_mode_bit) != 0; }
};

LibfabricObjects open_libfabric_objects(const NetworkConfig& settings);

/// What became of each setting that the caller made.
std::vector<AppliedKnob> libfabric_knobs(const NetworkConfig& settings, const fi_info& info);

}  // namespace deep_ep::net
