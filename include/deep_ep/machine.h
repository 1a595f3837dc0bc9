// SPDX-License-Identifier: MIT
// What this machine has for a buffer, and what is missing: found without opening one. `python -m deep_ep` prints it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep {

/// A GPU, as this process numbers it.
struct GpuInfo {
  int device = 0;
  std::string name;            // "NVIDIA H200"
  std::string pci_address;     // "0000:1b:00.0"
  int compute_capability = 0;  // 90 for sm_90
  int num_sms = 0;
  std::int64_t memory_bytes = 0;
  std::string sharing;            // how other processes get at its memory: "descriptor", "fabric" or "ipc"
  std::vector<int> peers;         // GPUs whose memory its kernels can reach
  std::vector<int> atomic_peers;  // of these, where the way has atomic operations: NVLink has, PCIe mostly not
};

/// A way between machines: a network interface as a provider of libfabric names it.
struct InterfaceInfo {
  std::string provider;  // "tcp;ofi_rxm"
  std::string name;      // "eth0", "mlx5_0"
  std::string address;   // an IP address, or empty
};

struct Machine {
  std::string version;         // of this library
  int num_cores = 0;           // that this process may use
  std::string row_arithmetic;  // of CPU rows: "baseline", "v3" (AVX2) or "v4" (AVX-512)
  std::vector<GpuInfo> gpus;
  std::vector<InterfaceInfo> interfaces;  // those of the best provider first
  /// What is not there, and what that costs: a sentence each, for people.
  std::vector<std::string> missing;
  /// A few lines for people, `missing` among them.
  std::string to_string() const;
};

/// Looks at CPU, GPUs and network. What is not there is in `missing`; throws kInvalidArgument where an environment
/// variable of this library is malformed.
Machine inspect_machine();

}  // namespace deep_ep
