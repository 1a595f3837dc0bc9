// SPDX-License-Identifier: MIT
// Threads, processes, and the shared pages by which ranks that are processes meet.
#include "ranks.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>

namespace deep_ep::test {
namespace {

using Clock = std::chrono::steady_clock;

void spin_until(const std::function<bool()>& done, const char* what) {
  const auto deadline = Clock::now() + 20s;
  while (!done()) {
    if (Clock::now() > deadline) throw std::runtime_error(std::string("the blackboard waited too long: ") + what);
    std::this_thread::sleep_for(200us);
  }
}

// One all-gather through the mailboxes. A mailbox is written again only after everybody has read its last blob.
std::vector<Bootstrap::Blob> gather(Blackboard& board, int rank, std::uint64_t number, const Bootstrap::Blob& mine) {
  if (mine.size() > Blackboard::kBlobBytes) throw std::runtime_error("the blackboard's mailboxes are too small");
  for (int r = 0; r < board.num_ranks; ++r) {
    spin_until([&] { return board.mailboxes[r].read.load() + 1 >= number; }, "a reader");
  }
  Blackboard::Mailbox& box = board.mailboxes[rank];
  std::copy(mine.begin(), mine.end(), box.blob);
  box.bytes = mine.size();
  box.written = number;
  std::vector<Bootstrap::Blob> blobs;
  for (int r = 0; r < board.num_ranks; ++r) {
    const Blackboard::Mailbox& other = board.mailboxes[r];
    spin_until([&] { return other.written.load() >= number; }, "a writer");
    blobs.emplace_back(other.blob, other.blob + other.bytes);
  }
  box.read = number;
  return blobs;
}

int run_child(int rank, Blackboard& board, const Processes::Body& body) {
  const Outcome outcome = outcome_of([&] { body(rank, board.group(rank), board); });
  if (outcome.failed) std::fprintf(stderr, "rank %d: %s\n", rank, outcome.message.c_str());
  return outcome.failed || ::testing::Test::HasFailure() ? 1 : 0;
}

constexpr const char* kRankVariable = "EP_TEST_RANK";
constexpr const char* kBoardVariable = "EP_TEST_BOARD";

void* map_board(int memory) {
  void* page = ::mmap(nullptr, sizeof(Blackboard), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (page == MAP_FAILED) throw std::runtime_error("mmap of the blackboard failed");
  return page;
}

// Everything that the child needs is made before the fork: between it and exec only system calls are safe.
pid_t run_test_again(int rank, int memory) {
  const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
  std::string filter = std::string("--gtest_filter=") + test.test_suite_name() + "." + test.name();
  std::string quiet = "--gtest_brief=1";
  char program[] = "/proc/self/exe";
  char* arguments[] = {program, filter.data(), quiet.data(), nullptr};
  std::vector<std::string> more = {std::string(kRankVariable) + "=" + std::to_string(rank),
                                   std::string(kBoardVariable) + "=" + std::to_string(memory)};
  std::vector<char*> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) variables.push_back(*entry);
  for (std::string& entry : more) variables.push_back(entry.data());
  variables.push_back(nullptr);
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  ::dup2(STDERR_FILENO, STDOUT_FILENO);
  ::execve(program, arguments, variables.data());
  ::_exit(127);
}

}  // namespace

Config small_config() {
  Config config;
  config.arena_bytes = std::size_t{64} << 20;
  config.timeout = kSanitized ? 30s : 10s;
  if (const char* wanted = std::getenv("EP_TEST_TIMEOUT_MS"))
    config.timeout = std::chrono::milliseconds(std::atoi(wanted));
  return config;
}

Outcome outcome_of(const std::function<void()>& body) {
  Outcome outcome;
  try {
    body();
    return outcome;
  } catch (const Error& error) {
    outcome.code = error.code();
    outcome.wait = error.wait();
    outcome.message = error.what();
  } catch (const std::exception& error) {
    outcome.message = error.what();
  }
  outcome.failed = true;
  return outcome;
}

std::vector<Outcome> run_threads(int num_ranks, const std::function<void(int, std::shared_ptr<Bootstrap>)>& body) {
  auto group = in_process_group(num_ranks);
  std::vector<Outcome> outcomes(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank, entry = std::move(group[rank])]() mutable {
      outcomes[rank] = outcome_of([&] { body(rank, std::move(entry)); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

void run_ranks(int num_ranks, const Config& config, const std::function<void(AnyBuffer&)>& body,
               const Options& options) {
  const auto outcomes = run_threads(num_ranks, [&](int, std::shared_ptr<Bootstrap> group) {
    const auto buffer = AnyBuffer::open(std::move(group), config, options);
    body(*buffer);
  });
  for (int rank = 0; rank < num_ranks; ++rank)
    EXPECT_FALSE(outcomes[rank].failed) << "rank " << rank << ": " << outcomes[rank].message;
}

Processes::Processes(int num_ranks, const Body& body) {
  if (const char* rank = std::getenv(kRankVariable)) {  // we are a child that runs the test again
    board_ = static_cast<Blackboard*>(map_board(std::atoi(std::getenv(kBoardVariable))));
    ::_exit(run_child(std::atoi(rank), *board_, body));
  }
  const int memory = ::memfd_create("deep_ep_test", 0);
  if (memory < 0 || ::ftruncate(memory, sizeof(Blackboard)) != 0)
    throw std::runtime_error("no memory for a blackboard");
  board_ = new (map_board(memory)) Blackboard;
  board_->num_ranks = num_ranks;
  board_->port = free_port();
  std::fflush(nullptr);
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (on_cuda()) {
      pids_.push_back(run_test_again(rank, memory));
      continue;
    }
    const pid_t pid = ::fork();
    if (pid == 0) ::_exit(run_child(rank, *board_, body));
    pids_.push_back(pid);
  }
  ::close(memory);
}

Processes::~Processes() {
  for (std::size_t rank = 0; rank < pids_.size(); ++rank) {
    if (pids_[rank] <= 0) continue;
    ::kill(pids_[rank], SIGKILL);
    ::waitpid(pids_[rank], nullptr, 0);
  }
  ::munmap(board_, sizeof(Blackboard));
}

void Processes::kill_rank(int rank) { ::kill(pids_[rank], SIGKILL); }

std::vector<int> Processes::wait(std::chrono::milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  std::vector<int> codes(pids_.size(), -1);
  for (std::size_t rank = 0; rank < pids_.size(); ++rank) {
    int status = 0;
    while (pids_[rank] > 0) {
      const bool late = Clock::now() > deadline;
      if (late) ::kill(pids_[rank], SIGKILL);
      if (::waitpid(pids_[rank], &status, late ? 0 : WNOHANG) == pids_[rank]) {
        pids_[rank] = 0;
        if (!late) codes[rank] = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      } else {
        std::this_thread::sleep_for(2ms);
      }
    }
  }
  return codes;
}

std::shared_ptr<Bootstrap> Blackboard::group(int rank) {
  auto number = std::make_shared<std::uint64_t>(mailboxes[rank].written.load());
  return callback_group(rank, num_ranks, [this, rank, number](const Bootstrap::Blob& mine) {
    return gather(*this, rank, ++*number, mine);
  });
}

bool Blackboard::wait_for(const std::atomic<int>& word, int value, std::chrono::milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  while (word.load() < value) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(500us);
  }
  return true;
}

int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  const bool bound = ::bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
                     ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  ::close(fd);
  if (!bound) throw std::runtime_error("no free port");
  return ntohs(address.sin_port);
}

}  // namespace deep_ep::test
