// SPDX-License-Identifier: MIT
// The two meetings of ranks that open a buffer.
#include "introduction.h"

#include <gtest/gtest.h>

#include "ranks.h"

namespace deep_ep::test {
namespace {

struct Address {
  int number = 0;
};
struct LongAddress {
  char bytes[5000] = {};
};

TEST(Introduction, every_rank_learns_every_address) {
  const auto outcomes = run_threads(3, [](int rank, const std::shared_ptr<Bootstrap>& group) {
    const auto addresses = exchange_addresses(*group, Address{100 + rank}, small_config());
    ASSERT_EQ(addresses.size(), 3U);
    for (int peer = 0; peer < 3; ++peer) EXPECT_EQ(addresses[peer].number, 100 + peer);
  });
  for (const Outcome& outcome : outcomes) EXPECT_FALSE(outcome.failed) << outcome.message;
}

TEST(Introduction, configurations_that_differ_are_named_on_every_rank) {
  const auto outcomes = run_threads(2, [](int rank, const std::shared_ptr<Bootstrap>& group) {
    Config config = small_config();
    config.max_experts = 10 + rank;
    exchange_addresses(*group, Address{}, config);
  });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(outcomes[rank].code, ErrorCode::kInvalidArgument);
    const std::string named = "config differs: rank " + std::to_string(rank) +
                              " has max_experts = " + std::to_string(10 + rank) + ", rank " + std::to_string(1 - rank);
    EXPECT_NE(outcomes[rank].message.find(named), std::string::npos) << outcomes[rank].message;
  }
}

TEST(Introduction, an_address_that_is_too_short_is_another_backends) {
  const auto outcomes = run_threads(2, [](int rank, const std::shared_ptr<Bootstrap>& group) {
    if (rank == 0) exchange_addresses(*group, LongAddress{}, small_config());
    if (rank == 1) exchange_addresses(*group, Address{}, small_config());
  });
  EXPECT_EQ(outcomes[0].code, ErrorCode::kInvalidArgument);
  EXPECT_NE(outcomes[0].message.find("do all ranks open the same backend?"), std::string::npos) << outcomes[0].message;
}

TEST(Introduction, a_rank_that_cannot_open_stops_all_with_its_own_code) {
  const auto outcomes = run_threads(3, [](int rank, const std::shared_ptr<Bootstrap>& group) {
    std::optional<Error> failure;
    if (rank == 1) failure = Error(ErrorCode::kUnsupported, "process 812 is on another machine");
    failure = first_failure(*group, failure, small_config().open_timeout);
    if (failure) throw *failure;
  });
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.code, ErrorCode::kUnsupported);
    EXPECT_EQ(outcome.message, "unsupported: rank 1 could not open the buffer: process 812 is on another machine");
  }
}

TEST(Introduction, where_all_could_open_nobody_fails) {
  run_threads(2, [](int, const std::shared_ptr<Bootstrap>& group) {
    EXPECT_FALSE(first_failure(*group, {}, small_config().open_timeout));
  });
}

}  // namespace
}  // namespace deep_ep::test
