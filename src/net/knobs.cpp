// SPDX-License-Identifier: MIT
// The network's settings, and which environment variable stands for which.
#include <fmt/format.h>

#include "check.h"
#include "deep_ep/config.h"
#include "environment.h"
#include "net/fabric.h"

namespace deep_ep {

namespace {

// The first of two variables that is set; both are read, so that a malformed one is reported either way.
int either(const char* ours, const char* alias, int highest) {
  const int second = environment_int(alias, -1, 0, highest);
  const int first = environment_int(ours, -1, 0, highest);
  return first >= 0 ? first : second;
}

void require_in_range(const char* name, int value, int highest) {
  require(value >= -1 && value <= highest, "network.{} must be from 0 to {}, or -1 for not set: {}", name, highest,
          value);
}

}  // namespace

NetworkConfig NetworkConfig::with_environment() const {
  constexpr int kHighestLevel = 15, kHighestClass = 255, kMostMegabytes = 1 << 20;
  require_in_range("service_level", service_level, kHighestLevel);
  require_in_range("traffic_class", traffic_class, kHighestClass);
  require_in_range("adaptive_routing", adaptive_routing, 1);
  NetworkConfig all = *this;
  if (all.provider.empty()) all.provider = environment("EP_NETWORK_PROVIDER").value_or("");
  if (all.interface.empty()) all.interface = environment("EP_NETWORK_INTERFACE").value_or("");
  const int level = either("EP_OVERRIDE_RDMA_SL", "NVSHMEM_IB_SL", kHighestLevel);
  if (all.service_level < 0) all.service_level = level;
  const int traffic = either("EP_NETWORK_TRAFFIC_CLASS", "NVSHMEM_IB_TRAFFIC_CLASS", kHighestClass);
  if (all.traffic_class < 0) all.traffic_class = traffic;
  const int adaptive = environment_int("NVSHMEM_ENABLE_ADAPTIVE_ROUTING", -1, 0, 1);
  if (all.adaptive_routing < 0) all.adaptive_routing = adaptive;
  const int megabytes = environment_int("EP_NETWORK_MB_IN_FLIGHT", 32, 1, kMostMegabytes);
  if (all.bytes_in_flight == 0) all.bytes_in_flight = static_cast<std::size_t>(megabytes) << 20;
  return all;
}

std::string NetworkConfig::to_string() const {
  return fmt::format(
      "network.provider = '{}'\nnetwork.interface = '{}'\nnetwork.near_pci_device = '{}'\n"
      "network.service_level = {}\nnetwork.traffic_class = {}\nnetwork.adaptive_routing = {}\n"
      "network.bytes_in_flight = {}\n",
      provider, interface, near_pci_device, service_level, traffic_class, adaptive_routing, bytes_in_flight);
}

namespace net {

std::string FabricReport::to_string() const {
  std::string text =
      fmt::format("network.provider = {}\nnetwork.interface = {}\nnetwork.notices = {}\nnetwork.region_keys = {}\n",
                  capabilities.provider, interface,
                  capabilities.immediate_bytes > 0 ? fmt::format("{} bytes with the put", capabilities.immediate_bytes)
                                                   : "a message after a delivered put",
                  capabilities.random_keys ? "random" : "the provider's");
  for (const AppliedKnob& knob : knobs) text += fmt::format("network.{} = {}: {}\n", knob.name, knob.value, knob.state);
  return text;
}

}  // namespace net

}  // namespace deep_ep
