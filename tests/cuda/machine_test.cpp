// SPDX-License-Identifier: MIT
// What is told of a machine's GPUs.
#include "deep_ep/machine.h"

#include <gmock/gmock.h>

#include "cuda/gpu.h"

namespace deep_ep::test {
namespace {

TEST(CudaMachine, names_each_gpu_with_what_it_can_do) {
  EP_NEEDS_GPU();
  const Machine machine = inspect_machine();
  int count = 0;
  gpu(cudaGetDeviceCount(&count));
  ASSERT_EQ(static_cast<int>(machine.gpus.size()), count);
  for (const GpuInfo& info : machine.gpus) {
    cudaDeviceProp properties;
    gpu(cudaGetDeviceProperties(&properties, info.device));
    EXPECT_EQ(info.name, properties.name);
    EXPECT_EQ(info.num_sms, properties.multiProcessorCount);
    EXPECT_EQ(info.compute_capability, 10 * properties.major + properties.minor);
    EXPECT_EQ(info.memory_bytes, static_cast<std::int64_t>(properties.totalGlobalMem));
    EXPECT_EQ(info.pci_address.size(), std::string("0000:1b:00.0").size());
    EXPECT_THAT(info.sharing, testing::AnyOf("descriptor", "fabric", "ipc"));
    EXPECT_THAT(info.peers,
                testing::Each(testing::AllOf(testing::Ge(0), testing::Lt(count), testing::Ne(info.device))));
    EXPECT_THAT(info.peers, testing::IsSupersetOf(info.atomic_peers));
  }
}

}  // namespace
}  // namespace deep_ep::test
