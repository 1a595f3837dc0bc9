// SPDX-License-Identifier: MIT
// Helpers of the bootstrap tests: ranks as threads or processes, blobs that tell where they come from, free ports.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"

namespace deep_ep::test {

using namespace std::chrono_literals;
using Blob = Bootstrap::Blob;

constexpr auto kLong = std::chrono::milliseconds(120000);  // never reached in a test that passes

/// A size and content that differ from rank to rank and round to round; some blobs are empty.
inline Blob blob_of(int rank, int round) {
  Blob blob(static_cast<std::size_t>((rank * 37 + round * 101) % 5 == 0 ? 0 : rank * 13 + round * 7 + 1));
  for (std::size_t i = 0; i < blob.size(); ++i)
    blob[i] = static_cast<std::byte>(rank * 31 + round * 17 + static_cast<int>(i));
  return blob;
}

inline std::vector<Blob> blobs_of(int num_ranks, int round) {
  std::vector<Blob> blobs;
  for (int r = 0; r < num_ranks; ++r) blobs.push_back(blob_of(r, round));
  return blobs;
}

/// What an Error was, or nothing.
struct Caught {
  std::optional<ErrorCode> code;
  std::string text;
};

inline Caught catch_error(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {};
}

/// Runs body(rank) on one thread per rank and returns what each caught.
inline std::vector<Caught> run_threads(int num_ranks, const std::function<void(int)>& body) {
  std::vector<Caught> caught(num_ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] { caught[r] = catch_error([&] { body(r); }); });
  }
  for (auto& thread : threads) thread.join();
  return caught;
}

inline void expect_no_error(const std::vector<Caught>& caught) {
  for (std::size_t r = 0; r < caught.size(); ++r)
    EXPECT_FALSE(caught[r].code) << "rank " << r << ": " << caught[r].text;
}

inline void expect_error(const Caught& caught, ErrorCode code, const std::string& part) {
  ASSERT_TRUE(caught.code) << "no error was thrown";
  EXPECT_EQ(*caught.code, code) << caught.text;
  EXPECT_NE(caught.text.find(part), std::string::npos) << caught.text;
}

/// Starts a process that leaves with 0 if the body returns true.
inline pid_t fork_rank(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child != 0) return child;
  bool is_good = false;
  try {
    is_good = body();
  } catch (...) {
  }
  _exit(is_good ? 0 : 1);
}

inline int wait_status(pid_t child) {
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

inline sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

inline int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = loopback(0);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(fd);
  return ntohs(address.sin_port);
}

inline TcpRendezvous rendezvous(int port, int rank, int num_ranks, std::chrono::milliseconds timeout = kLong) {
  TcpRendezvous where;
  where.port = port;
  where.rank = rank;
  where.num_ranks = num_ranks;
  where.timeout = timeout;
  return where;
}

}  // namespace deep_ep::test
