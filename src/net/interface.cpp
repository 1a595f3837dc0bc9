// SPDX-License-Identifier: MIT
#include "net/interface.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <optional>
#include <system_error>
#include <tuple>

#include "check.h"

namespace deep_ep::net {

namespace {

std::vector<std::string> steps_of(const std::string& place) {
  std::vector<std::string> steps;
  for (const auto& step : std::filesystem::path(place)) steps.push_back(step.string());
  return steps;
}

std::string resolved(const std::filesystem::path& link) {
  std::error_code error;
  const auto place = std::filesystem::canonical(link, error);
  return error ? "" : place.string();
}

// As /sys spells it. CUDA and nvidia-smi write capitals, the latter eight digits of the domain.
std::string spelt_as_in_sys(std::string address) {
  std::transform(address.begin(), address.end(), address.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (address.find(':') == 8 && address.rfind("0000", 0) == 0) address.erase(0, 4);
  return address;
}

// "mlx5_0-rdm" and "mlx5_0" are the same device.
bool is_named(const Interface& interface, const std::string& wanted) {
  return interface.name == wanted || interface.address == wanted || interface.name.rfind(wanted + "-", 0) == 0;
}

std::string list(const std::vector<Interface>& interfaces) {
  std::string text;
  for (const Interface& interface : interfaces)
    text +=
        (text.empty() ? "" : ", ") + interface.name + (interface.address.empty() ? "" : " (" + interface.address + ")");
  return text;
}

}  // namespace

int pcie_distance(const std::string& a, const std::string& b) {
  constexpr int kOtherRoot = 1000;
  const auto steps_a = steps_of(a), steps_b = steps_of(b);
  const auto [end_a, end_b] = std::mismatch(steps_a.begin(), steps_a.end(), steps_b.begin(), steps_b.end());
  const auto left = static_cast<int>(steps_a.end() - end_a + (steps_b.end() - end_b));
  // "/", "sys", "devices" and the root complex are the first four.
  const bool same_root = end_a - steps_a.begin() >= 4;
  return same_root ? left : kOtherRoot + left;
}

std::string place_of_pci_device(const std::string& address, const std::string& sys) {
  return resolved(std::filesystem::path(sys) / "bus/pci/devices" / spelt_as_in_sys(address));
}

std::string place_of_interface(const std::string& name, const std::string& sys) {
  std::string place = resolved(std::filesystem::path(sys) / "class/net" / name / "device");
  if (!place.empty()) return place;
  const std::string device = name.substr(0, name.find('-'));
  return resolved(std::filesystem::path(sys) / "class/infiniband" / device / "device");
}

ChosenInterface choose_interface(const std::vector<Interface>& interfaces, const std::string& wanted,
                                 const std::string& near) {
  require(!interfaces.empty(), "network.interface: the provider has none");
  if (!wanted.empty()) {
    const auto found = std::find_if(interfaces.begin(), interfaces.end(),
                                    [&](const Interface& interface) { return is_named(interface, wanted); });
    require(found != interfaces.end(), "network.interface: '{}' is not among {}", wanted, list(interfaces));
    return {static_cast<int>(found - interfaces.begin()), "as asked"};
  }
  const auto cost = [&](const Interface& interface) {
    const bool known = !near.empty() && !interface.device.empty();
    return std::tuple(interface.is_loopback, !known, known ? pcie_distance(interface.device, near) : 0);
  };
  const auto best = std::min_element(interfaces.begin(), interfaces.end(),
                                     [&](const Interface& a, const Interface& b) { return cost(a) < cost(b); });
  const bool known = !std::get<1>(cost(*best));
  return {static_cast<int>(best - interfaces.begin()),
          known ? fmt::format("PCIe distance {} to {}", std::get<2>(cost(*best)),
                              std::filesystem::path(near).filename().string())
                : fmt::format("the provider's first of {}", interfaces.size())};
}

}  // namespace deep_ep::net
