// SPDX-License-Identifier: MIT
// The threads that move one rank's data: what SMs are to a GPU.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace deep_ep::host {

/// A fixed set of threads that share loops. The caller of for_range works too, so one worker means no thread at all.
class Workers {
 public:
  /// `count` workers, the caller included; `first_core` >= 0 binds the threads to the cores after it.
  Workers(int count, int first_core);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int count() const { return static_cast<int>(threads_.size()) + 1; }

  using Body = std::function<void(std::int64_t begin, std::int64_t end)>;
  /// Calls body on pieces of [0, n), on at most `limit` workers (0: all). Returns when all is done; what the pieces
  /// wrote is then visible to the caller. The body must not throw. Which worker takes which piece is left open: results
  /// may not depend on it.
  void for_range(std::int64_t n, std::int64_t piece, int limit, const Body& body);

 private:
  struct Loop {
    const Body* body = nullptr;
    std::int64_t n = 0, piece = 1, next = 0;
    int seats = 0;    // threads that may still join
    int running = 0;  // threads inside
  };
  void work(std::unique_lock<std::mutex>& lock);
  void serve();

  std::mutex one_loop_;  // loops of several callers take turns
  std::mutex mutex_;     // guards loop_ and stop_
  std::condition_variable joined_, done_;
  Loop loop_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace deep_ep::host
