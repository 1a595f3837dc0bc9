// SPDX-License-Identifier: MIT
// Ranks as child processes: start them, hear when one ends, leave none behind.
#pragma once

#include <sys/types.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace moe {

class Processes {
 public:
  struct End {
    int rank = -1;
    bool well = false;  // exit status 0
    std::string how;    // "exit status 1", "signal 9 (Killed)"
  };

  /// Forks `count` processes that run body(rank) and end with what it returns. Call it while this process has no
  /// threads.
  Processes(int count, const std::function<int(int)>& body);
  /// Kills those that still run.
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  /// A rank that has ended since the last call, if any. Does not wait.
  std::optional<End> next_end();
  int running() const;
  pid_t process_of(int rank) const { return started_[rank]; }
  void kill_all();

 private:
  std::vector<pid_t> started_;
  std::vector<bool> ended_;
};

/// A TCP port that nobody uses at this moment, for the ranks to meet at.
int free_port();

}  // namespace moe
