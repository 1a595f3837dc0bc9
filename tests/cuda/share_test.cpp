// SPDX-License-Identifier: MIT
// Pieces of memory passed from an owner to its peers, with ordinary memory files in place of a GPU's: needs no GPU.
#include "cuda/share.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "deep_ep/error.h"

namespace deep_ep::cuda {
namespace {

using namespace std::chrono_literals;

int memory_holding(std::uint64_t number) {
  const int memory = ::memfd_create("share_test", MFD_CLOEXEC);
  EXPECT_EQ(::pwrite(memory, &number, sizeof number, 0), static_cast<ssize_t>(sizeof number));
  return memory;
}

std::string unused_name() {
  static int count = 0;
  return "deep_ep-share_test-" + std::to_string(::getpid()) + "-" + std::to_string(count++);
}

// What a peer was given, in order.
struct Received {
  std::mutex mutex;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> pieces;  // at, number in the memory
  Subscription::Map map() {
    return [this](Piece piece, int memory) {
      std::uint64_t number = 0;
      EXPECT_EQ(::pread(memory, &number, sizeof number, 0), static_cast<ssize_t>(sizeof number));
      ::close(memory);
      std::lock_guard lock(mutex);
      pieces.emplace_back(piece.at, number);
    };
  }
};

TEST(Share, gives_every_piece_to_every_peer_and_waits_until_they_have_it) {
  const std::string name = unused_name();
  Door door(name, {0, 100}, memory_holding(7));
  Received received[3];
  std::vector<std::unique_ptr<Subscription>> peers;
  for (int rank = 0; rank < 3; ++rank)
    peers.push_back(std::make_unique<Subscription>(name, rank, 5s, received[rank].map()));
  door.seal();
  EXPECT_TRUE(door.give({100, 50}, memory_holding(8), {}, 5s).empty());
  EXPECT_TRUE(door.give({150, 50}, memory_holding(9), {1}, 5s).empty());
  EXPECT_TRUE(
      door.give({200, 50}, memory_holding(10), {}, 5s).empty());  // an answer that nobody waited for is passed by
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> all = {{0, 7}, {100, 8}, {150, 9}, {200, 10}};
  for (Received& r : received) {
    std::lock_guard lock(r.mutex);
    EXPECT_EQ(r.pieces, all);
  }
}

TEST(Share, names_peers_that_do_not_answer_and_forgets_those_that_ended) {
  const std::string name = unused_name();
  Door door(name, {0, 100}, memory_holding(1));
  Received good;
  bool first = true;
  const auto failing = [&first](Piece, int memory) {
    ::close(memory);
    if (!std::exchange(first, false)) throw std::runtime_error("no room here");
  };
  Subscription patient(name, 4, 5s, good.map());
  Subscription broken(name, 5, 5s, failing);
  {
    Received gone;
    const Subscription leaving(name, 6, 5s, gone.map());
  }
  door.seal();
  EXPECT_EQ(door.give({100, 50}, memory_holding(2), {}, 300ms), std::vector<int>{5});
  EXPECT_TRUE(door.give({150, 50}, memory_holding(3), {5}, 5s).empty());
}

TEST(Share, tells_an_owner_that_closed_from_one_that_ended) {
  const std::string name = unused_name();
  auto door = std::make_unique<Door>(name, Piece{0, 100}, memory_holding(1));
  Received received;
  const Subscription peer(name, 0, 5s, received.map());
  door.reset();
  std::this_thread::sleep_for(50ms);
  EXPECT_FALSE(peer.owner_gone());

  // An owner in a process that is killed; the first exchange shows that it was there.
  const std::string other = unused_name();
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const Door of_child(other, {0, 100}, memory_holding(2));
    (void)!::write(ready[1], "x", 1);
    for (;;) ::pause();
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  const Subscription survivor(other, 0, 5s, received.map());
  EXPECT_FALSE(survivor.owner_gone());
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  for (int i = 0; i < 100 && !survivor.owner_gone(); ++i) std::this_thread::sleep_for(10ms);
  EXPECT_TRUE(survivor.owner_gone());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(Share, a_name_that_nobody_listens_to_is_an_error) {
  Received received;
  EXPECT_THROW(Subscription(unused_name(), 0, 1s, received.map()), Error);
}

}  // namespace
}  // namespace deep_ep::cuda
