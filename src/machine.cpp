// SPDX-License-Identifier: MIT
#include "deep_ep/machine.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <thread>

#include "deep_ep/error.h"
#include "deep_ep/version.h"
#include "host/rows.h"
#include "net/engines.h"
#ifdef EP_WITH_CUDA
#include "cuda/gpus.h"
#endif

namespace deep_ep {

namespace {

constexpr int kOldestGpu = 80;  // sm_80: what kernels are compiled for

bool has(const std::vector<int>& gpus, int gpu) { return std::find(gpus.begin(), gpus.end(), gpu) != gpus.end(); }

void look_for_gpus(Machine& machine) {
#ifdef EP_WITH_CUDA
  try {
    machine.gpus = cuda::gpus();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) throw;
    machine.missing.push_back(fmt::format("GPUs: {}. Buffers are on CPUs only.", error.what()));
  }
#else
  machine.missing.emplace_back(
      "GPUs: this library was built without CUDA; build it where nvcc is (pip install ., or -DDEEP_EP_CUDA=ON).");
#endif
}

void judge_gpus(Machine& machine) {
  for (const GpuInfo& gpu : machine.gpus) {
    if (gpu.compute_capability < kOldestGpu)
      machine.missing.push_back(fmt::format("GPU {}: it is sm_{}; kernels need sm_{} or later.", gpu.device,
                                            gpu.compute_capability, kOldestGpu));
    if (gpu.sharing == "ipc")
      machine.missing.push_back(
          fmt::format("GPU {}: its driver exports no file descriptors, so between processes a buffer takes all its "
                      "memory when it opens.",
                      gpu.device));
    for (const GpuInfo& peer : machine.gpus) {
      if (peer.device <= gpu.device) continue;
      if (!has(gpu.peers, peer.device))
        machine.missing.push_back(fmt::format(
            "GPUs {} and {} cannot reach each other's memory: they can share a buffer only as two nodes, over a "
            "network (Config::ranks_per_node).",
            gpu.device, peer.device));
      else if (!has(gpu.atomic_peers, peer.device))
        machine.missing.push_back(fmt::format(
            "GPUs {} and {} reach each other without atomics, over PCIe and not NVLink: it works, at the pace of PCIe.",
            gpu.device, peer.device));
    }
  }
}

bool has_rdma(const std::vector<InterfaceInfo>& interfaces) {
  return std::any_of(interfaces.begin(), interfaces.end(),
                     [](const InterfaceInfo& interface) { return interface.provider.rfind("tcp", 0) != 0; });
}

void look_for_network(Machine& machine) {
  try {
    for (const net::Offer& offer : net::offers())
      for (const net::Interface& interface : offer.interfaces)
        machine.interfaces.push_back({offer.provider, interface.name, interface.address});
  } catch (const Error& error) {
    machine.missing.push_back(fmt::format("Several machines: {}. Ranks of one machine need no network.", error.what()));
    return;
  }
  if (!has_rdma(machine.interfaces))
    machine.missing.emplace_back(
        "Several machines: libfabric has no provider with RDMA here (verbs, efa, cxi); rows go through TCP, "
        "which takes processor time.");
}

std::string gpu_line(const GpuInfo& gpu) {
  std::string peers;
  if (!gpu.peers.empty()) peers = fmt::format("; reaches GPU {}", fmt::join(gpu.peers, ", "));
  return fmt::format("GPU {}     {}, sm_{}, {} SMs, {:.1f} GiB, PCI {}; memory shared by {}{}\n", gpu.device, gpu.name,
                     gpu.compute_capability, gpu.num_sms, static_cast<double>(gpu.memory_bytes) / (1 << 30),
                     gpu.pci_address, gpu.sharing, peers);
}

}  // namespace

std::string Machine::to_string() const {
  std::string text =
      fmt::format("deep_ep   {}\nCPU       {} cores, row arithmetic {}\n", version, num_cores, row_arithmetic);
  for (const GpuInfo& gpu : gpus) text += gpu_line(gpu);
  for (const InterfaceInfo& interface : interfaces)
    text += fmt::format("network   {}: {}{}\n", interface.provider, interface.name,
                        interface.address.empty() ? "" : fmt::format(" ({})", interface.address));
  for (const std::string& sentence : missing) text += fmt::format("missing   {}\n", sentence);
  return text;
}

Machine inspect_machine() {
  Machine machine;
  machine.version = DEEP_EP_VERSION;
  machine.num_cores = static_cast<int>(std::thread::hardware_concurrency());
  machine.row_arithmetic = host::row_ops().isa;
  look_for_gpus(machine);
  judge_gpus(machine);
  look_for_network(machine);
  return machine;
}

}  // namespace deep_ep
