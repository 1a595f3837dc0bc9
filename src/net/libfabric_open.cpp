// SPDX-License-Identifier: MIT
#include "net/libfabric_open.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>

#include "check.h"
#include "net/interface.h"

namespace deep_ep::net {

namespace {

// Best first. Others, shm among them (it reaches this machine only), are used where they are named.
constexpr std::array kPreferred = {"cxi", "efa", "verbs;ofi_rxm", "tcp;ofi_rxm", "tcp"};

const LibfabricLibrary& lib() { return LibfabricLibrary::get(); }

std::string provider_of(const fi_info& info) { return info.fabric_attr->prov_name; }

// What the engine can live with; the provider picks from it.
InfoPtr hints_for(const char* provider) {
  InfoPtr hints(lib().dupinfo(nullptr));
  if (!hints) throw Error(ErrorCode::kSystem, "libfabric: fi_allocinfo: no memory");
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;  // one thread calls us
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->domain_attr->av_type = FI_AV_TABLE;
  if (provider != nullptr) hints->fabric_attr->prov_name = strdup(provider);  // freed with the hints
  return hints;
}

InfoPtr ask(const fi_info& hints) {
  fi_info* found = nullptr;
  const int result = lib().getinfo(kLibfabricVersion, nullptr, nullptr, 0, &hints, &found);
  return InfoPtr(result == 0 ? found : nullptr);
}

std::string ip_address_of(const fi_info& info) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (info.src_addr == nullptr) return "";
  if (info.addr_format == FI_SOCKADDR_IN) {
    const auto* address = static_cast<const sockaddr_in*>(info.src_addr);
    inet_ntop(AF_INET, &address->sin_addr, text.data(), text.size());
  } else if (info.addr_format == FI_SOCKADDR_IN6) {
    const auto* address = static_cast<const sockaddr_in6*>(info.src_addr);
    inet_ntop(AF_INET6, &address->sin6_addr, text.data(), text.size());
  }
  return text.data();
}

std::string place_of(const fi_info& info, const std::string& name) {
  if (info.nic != nullptr && info.nic->bus_attr != nullptr && info.nic->bus_attr->bus_type == FI_BUS_PCI) {
    const fi_pci_attr& pci = info.nic->bus_attr->attr.pci;
    return place_of_pci_device(
        fmt::format("{:04x}:{:02x}:{:02x}.{:x}", pci.domain_id, pci.bus_id, pci.device_id, pci.function_id));
  }
  return place_of_interface(name);
}

Interface interface_of(const fi_info& info) {
  Interface interface;
  interface.name = info.domain_attr->name != nullptr ? info.domain_attr->name : "";
  interface.address = ip_address_of(info);
  interface.device = place_of(info, interface.name);
  interface.is_loopback =
      interface.name == "lo" || interface.address.rfind("127.", 0) == 0 || interface.address == "::1";
  return interface;
}

// IPv6 where that is what was asked for, else the format that all have.
bool is_wanted_format(const fi_info& info, const std::string& wanted) {
  return info.addr_format != FI_SOCKADDR_IN6 || wanted.find(':') != std::string::npos;
}

// What a provider found, with the interface of each.
struct Ways {
  std::vector<const fi_info*> infos;
  std::vector<Interface> interfaces;
};

Ways ways_of(const fi_info* found, const std::string& provider, const std::string& wanted) {
  Ways ways;
  for (const fi_info* info = found; info != nullptr; info = info->next) {
    if (provider_of(*info) != provider || !is_wanted_format(*info, wanted)) continue;
    ways.infos.push_back(info);
    ways.interfaces.push_back(interface_of(*info));
  }
  return ways;
}

struct Choice {
  InfoPtr info;
  std::string interface;
};

Choice choose(const NetworkConfig& settings) {
  InfoPtr hints = hints_for(settings.provider.c_str());
  if (settings.traffic_class >= 0)
    hints->tx_attr->tclass = fi_tc_dscp_set(static_cast<std::uint8_t>(settings.traffic_class >> 2));
  InfoPtr found = ask(*hints);
  if (!found) {
    hints->tx_attr->tclass = 0;  // a provider that refuses the class; the report says that it is not applied
    found = ask(*hints);
  }
  if (!found)
    throw Error(ErrorCode::kUnsupported, fmt::format("network.provider: '{}' is not here", settings.provider));
  const Ways ways = ways_of(found.get(), settings.provider, settings.interface);
  const std::string near = settings.near_pci_device.empty() ? "" : place_of_pci_device(settings.near_pci_device);
  const ChosenInterface chosen = choose_interface(ways.interfaces, settings.interface, near);
  const Interface& interface = ways.interfaces[chosen.index];
  const std::string address = interface.address.empty() ? "" : fmt::format(", {}", interface.address);
  return {InfoPtr(lib().dupinfo(ways.infos[chosen.index])),
          fmt::format("{} ({}{})", interface.name, chosen.reason, address)};
}

template <typename T, typename Open>
FidPtr<T> opened(const char* call, const Open& open) {
  T* object = nullptr;
  require_ok(open(&object), call);
  return FidPtr<T>(object);
}

// A queue that one can sleep on where the provider has such, else one to poll.
FidPtr<fid_cq> open_queue(LibfabricObjects& all) {
  fi_cq_attr attributes{};
  attributes.format = FI_CQ_FORMAT_DATA;
  attributes.size = all.info->tx_attr->size + all.info->rx_attr->size;
  attributes.wait_obj = FI_WAIT_FD;
  fid_cq* queue = nullptr;
  if (fi_cq_open(all.domain.get(), &attributes, &queue, nullptr) == 0) {
    FidPtr<fid_cq> owner(queue);
    if (fi_control(&queue->fid, FI_GETWAIT, &all.wait_fd) == 0 && all.wait_fd >= 0) return owner;
    all.wait_fd = -1;
  }
  attributes.wait_obj = FI_WAIT_NONE;
  return opened<fid_cq>("fi_cq_open",
                        [&](fid_cq** out) { return fi_cq_open(all.domain.get(), &attributes, out, nullptr); });
}

}  // namespace

void require_ok(std::int64_t result, const char* call) {
  if (result != 0) throw Error(ErrorCode::kSystem, fmt::format("libfabric: {}: {}", call, lib().text(result)));
}

std::vector<std::string> libfabric_providers(const std::string& wanted) {
  const auto& found = LibfabricLibrary::find();
  if (found.library == nullptr) throw Error(ErrorCode::kUnsupported, "libfabric: " + found.why_not);
  std::vector<std::string> names;
  const InfoPtr all = ask(*hints_for(nullptr));
  for (const fi_info* info = all.get(); info != nullptr; info = info->next)
    if (std::find(names.begin(), names.end(), provider_of(*info)) == names.end()) names.push_back(provider_of(*info));
  std::vector<std::string> chosen;
  if (wanted.empty()) {
    for (const char* name : kPreferred)
      if (std::find(names.begin(), names.end(), name) != names.end()) chosen.emplace_back(name);
  } else if (std::find(names.begin(), names.end(), wanted) != names.end()) {
    chosen.push_back(wanted);
  } else {
    std::copy_if(names.begin(), names.end(), std::back_inserter(chosen),
                 [&](const std::string& name) { return name.rfind(wanted + ";", 0) == 0; });
  }
  if (!chosen.empty()) return chosen;
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("network.provider: '{}' is not among those that this machine's libfabric has: {}",
                          wanted.empty() ? "automatic" : wanted, list));
}

std::vector<Interface> libfabric_interfaces(const std::string& provider) {
  const InfoPtr found = ask(*hints_for(provider.c_str()));
  std::vector<Interface> each;  // a provider lists one interface several times, with different abilities
  for (Interface& interface : ways_of(found.get(), provider, "").interfaces)
    if (std::find(each.begin(), each.end(), interface) == each.end()) each.push_back(std::move(interface));
  return each;
}

LibfabricObjects open_libfabric_objects(const NetworkConfig& settings) {
  LibfabricObjects all;
  Choice choice = choose(settings);
  all.info = std::move(choice.info);
  all.interface = std::move(choice.interface);
  fi_info* info = all.info.get();
  all.fabric =
      opened<fid_fabric>("fi_fabric", [&](fid_fabric** out) { return lib().fabric(info->fabric_attr, out, nullptr); });
  all.domain = opened<fid_domain>("fi_domain",
                                  [&](fid_domain** out) { return fi_domain(all.fabric.get(), info, out, nullptr); });
  fi_av_attr table{};
  table.type = FI_AV_TABLE;
  all.addresses =
      opened<fid_av>("fi_av_open", [&](fid_av** out) { return fi_av_open(all.domain.get(), &table, out, nullptr); });
  all.completions = open_queue(all);
  all.endpoint =
      opened<fid_ep>("fi_endpoint", [&](fid_ep** out) { return fi_endpoint(all.domain.get(), info, out, nullptr); });
  require_ok(fi_ep_bind(all.endpoint.get(), &all.addresses->fid, 0), "fi_ep_bind (addresses)");
  require_ok(fi_ep_bind(all.endpoint.get(), &all.completions->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind (completions)");
  require_ok(fi_enable(all.endpoint.get()), "fi_enable");
  return all;
}

std::vector<AppliedKnob> libfabric_knobs(const NetworkConfig& settings, const fi_info& info) {
  const std::string provider = provider_of(info);
  const auto not_applied = [&](const char* why) { return fmt::format("not applied: {}: {}", provider, why); };
  const bool is_verbs = provider.rfind("verbs", 0) == 0;
  const bool is_cxi = provider.rfind("cxi", 0) == 0;
  std::vector<AppliedKnob> knobs;
  const char* level = is_verbs ? "the subnet manager's path record, or RDMA-CM's type of service, decides the level"
                               : "it has no service levels";
  if (settings.service_level >= 0)
    knobs.push_back({"service_level", fmt::format("{}", settings.service_level), not_applied(level)});
  if (settings.traffic_class >= 0) {
    // Verbs takes the value and drops it; only a provider that is known to use it is believed.
    const bool is_taken = is_cxi && info.tx_attr->tclass != 0;
    knobs.push_back({"traffic_class", fmt::format("{}", settings.traffic_class),
                     is_taken ? "applied" : not_applied("it does not use libfabric's traffic class")});
  }
  if (settings.adaptive_routing >= 0)
    knobs.push_back({"adaptive_routing", settings.adaptive_routing == 1 ? "preferred" : "not preferred",
                     not_applied(is_verbs ? level : "the fabric decides its routing")});
  knobs.push_back({"bytes_in_flight", fmt::format("{}", settings.bytes_in_flight), "applied"});
  return knobs;
}

}  // namespace deep_ep::net
