// SPDX-License-Identifier: MIT
// What holds for every kind of group of threads: everybody gets everybody's blobs, and a failed round fails as a whole.
#include "bootstrap/groups.h"

namespace deep_ep::test {
namespace {

enum class Kind { kInProcess, kTcp };

// Gives each rank's thread its member of one group.
class Members {
 public:
  Members(Kind kind, int num_ranks) : port_(free_port()), num_ranks_(num_ranks) {
    if (kind == Kind::kInProcess) entries_ = in_process_group(num_ranks);
  }
  std::shared_ptr<Bootstrap> open(int rank) const {
    return entries_.empty() ? tcp_group(rendezvous(port_, rank, num_ranks_)) : entries_[rank];
  }

 private:
  int port_;
  int num_ranks_;
  std::vector<std::shared_ptr<Bootstrap>> entries_;
};

class Groups : public testing::TestWithParam<std::tuple<Kind, int>> {
 protected:
  Kind kind() const { return std::get<0>(GetParam()); }
  int num_ranks() const { return std::get<1>(GetParam()); }
};

std::string kind_and_size(const testing::TestParamInfo<std::tuple<Kind, int>>& info) {
  return (std::get<0>(info.param) == Kind::kTcp ? "tcp_" : "in_process_") + std::to_string(std::get<1>(info.param));
}

const auto kKinds = testing::Values(Kind::kInProcess, Kind::kTcp);

TEST_P(Groups, every_rank_gets_every_blob_in_every_round) {
  const Members members(kind(), num_ranks());
  expect_no_error(run_threads(num_ranks(), [&](int rank) {
    const auto group = members.open(rank);
    EXPECT_EQ(group->rank(), rank);
    EXPECT_EQ(group->num_ranks(), num_ranks());
    for (int round = 0; round < 20; ++round) {
      EXPECT_EQ(group->all_gather(blob_of(rank, round), kLong), blobs_of(num_ranks(), round));
    }
  }));
}
INSTANTIATE_TEST_SUITE_P(Sizes, Groups, testing::Combine(kKinds, testing::Values(1, 2, 3, 8, 64)), kind_and_size);

class FailingGroups : public Groups {};

// What it takes until all ranks but one have come, also on a busy machine.
constexpr auto kAllCome = 1000ms;

// Everybody has opened the group; then the last rank stays away until all others have failed, and comes late.
TEST_P(FailingGroups, a_missing_rank_is_named_by_all_and_the_next_round_works) {
  const int last = num_ranks() - 1;
  const Members members(kind(), num_ranks());
  std::vector<std::shared_ptr<Bootstrap>> groups(num_ranks());
  expect_no_error(run_threads(num_ranks(), [&](int rank) { groups[rank] = members.open(rank); }));
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto caught = run_threads(last, [&](int rank) { groups[rank]->all_gather(blob_of(rank, 1), kAllCome); });
    for (const Caught& one : caught)
      expect_error(one, ErrorCode::kTimeout, "waited for rank " + std::to_string(last) + " in");
    const Caught late = catch_error([&] { groups[last]->all_gather(blob_of(last, 1), kLong); });
    expect_error(late, ErrorCode::kTimeout, "rank " + std::to_string(last));
    EXPECT_EQ(late.text.find("rank " + std::to_string(last) + " waited"), std::string::npos)
        << "it was not told at once";
    expect_no_error(run_threads(num_ranks(), [&](int rank) {
      EXPECT_EQ(groups[rank]->all_gather(blob_of(rank, 2), kLong), blobs_of(num_ranks(), 2));
    }));
  }
}

TEST_P(FailingGroups, the_shortest_deadline_ends_the_round_for_all) {
  const int last = num_ranks() - 1;
  const Members members(kind(), num_ranks());
  std::vector<std::shared_ptr<Bootstrap>> groups(num_ranks());
  expect_no_error(run_threads(num_ranks(), [&](int rank) { groups[rank] = members.open(rank); }));
  const auto caught = run_threads(
      last, [&](int rank) { groups[rank]->all_gather(blob_of(rank, 1), rank == last - 1 ? kAllCome : kLong); });
  for (const Caught& one : caught)
    expect_error(one, ErrorCode::kTimeout, "waited for rank " + std::to_string(last) + " in");
}

TEST_P(FailingGroups, several_missing_ranks_are_all_named) {
  const Members members(kind(), num_ranks());
  std::vector<std::shared_ptr<Bootstrap>> groups(num_ranks());
  expect_no_error(run_threads(num_ranks(), [&](int rank) { groups[rank] = members.open(rank); }));
  const Caught caught = catch_error([&] { groups[0]->all_gather({}, 0ms); });
  std::string names = "ranks 1";
  for (int r = 2; r < num_ranks(); ++r) names += ", " + std::to_string(r);
  expect_error(caught, ErrorCode::kTimeout, names);
}
INSTANTIATE_TEST_SUITE_P(Sizes, FailingGroups, testing::Combine(kKinds, testing::Values(3, 8)), kind_and_size);

TEST(InProcessGroup, entries_share_the_meeting_point_as_long_as_any_lives) {
  auto entries = in_process_group(2);
  const auto first = entries[0];
  entries.clear();
  expect_error(catch_error([&] { first->all_gather({}, 10ms); }), ErrorCode::kTimeout, "rank 0 waited for rank 1");
}

TEST(InProcessGroup, a_group_of_no_ranks_is_refused) {
  expect_error(catch_error([] { in_process_group(0); }), ErrorCode::kInvalidArgument, "num_ranks: 0");
}

TEST(CallbackGroup, passes_the_blob_and_returns_what_the_caller_gathered) {
  const auto group = callback_group(1, 2, [](const Blob& mine) { return std::vector<Blob>{blob_of(0, 4), mine}; });
  EXPECT_EQ(group->rank(), 1);
  EXPECT_EQ(group->num_ranks(), 2);
  EXPECT_EQ(group->all_gather(blob_of(1, 4), kLong), blobs_of(2, 4));
}

TEST(CallbackGroup, a_wrong_number_of_blobs_is_an_error_with_both_values) {
  const auto group = callback_group(0, 4, [](const Blob& mine) { return std::vector<Blob>(3, mine); });
  expect_error(catch_error([&] { group->all_gather({}, kLong); }), ErrorCode::kInvalidArgument, "3 vs 4");
}

TEST(CallbackGroup, bad_arguments_are_refused) {
  const auto echo = [](const Blob& mine) { return std::vector<Blob>{mine}; };
  expect_error(catch_error([&] { callback_group(2, 2, echo); }), ErrorCode::kInvalidArgument, "rank: 2 vs num_ranks 2");
  expect_error(catch_error([&] { callback_group(0, 0, echo); }), ErrorCode::kInvalidArgument, "num_ranks: 0");
  expect_error(catch_error([&] { callback_group(0, 1, nullptr); }), ErrorCode::kInvalidArgument, "all_gather");
}

TEST(CallbackGroup, what_the_callable_throws_reaches_the_caller) {
  const auto group = callback_group(0, 1, [](const Blob&) -> std::vector<Blob> { throw std::out_of_range("mpi"); });
  EXPECT_THROW(group->all_gather({}, kLong), std::out_of_range);
}

}  // namespace
}  // namespace deep_ep::test
