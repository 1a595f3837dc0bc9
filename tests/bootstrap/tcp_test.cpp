// SPDX-License-Identifier: MIT
// TCP groups: processes, strangers at the door, quarrels about ranks, ranks that die.
#include <csignal>
#include <cstring>
#include <future>

#include "bootstrap/groups.h"
#include "bootstrap/wire.h"

namespace deep_ep::test {
namespace {

using bootstrap::Bytes;

// A socket that says what the test wants it to say. Connects as soon as somebody listens.
class Stranger {
 public:
  explicit Stranger(int port) {
    const sockaddr_in address = loopback(port);
    for (;;) {
      fd_ = socket(AF_INET, SOCK_STREAM, 0);
      if (connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) return;
      close(fd_);
      std::this_thread::sleep_for(5ms);
    }
  }
  ~Stranger() { close(fd_); }
  void say(const Bytes& bytes) { (void)!::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL); }
  void wait_for_bytes(std::size_t num_bytes) {
    Bytes bytes(num_bytes);
    (void)!recv(fd_, bytes.data(), num_bytes, MSG_WAITALL);
  }
  void wait_for_end() {
    char byte;
    while (recv(fd_, &byte, 1, 0) > 0) {
    }
  }

 private:
  int fd_ = -1;
};

Bytes hello_of(int rank, const std::string& job = "deep_ep", std::uint64_t generation = 0) {
  return bootstrap::encode(bootstrap::Hello{generation, rank, 3, job});
}

TEST(TcpGroup, ranks_as_processes_may_start_in_any_order) {
  constexpr int kNumRanks = 8;
  const int port = free_port();
  std::vector<pid_t> children;
  for (int rank = kNumRanks - 1; rank >= 0; --rank) {
    children.push_back(fork_rank([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(rank % 3 * 60));
      const auto group = tcp_group(rendezvous(port, rank, kNumRanks));
      for (int round = 0; round < 50; ++round) {
        if (group->all_gather(blob_of(rank, round), kLong) != blobs_of(kNumRanks, round)) return false;
      }
      return true;
    }));
  }
  for (const pid_t child : children) EXPECT_EQ(wait_status(child), 0);
}

TEST(TcpGroup, large_blobs_pass_and_too_large_ones_are_refused_for_all) {
  const int port = free_port();
  const auto caught = run_threads(3, [&](int rank) {
    const auto group = tcp_group(rendezvous(port, rank, 3));
    const Blob large(std::size_t{6} << 20, static_cast<std::byte>(rank + 1));
    const auto all = group->all_gather(large, kLong);
    EXPECT_EQ(all[2], Blob(std::size_t{6} << 20, std::byte{3}));
    group->all_gather(Blob(std::size_t{30} << 20), kLong);
  });
  for (const Caught& one : caught) expect_error(one, ErrorCode::kInvalidArgument, "vs at most 67108864");
}

TEST(TcpGroup, a_group_can_be_opened_again_at_the_same_port) {
  const int port = free_port();
  expect_no_error(run_threads(4, [&](int rank) {
    for (int time = 0; time < 5; ++time) {
      TcpRendezvous where = rendezvous(port, rank, 4);
      where.generation = static_cast<std::uint64_t>(time);
      EXPECT_EQ(tcp_group(where)->all_gather(blob_of(rank, time), kLong), blobs_of(4, time));
    }
  }));
}

TEST(TcpGroup, strangers_do_not_disturb) {
  const int port = free_port();
  std::promise<void> strangers_were_heard;
  auto heard = strangers_were_heard.get_future().share();
  std::thread strangers([&] {
    Stranger silent(port);
    Stranger half(port);
    half.say(Bytes(10, std::byte{0x45}));
    Stranger garbage(port), long_one(port), other_job(port), old_one(port), wrong_version(port);
    garbage.say(Bytes(5000, std::byte{'G'}));
    Bytes frame = hello_of(1);
    frame[20] = std::byte{1};  // payload of more than 4 GiB
    long_one.say(frame);
    other_job.say(hello_of(1, "another"));
    old_one.say(hello_of(1, "deep_ep", 4));
    frame = hello_of(1);
    frame[4] = std::byte{9};
    wrong_version.say(frame);
    for (Stranger* one : {&garbage, &long_one, &other_job, &old_one, &wrong_version}) one->wait_for_end();
    strangers_were_heard.set_value();
    heard.wait();
    silent.wait_for_end();
  });
  const auto caught = run_threads(3, [&](int rank) {
    if (rank != 0) heard.wait();  // the strangers come first
    TcpRendezvous where = rendezvous(port, rank, 3);
    where.generation = 5;
    EXPECT_EQ(tcp_group(where)->all_gather(blob_of(rank, 0), kLong), blobs_of(3, 0));
  });
  strangers.join();
  expect_no_error(caught);
}

TEST(TcpGroup, refused_connections_are_counted_in_the_error) {
  const int port = free_port();
  auto rank_0 =
      std::async(std::launch::async, [&] { return catch_error([&] { tcp_group(rendezvous(port, 0, 3, 1500ms)); }); });
  Stranger stranger(port);
  stranger.say(hello_of(1, "another"));
  stranger.wait_for_end();
  const Caught caught = rank_0.get();
  expect_error(caught, ErrorCode::kTimeout, "rank 0 waited for ranks 1, 2");
  expect_error(caught, ErrorCode::kTimeout, "1 connections refused");
  expect_error(caught, ErrorCode::kTimeout, "job: 'another' vs 'deep_ep'");
}

TEST(TcpGroup, a_rank_of_another_job_or_an_older_generation_learns_why_it_is_refused) {
  const int port = free_port();
  const auto caught = run_threads(3, [&](int rank) {
    TcpRendezvous where = rendezvous(port, rank, 3, rank == 0 ? 1500ms : kLong);
    where.generation = rank == 1 ? 6 : 7;
    where.job = rank == 2 ? "mine" : "yours";
    tcp_group(where);
  });
  expect_error(caught[0], ErrorCode::kTimeout, "2 connections refused");
  expect_error(caught[1], ErrorCode::kInvalidArgument, "generation: 6 vs 7");
  expect_error(caught[2], ErrorCode::kInvalidArgument, "job: 'mine' vs 'yours'");
}

TEST(TcpGroup, a_newer_rank_waits_for_the_newer_rank_0) {
  const int port = free_port();
  const auto caught = run_threads(3, [&](int thread) {
    TcpRendezvous where = rendezvous(port, thread == 1 ? 1 : 0, 2, thread == 0 ? 500ms : kLong);
    where.generation = thread == 0 ? 1 : 2;
    if (thread == 2) std::this_thread::sleep_for(800ms);
    tcp_group(where)->all_gather({}, kLong);
  });
  expect_error(caught[0], ErrorCode::kTimeout, "generation: 2 vs 1");
  expect_no_error({caught[1], caught[2]});
}

TEST(TcpGroup, two_ranks_with_one_number_are_an_error_for_all) {
  const int port = free_port();
  // Rank 1 may come after the quarrel, to a port where nobody listens any more.
  const auto timeout_of = [](int thread) { return thread == 1 ? 1000ms : kLong; };
  const auto caught =
      run_threads(4, [&](int thread) { tcp_group(rendezvous(port, thread == 3 ? 2 : thread, 5, timeout_of(thread))); });
  for (const Caught& one : {caught[0], caught[2], caught[3]}) {
    expect_error(one, ErrorCode::kInvalidArgument, "rank: 2 is claimed twice, by 127.0.0.1:");
  }
}

TEST(TcpGroup, two_ranks_0_are_an_error_for_both) {
  const int port = free_port();
  const auto caught = run_threads(2, [&](int) { tcp_group(rendezvous(port, 0, 2)); });
  for (const Caught& one : caught) expect_error(one, ErrorCode::kInvalidArgument, "rank: 0 is claimed twice");
}

TEST(TcpGroup, sizes_that_disagree_are_an_error_with_both_values) {
  const int port = free_port();
  const auto caught = run_threads(2, [&](int rank) { tcp_group(rendezvous(port, rank, rank == 0 ? 3 : 4)); });
  for (const Caught& one : caught) {
    expect_error(one, ErrorCode::kInvalidArgument, "num_ranks: 4 at rank 1 vs 3 at rank 0");
  }
}

TEST(TcpGroup, ranks_that_do_not_come_are_named_to_all) {
  const int port = free_port();
  const auto caught =
      run_threads(2, [&](int rank) { tcp_group(rendezvous(port, rank, 4, rank == 0 ? 1000ms : kLong)); });
  for (const Caught& one : caught) expect_error(one, ErrorCode::kTimeout, "rank 0 waited for ranks 2, 3 at 127.0.0.1:");
}

TEST(TcpGroup, a_rank_with_a_short_deadline_learns_who_is_missing) {
  const int port = free_port();
  const auto caught =
      run_threads(2, [&](int rank) { tcp_group(rendezvous(port, rank, 3, rank == 0 ? 3000ms : 1000ms)); });
  expect_error(caught[1], ErrorCode::kTimeout, "waited for rank 2 at");
  expect_error(caught[0], ErrorCode::kTimeout, "waited for ranks 1, 2 at");
}

TEST(TcpGroup, a_missing_rank_0_is_named) {
  const Caught caught = catch_error([] { tcp_group(rendezvous(free_port(), 2, 3, 100ms)); });
  expect_error(caught, ErrorCode::kTimeout, "rank 2 waited for rank 0 at 127.0.0.1:");
}

TEST(TcpGroup, a_late_rank_0_is_named_and_the_next_round_works) {
  const int port = free_port();
  std::vector<std::shared_ptr<Bootstrap>> groups(2);
  expect_no_error(run_threads(2, [&](int rank) { groups[rank] = tcp_group(rendezvous(port, rank, 2)); }));
  expect_error(catch_error([&] { groups[1]->all_gather({}, 20ms); }), ErrorCode::kTimeout, "rank 1 waited for rank 0");
  expect_error(catch_error([&] { groups[0]->all_gather({}, kLong); }), ErrorCode::kTimeout, "rank 1 waited for rank 0");
  expect_no_error(
      run_threads(2, [&](int rank) { EXPECT_EQ(groups[rank]->all_gather(blob_of(rank, 3), kLong), blobs_of(2, 3)); }));
}

TEST(TcpGroup, what_was_said_for_an_earlier_round_is_dropped) {
  const int port = free_port();
  std::thread rank_1([&] {
    Stranger peer(port);
    peer.say(bootstrap::encode(bootstrap::Hello{0, 1, 2, "deep_ep"}));
    peer.say(bootstrap::encode({bootstrap::FrameKind::kBlob, 1, blob_of(1, 1)}));
    peer.wait_for_bytes(bootstrap::kHeaderBytes + 1);  // the welcome, and the beginning of the first answer
    peer.say(bootstrap::encode({bootstrap::FrameKind::kBlob, 1, blob_of(1, 3)}));
    peer.say(bootstrap::encode(bootstrap::FrameKind::kGiveUp, 1));
    peer.say(bootstrap::encode({bootstrap::FrameKind::kBlob, 2, blob_of(1, 2)}));
    peer.wait_for_end();
  });
  {
    const auto group = tcp_group(rendezvous(port, 0, 2));
    EXPECT_EQ(group->all_gather(blob_of(0, 1), kLong), blobs_of(2, 1));
    EXPECT_EQ(group->all_gather(blob_of(0, 2), kLong), blobs_of(2, 2));
  }
  rank_1.join();
}

// All others wait in the collective when the rank dies; kSystem rather than kTimeout shows that nobody waited for the
// deadline.
void expect_death_is_noticed(int victim) {
  constexpr int kNumRanks = 4;
  const int port = free_port();
  const std::string name = "rank " + std::to_string(victim) + " left the group";
  std::vector<pid_t> children;
  for (int rank = 0; rank < kNumRanks; ++rank) {
    children.push_back(fork_rank([&, rank] {
      const auto group = tcp_group(rendezvous(port, rank, kNumRanks));
      group->all_gather(blob_of(rank, 0), kLong);
      if (rank == victim) {
        std::this_thread::sleep_for(100ms);
        raise(SIGKILL);
      }
      for (int again = 0; again < 2; ++again) {
        const Caught caught = catch_error([&] { group->all_gather(blob_of(rank, 1), kLong); });
        if (caught.code != ErrorCode::kSystem || caught.text.find(name) == std::string::npos) return false;
      }
      return true;
    }));
  }
  for (int rank = 0; rank < kNumRanks; ++rank) {
    const int status = wait_status(children[rank]);
    if (rank == victim)
      EXPECT_TRUE(WIFSIGNALED(status));
    else
      EXPECT_EQ(status, 0) << "rank " << rank;
  }
}

TEST(TcpGroup, a_killed_rank_is_noticed_by_all) { expect_death_is_noticed(3); }
TEST(TcpGroup, a_killed_rank_0_is_noticed_by_all) { expect_death_is_noticed(0); }

TEST(TcpGroup, a_world_of_one_needs_no_port) {
  const int port = free_port();
  const auto first = tcp_group(rendezvous(port, 0, 1));
  const auto second = tcp_group(rendezvous(port, 0, 1));
  EXPECT_EQ(first->all_gather(blob_of(0, 1), 0ms), blobs_of(1, 1));
  EXPECT_EQ(second->num_ranks(), 1);
}

TEST(TcpGroup, ipv6_and_names_work) {
  for (const std::string address : {"::1", "localhost"}) {
    const int port = free_port();
    expect_no_error(run_threads(2, [&](int rank) {
      TcpRendezvous where = rendezvous(port, rank, 2);
      where.address = address;
      EXPECT_EQ(tcp_group(where)->all_gather(blob_of(rank, 1), kLong), blobs_of(2, 1));
    }));
  }
}

TEST(TcpGroup, bad_arguments_are_refused) {
  TcpRendezvous where = rendezvous(0, 0, 2);
  expect_error(catch_error([&] { tcp_group(where); }), ErrorCode::kInvalidArgument, "port: 0");
  where = rendezvous(70000, 0, 2);
  expect_error(catch_error([&] { tcp_group(where); }), ErrorCode::kInvalidArgument, "port: 70000");
  where = rendezvous(29400, 2, 2);
  expect_error(catch_error([&] { tcp_group(where); }), ErrorCode::kInvalidArgument, "rank: 2 vs num_ranks 2");
  where = rendezvous(29400, 0, 2);
  where.job = std::string(256, 'x');
  expect_error(catch_error([&] { tcp_group(where); }), ErrorCode::kInvalidArgument, "job bytes: 256");
  where = rendezvous(29400, 0, 2);
  where.address = "203.0.113.7";  // a documentation address, of no machine
  expect_error(catch_error([&] { tcp_group(where); }), ErrorCode::kSystem, "bind");
}

}  // namespace
}  // namespace deep_ep::test
