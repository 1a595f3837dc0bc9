// SPDX-License-Identifier: MIT
// What a machine has, as it is told before a buffer opens.
#include "deep_ep/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "deep_ep/version.h"

namespace deep_ep::test {
namespace {

using testing::HasSubstr;

bool is_missing(const Machine& machine, const std::string& what) {
  return std::any_of(machine.missing.begin(), machine.missing.end(),
                     [&](const std::string& sentence) { return sentence.rfind(what, 0) == 0; });
}

TEST(Machine, has_its_parts_or_says_what_is_missing) {
  const Machine machine = inspect_machine();
  EXPECT_EQ(machine.version, DEEP_EP_VERSION);
  EXPECT_GE(machine.num_cores, 1);
  EXPECT_THAT(machine.row_arithmetic, testing::AnyOf("baseline", "v3", "v4"));
  EXPECT_EQ(machine.gpus.empty(), is_missing(machine, "GPUs: "));
  EXPECT_TRUE(!machine.interfaces.empty() || is_missing(machine, "Several machines: "));
}

TEST(Machine, names_each_interface_of_a_provider_once) {
  const Machine machine = inspect_machine();
  std::vector<std::string> names;
  for (const InterfaceInfo& interface : machine.interfaces)
    names.push_back(interface.provider + " " + interface.name + " " + interface.address);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end()) << machine.to_string();
}

TEST(Machine, prints_all_that_it_knows) {
  Machine machine;
  machine.version = "1.2.3";
  machine.num_cores = 7;
  machine.row_arithmetic = "v3";
  machine.gpus = {{.device = 0,
                   .name = "A GPU",
                   .pci_address = "0000:1b:00.0",
                   .compute_capability = 90,
                   .num_sms = 132,
                   .memory_bytes = std::int64_t{3} << 29,
                   .sharing = "descriptor",
                   .peers = {1, 2},
                   .atomic_peers = {1}}};
  machine.interfaces = {{"verbs;ofi_rxm", "mlx5_0", ""}, {"tcp;ofi_rxm", "eth0", "10.0.0.2"}};
  machine.missing = {"A thing: it costs time."};
  EXPECT_EQ(
      machine.to_string(),
      "deep_ep   1.2.3\n"
      "CPU       7 cores, row arithmetic v3\n"
      "GPU 0     A GPU, sm_90, 132 SMs, 1.5 GiB, PCI 0000:1b:00.0; memory shared by descriptor; reaches GPU 1, 2\n"
      "network   verbs;ofi_rxm: mlx5_0\n"
      "network   tcp;ofi_rxm: eth0 (10.0.0.2)\n"
      "missing   A thing: it costs time.\n");
}

}  // namespace
}  // namespace deep_ep::test
