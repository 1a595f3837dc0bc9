// SPDX-License-Identifier: MIT
#include "cuda/gpus.h"

#include <cuda_runtime.h>

#include "cuda/failure.h"
#include "cuda/window.h"

namespace deep_ep::cuda {

namespace {

void find_peers(GpuInfo& gpu, int count) {
  for (int peer = 0; peer < count; ++peer) {
    int reachable = 0, has_atomics = 0;
    if (peer == gpu.device) continue;
    check(cudaDeviceCanAccessPeer(&reachable, gpu.device, peer), "cudaDeviceCanAccessPeer");
    if (reachable == 0) continue;
    gpu.peers.push_back(peer);
    check(cudaDeviceGetP2PAttribute(&has_atomics, cudaDevP2PAttrNativeAtomicSupported, gpu.device, peer),
          "cudaDeviceGetP2PAttribute");
    if (has_atomics != 0) gpu.atomic_peers.push_back(peer);
  }
}

GpuInfo gpu_of(int device, int count) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  GpuInfo gpu;
  gpu.device = device;
  gpu.name = properties.name;
  gpu.pci_address = pci_address(device);
  gpu.compute_capability = 10 * properties.major + properties.minor;
  gpu.num_sms = properties.multiProcessorCount;
  gpu.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  gpu.sharing = name(choose_sharing(device, false));
  find_peers(gpu, count);
  return gpu;
}

}  // namespace

std::string pci_address(int device) {
  char address[32] = {};
  check(cudaDeviceGetPCIBusId(address, sizeof address, device), "cudaDeviceGetPCIBusId");
  return address;
}

std::vector<GpuInfo> gpus() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<GpuInfo> all;
  for (int device = 0; device < count; ++device) all.push_back(gpu_of(device, count));
  return all;
}

}  // namespace deep_ep::cuda
