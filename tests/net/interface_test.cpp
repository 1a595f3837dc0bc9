// SPDX-License-Identifier: MIT
// Which interface is chosen, on machines that are only described here.
#include "net/interface.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "deep_ep/error.h"

namespace deep_ep::net {
namespace {

using ::testing::HasSubstr;

const std::string kRoot = "/sys/devices/pci0000:1b/0000:1b:01.0/";
const std::string kGpu = kRoot + "0000:17:00.0/0000:18:00.0/0000:19:00.0";

std::vector<Interface> two_nics() {
  return {{"lo", "127.0.0.1", "", true},
          {"mlx5_0", "", "/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0", false},
          {"mlx5_1", "", kRoot + "0000:17:00.0/0000:18:01.0/0000:1a:00.0", false},
          {"eth0", "10.0.0.7", kRoot + "0000:20:00.0", false}};
}

TEST(interface, distances_on_the_pcie_tree_count_steps_and_another_root_is_farther_than_any) {
  EXPECT_EQ(pcie_distance(kGpu, kGpu), 0);
  EXPECT_EQ(pcie_distance(kGpu, two_nics()[2].device), 4);
  EXPECT_EQ(pcie_distance(kGpu, two_nics()[3].device), 4);
  EXPECT_GT(pcie_distance(kGpu, two_nics()[1].device), 1000);
  EXPECT_EQ(pcie_distance(kGpu, two_nics()[1].device), pcie_distance(two_nics()[1].device, kGpu));
}

TEST(interface, the_nearest_is_chosen_and_the_reason_says_so) {
  const ChosenInterface chosen = choose_interface(two_nics(), "", kGpu);
  EXPECT_EQ(chosen.index, 2);
  EXPECT_EQ(chosen.reason, "PCIe distance 4 to 0000:19:00.0");
}

TEST(interface, without_a_device_it_is_the_providers_first_and_loopback_only_where_it_is_alone) {
  EXPECT_EQ(choose_interface(two_nics(), "", "").index, 1);
  EXPECT_EQ(choose_interface({two_nics()[0]}, "", "").index, 0);
}

TEST(interface, a_named_one_is_taken_by_name_or_address_and_an_unknown_one_refused) {
  EXPECT_EQ(choose_interface(two_nics(), "mlx5_0", kGpu).index, 1);
  EXPECT_EQ(choose_interface(two_nics(), "10.0.0.7", kGpu).index, 3);
  EXPECT_EQ(choose_interface(two_nics(), "lo", kGpu).index, 0);
  EXPECT_EQ(choose_interface({{"rdmap0s6-rdm", "", "", false}}, "rdmap0s6", "").index, 0);
  try {
    choose_interface(two_nics(), "ib7", kGpu);
    FAIL() << "ib7 was found";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("'ib7' is not among lo (127.0.0.1), mlx5_0, mlx5_1, eth0 (10.0.0.7)"));
  }
  EXPECT_THROW(choose_interface({}, "", ""), Error);
}

TEST(interface, places_are_read_from_sysfs) {
  namespace fs = std::filesystem;
  const fs::path sys = fs::path(::testing::TempDir()) / "sys_of_interface_test";
  fs::remove_all(sys);
  const fs::path device = sys / "devices/pci0000:1b/0000:1b:01.0";
  fs::create_directories(device);
  for (const char* folder : {"bus/pci/devices", "class/net/eth7", "class/infiniband/mlx5_3"})
    fs::create_directories(sys / folder);
  fs::create_directory_symlink(device, sys / "bus/pci/devices/0000:1b:01.0");
  fs::create_directory_symlink(device, sys / "class/net/eth7/device");
  fs::create_directory_symlink(device, sys / "class/infiniband/mlx5_3/device");
  const std::string expected = fs::canonical(device).string();
  EXPECT_EQ(place_of_pci_device("0000:1b:01.0", sys), expected);
  EXPECT_EQ(place_of_pci_device("00000000:1B:01.0", sys), expected);
  EXPECT_EQ(place_of_interface("eth7", sys), expected);
  EXPECT_EQ(place_of_interface("mlx5_3-rdm", sys), expected);
  EXPECT_EQ(place_of_interface("veth0", sys), "");
  fs::remove_all(sys);
}

}  // namespace
}  // namespace deep_ep::net
