// SPDX-License-Identifier: MIT
#include "net/engines.h"

#include "deep_ep/error.h"
#include "net/loopback.h"
#if defined(EP_WITH_LIBFABRIC)
#include "net/libfabric.h"
#include "net/libfabric_open.h"
#endif

namespace deep_ep::net {

namespace {
constexpr const char* kLoopback = "loopback";
}  // namespace

std::vector<std::string> available_providers(const NetworkConfig& settings) {
  if (settings.provider == kLoopback) return {kLoopback};
  const std::string wanted = settings.provider == "auto" ? "" : settings.provider;
#if defined(EP_WITH_LIBFABRIC)
  return libfabric_providers(wanted);
#else
  throw Error(ErrorCode::kUnsupported, "network.provider: '" + wanted +
                                           "': this library was built without libfabric's headers; it has only "
                                           "'loopback', for ranks that are threads");
#endif
}

std::vector<Offer> offers() {
  std::vector<Offer> all;
  for (const std::string& provider : available_providers({})) {
#if defined(EP_WITH_LIBFABRIC)
    all.push_back({provider, libfabric_interfaces(provider)});
#endif
  }
  return all;
}

std::unique_ptr<Fabric> open_engine(const EngineInput& input) {
#if defined(EP_WITH_LIBFABRIC)
  if (input.settings.provider != kLoopback) return open_libfabric(input);
#endif
  return LoopbackNetwork::of_job(input.job, input.num_ranks)->open(input.rank);
}

}  // namespace deep_ep::net
