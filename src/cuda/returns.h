// SPDX-License-Identifier: MIT
// Memory on its way back: its owner has dropped it, but work that was enqueued before may still use it.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace deep_ep::cuda {

/// Takes blocks back from callers whose stream is not ours. A block is free again once its user's stream has done what
/// it held when the last copy of the owner was dropped, and once our own calls from before then have ended.
class Returns : public std::enable_shared_from_this<Returns> {
 public:
  using Owner = std::shared_ptr<void>;
  explicit Returns(int device) : device_(device) {}
  ~Returns();

  /// One owner for all of them, in the hands of whoever works on `user`. May be dropped on any thread.
  Owner lend(std::vector<Owner> owners, cudaStream_t user);
  /// The serial number of the newest call.
  void note_call(std::uint64_t serial) { newest_.store(serial, std::memory_order_relaxed); }

  /// Frees what is done; `completed` is the last call that has ended.
  void sweep(std::uint64_t completed);
  /// Makes `stream` wait for all users, and frees everything for use in the order of that stream.
  void reclaim(cudaStream_t stream);
  /// Waits for all users on the host.
  void drain();

 private:
  struct Entry {
    std::vector<Owner> owners;
    cudaStream_t user = nullptr;
    std::uint64_t serial = 0;
    cudaEvent_t event = nullptr;  // none: could not be recorded yet, because the stream was being captured
  };
  void take(Entry entry) noexcept;
  bool record(Entry& entry) noexcept;
  std::vector<Entry> all();
  void recycle(cudaEvent_t event);

  const int device_;
  std::atomic<std::uint64_t> newest_{0};
  std::mutex mutex_;
  std::vector<Entry> entries_;
  std::vector<cudaEvent_t> spare_;
};

/// Ties memory to the graph that `stream` is being captured into: it is kept until the graph and all its instances are
/// gone, because each replay uses it.
void give_to_graph(cudaStream_t stream, std::vector<std::shared_ptr<void>> owners);

/// Frees what graphs that are gone have left. Their end is no place to free memory: CUDA must not be called there.
void sweep_graphs();

}  // namespace deep_ep::cuda
