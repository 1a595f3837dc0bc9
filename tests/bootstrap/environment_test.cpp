// SPDX-License-Identifier: MIT
// Where ranks meet, read from the variables of launchers.
#include <cstdlib>

#include "bootstrap/groups.h"

namespace deep_ep::test {
namespace {

class FromEnvironment : public testing::Test {
 protected:
  void SetUp() override { clear(); }
  void TearDown() override { clear(); }

  static void clear() {
    for (const char* name :
         {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "EP_MASTER_PORT"}) {
      unsetenv(name);
    }
  }
  static void set(const char* name, const char* value) { setenv(name, value, 1); }
  static void expect_refusal(const std::string& part) {
    expect_error(catch_error([] { TcpRendezvous::from_environment(); }), ErrorCode::kInvalidArgument, part);
  }
};

TEST_F(FromEnvironment, absent_variables_mean_a_world_of_one) {
  const auto where = TcpRendezvous::from_environment();
  EXPECT_EQ(where.rank, 0);
  EXPECT_EQ(where.num_ranks, 1);
  EXPECT_EQ(where.address, "127.0.0.1");
  EXPECT_EQ(where.port, 29400);
  EXPECT_EQ(tcp_group(where)->num_ranks(), 1);
}

TEST_F(FromEnvironment, all_variables_are_taken) {
  set("MASTER_ADDR", "node7.cluster");
  set("MASTER_PORT", "1234");
  set("RANK", "3");
  set("WORLD_SIZE", "16");
  const auto where = TcpRendezvous::from_environment();
  EXPECT_EQ(where.address, "node7.cluster");
  EXPECT_EQ(where.port, 1234);
  EXPECT_EQ(where.rank, 3);
  EXPECT_EQ(where.num_ranks, 16);
}

TEST_F(FromEnvironment, the_port_of_torchruns_agent_is_left_alone) {
  set("MASTER_PORT", "1234");
  set("TORCHELASTIC_USE_AGENT_STORE", "True");
  EXPECT_EQ(TcpRendezvous::from_environment().port, 1235);
  set("TORCHELASTIC_USE_AGENT_STORE", "False");
  EXPECT_EQ(TcpRendezvous::from_environment().port, 1234);
  set("TORCHELASTIC_USE_AGENT_STORE", "True");
  set("EP_MASTER_PORT", "4321");
  EXPECT_EQ(TcpRendezvous::from_environment().port, 4321);
  unsetenv("EP_MASTER_PORT");
  set("MASTER_PORT", "65535");
  expect_refusal("MASTER_PORT");
}

TEST_F(FromEnvironment, malformed_values_are_named_with_their_variable) {
  for (const char* name : {"MASTER_PORT", "EP_MASTER_PORT", "RANK", "WORLD_SIZE"}) {
    for (const char* value : {"", "x", "12x", " 3", "3.5", "-1", "99999999999999999999"}) {
      clear();
      set(name, value);
      expect_refusal(std::string("environment variable ") + name + ": '" + value + "'");
    }
  }
  clear();
  set("MASTER_PORT", "0");
  expect_refusal("MASTER_PORT: '0'");
  clear();
  set("MASTER_ADDR", "");
  expect_refusal("MASTER_ADDR");
}

TEST_F(FromEnvironment, a_rank_beyond_the_world_is_refused) {
  set("RANK", "4");
  set("WORLD_SIZE", "4");
  expect_refusal("RANK < WORLD_SIZE: 4 vs 4");
  unsetenv("WORLD_SIZE");
  expect_refusal("4 vs 1 (WORLD_SIZE is not set)");
}

}  // namespace
}  // namespace deep_ep::test
