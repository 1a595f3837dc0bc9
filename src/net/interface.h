// SPDX-License-Identifier: MIT
// Which network interface a rank uses: the one that is named, or the one nearest by PCIe to its device.
#pragma once

#include <string>
#include <vector>

namespace deep_ep::net {

/// One way into the network, as a provider lists it.
struct Interface {
  std::string name;     // "eth0", "mlx5_0", "mlx5_0-rdm"
  std::string address;  // an IP address, or empty
  std::string device;   // its place in /sys/devices, or empty
  bool is_loopback = false;
  bool operator==(const Interface&) const = default;
};

struct ChosenInterface {
  int index = -1;
  std::string reason;  // for people
};

/// Steps on the PCIe tree between two places in /sys/devices: up from one to the first that they share, down to the
/// other. Devices of different root complexes are farther apart than any of the same.
int pcie_distance(const std::string& a, const std::string& b);

/// Where a PCI device ("0000:1b:00.0", or as CUDA and nvidia-smi write it), a network interface or an RDMA device lies
/// in /sys/devices; empty if it is no such thing.
std::string place_of_pci_device(const std::string& address, const std::string& sys = "/sys");
std::string place_of_interface(const std::string& name, const std::string& sys = "/sys");

/// `wanted`: a name or an address, or empty. `near`: a place in /sys/devices, or empty. Of equals the provider's first;
/// the loopback interface only where there is no other. Throws kInvalidArgument naming what there is where `wanted` is
/// not among them.
ChosenInterface choose_interface(const std::vector<Interface>& interfaces, const std::string& wanted,
                                 const std::string& near);

}  // namespace deep_ep::net
