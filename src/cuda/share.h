// SPDX-License-Identifier: MIT
// How memory of one process gets into another on the same machine: as file descriptors over a socket, the first piece
// when a window is opened, more as it grows.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace deep_ep::cuda {

/// A part of a window, as its owner tells it. No bytes: the owner has closed the window.
struct Piece {
  std::uint64_t at = 0;
  std::uint64_t bytes = 0;
};

/// The owner's end. Lets processes of the same user in, until it is sealed, and gives them every piece.
class Door {
 public:
  /// Listens under an abstract name: nothing is left in any folder, however a process ends. `memory` is the first
  /// piece's descriptor, closed here.
  Door(const std::string& name, Piece first, int memory);
  ~Door();
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  /// Nobody else comes.
  void seal();
  /// Gives a new piece to everybody who came, and waits until all have mapped it. Ranks in `skip` are left out, as are
  /// processes that have ended. Returns those that did not answer in time. `memory` is closed here.
  std::vector<int> give(Piece piece, int memory, const std::vector<int>& skip, std::chrono::milliseconds timeout);

 private:
  void serve();
  void welcome(int socket);

  const Piece first_;
  int memory_, listener_ = -1;
  int bell_ = -1;  // an eventfd: wakes the thread to end
  std::mutex mutex_;
  std::map<int, int> guests_;  // rank -> socket
  std::thread thread_;
};

/// A peer's end. Maps pieces as they come, on a thread of its own: a rank that grows waits for nobody's calls.
class Subscription {
 public:
  using Map = std::function<void(Piece, int memory)>;  // may throw; takes the descriptor

  /// Maps the first piece on the calling thread. Throws kSystem, and what `map` throws.
  Subscription(const std::string& name, int rank, std::chrono::milliseconds timeout, Map map);
  ~Subscription();
  Subscription(const Subscription&) = delete;
  Subscription& operator=(const Subscription&) = delete;

  /// The owner's process has ended without closing the window. Its kernels have ended too: a process gives back its
  /// descriptors in their order when it ends, and those of the GPU were opened before the socket.
  bool owner_gone() const { return gone_.load(std::memory_order_acquire); }

 private:
  void listen();

  int socket_ = -1;
  const Map map_;
  std::atomic<bool> gone_{false};
  std::thread thread_;
};

}  // namespace deep_ep::cuda
