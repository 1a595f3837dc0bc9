// SPDX-License-Identifier: MIT
// Runs one body per rank: ranks as threads, or ranks as processes that may be killed.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "any_buffer.h"

namespace deep_ep::test {

using namespace std::chrono_literals;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// Fewer random cases where every memory access is checked; never none.
constexpr int cases(int plain) { return kSanitized ? (plain + 3) / 4 : plain; }

/// A small arena, one node, and a deadline that an overloaded machine keeps; the environment variable
/// EP_TEST_TIMEOUT_MS names another.
Config small_config();

/// How one rank's body ended.
struct Outcome {
  bool failed = false;
  std::optional<ErrorCode> code;  // of a deep_ep::Error
  std::optional<WaitRecord> wait;
  std::string message;
};

/// Calls body() and catches what it throws.
Outcome outcome_of(const std::function<void()>& body);

/// One thread per rank of an in-process group; returns when all have ended.
std::vector<Outcome> run_threads(int num_ranks, const std::function<void(int rank, std::shared_ptr<Bootstrap>)>& body);

/// The same with an open buffer each, of the backend under test. A rank that throws is a test failure.
void run_ranks(int num_ranks, const Config& config, const std::function<void(AnyBuffer&)>& body,
               const Options& options = {});

/// Ranks that wait for one another outside the library; everybody must come.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    const int generation = generation_.load();
    if (arrived_.fetch_add(1) + 1 == count_) {
      arrived_ = 0;
      generation_.fetch_add(1);
      generation_.notify_all();
    } else {
      generation_.wait(generation);
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

/// Memory that forked ranks share with the test: how they meet, and words to tell it how far they are.
struct Blackboard;

/// Ranks as processes. The body runs in the child; an exception or a failed EXPECT there is exit code 1. Children are
/// forks; on a GPU, where a fork is of no use, they run this program's test again up to this constructor. So a test
/// makes one of these at most, and what its body captures is the same each time the test begins.
class Processes {
 public:
  using Body = std::function<void(int rank, std::shared_ptr<Bootstrap>, Blackboard&)>;

  Processes(int num_ranks, const Body& body);
  ~Processes();  // kills and reaps what still runs
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  Blackboard& board() { return *board_; }
  pid_t pid(int rank) const { return pids_[rank]; }
  void kill_rank(int rank);
  /// Exit codes; 128 + signal for a killed one, -1 for one that did not end in time (it is killed then).
  std::vector<int> wait(std::chrono::milliseconds limit = kSanitized ? 240s : 120s);

 private:
  Blackboard* board_;
  std::vector<pid_t> pids_;
};

struct Blackboard {
  static constexpr int kMaxRanks = 16;
  static constexpr std::size_t kBlobBytes = 256 * 1024;

  struct Mailbox {
    std::atomic<std::uint64_t> written{0};  // number of the last blob
    std::atomic<std::uint64_t> read{0};     // number of the last gather that this rank has read in full
    std::size_t bytes = 0;
    std::byte blob[kBlobBytes];
  };

  int num_ranks = 0;
  int port = 0;  // a TCP port that was free when the test began
  std::atomic<int> progress[kMaxRanks] = {};
  std::atomic<int> go{0};
  Mailbox mailboxes[kMaxRanks];

  /// A group over this memory, through the public callback_group().
  std::shared_ptr<Bootstrap> group(int rank);
  /// Waits until `word` holds at least `value`; false after the limit, which leaves room for processes that take turns
  /// on one GPU.
  static bool wait_for(const std::atomic<int>& word, int value, std::chrono::milliseconds limit = 60s);
};

/// A TCP port that was free a moment ago.
int free_port();

}  // namespace deep_ep::test
