// SPDX-License-Identifier: MIT
// Ranks on GPUs: a process each where every rank has a GPU of its own, threads of this process where they share one
// (processes would take turns on it). Times are those of the slowest rank.
#pragma once

#include <cuda_runtime.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>  // program_invocation_short_name
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bench/free_port.h"
#include "bench/measure.h"
#include "bench/shared_memory.h"
#include "deep_ep/bootstrap.h"

namespace deep_ep::bench {

inline constexpr int kMaxReps = 1000;
inline constexpr const char* kGpuClockBoundary =
    "CUDA events on the caller's stream around the call, ranks released together by a barrier on the host; of each "
    "repetition the slowest rank";

inline void gpu(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

/// How often something is measured, and what is done around each repetition without being measured.
struct Timing {
  int reps = 30;
  int warmup = 3;
  double calls = 1;                               // that one repetition makes: the time of one is reported
  std::function<void()> before = {}, after = {};  // `after` is called when the end has been marked, not reached
};

/// In memory that all ranks share.
struct GpuBoard {
  Board board;
  float us[kMaxRanks][kMaxReps];
  cudaIpcMemHandle_t memory[kMaxRanks];
  std::byte* address[kMaxRanks];
};

/// Memory of the current device.
class GpuMemory {
 public:
  explicit GpuMemory(std::size_t bytes) { gpu(cudaMalloc(reinterpret_cast<void**>(&at_), bytes)); }
  GpuMemory(const GpuMemory&) = delete;
  GpuMemory& operator=(const GpuMemory&) = delete;
  ~GpuMemory() { cudaFree(at_); }
  std::byte* get() const { return at_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(at_);
  }

 private:
  std::byte* at_ = nullptr;
};

template <class T>
std::unique_ptr<GpuMemory> on_gpu(const std::vector<T>& values) {
  auto memory = std::make_unique<GpuMemory>(values.size() * sizeof(T));
  gpu(cudaMemcpy(memory->get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

class GpuRank {
 public:
  struct Place {
    int rank, num_ranks, device, num_gpus;
    bool processes;
  };
  GpuRank(GpuBoard& board, const Place& place, std::shared_ptr<Bootstrap> group)
      : place_(place), board_(board), barrier_(board.board, place.rank, place.num_ranks), group_(std::move(group)) {
    gpu(cudaSetDevice(place.device));
    gpu(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    gpu(cudaEventCreate(&begin_));
    gpu(cudaEventCreate(&end_));
  }
  GpuRank(const GpuRank&) = delete;
  GpuRank& operator=(const GpuRank&) = delete;
  ~GpuRank() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  int rank() const { return place_.rank; }
  int num_ranks() const { return place_.num_ranks; }
  int device() const { return place_.device; }
  int num_gpus() const { return place_.num_gpus; }
  bool processes() const { return place_.processes; }
  cudaStream_t stream() const { return stream_; }
  const std::shared_ptr<Bootstrap>& group() const { return group_; }
  Barrier& barrier() { return barrier_; }

  /// SMs of this rank: its share of the GPU.
  int sms() const {
    int all = 0;
    gpu(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, place_.device));
    return all / ranks_here();
  }
  /// Whether another rank has this rank's GPU too.
  bool near(int rank) const { return rank % place_.num_gpus == place_.device; }
  void sync() {
    gpu(cudaStreamSynchronize(stream_));
    barrier_.sync();
  }

  /// Collective. By CUDA events on the stream around the call; the slowest rank of each repetition.
  Summary time(const Timing& timing, const std::function<void()>& call) {
    return measure(timing, [&] {
      gpu(cudaEventRecord(begin_, stream_));
      call();
      gpu(cudaEventRecord(end_, stream_));
      if (timing.after) timing.after();
      gpu(cudaEventSynchronize(end_));
      float ms = 0;
      gpu(cudaEventElapsedTime(&ms, begin_, end_));
      return ms * 1000;
    });
  }

  /// Collective. By the host's clock, from the first call until the stream is done with the last.
  Summary time_as_called(const Timing& timing, const std::function<void()>& call) {
    return measure(timing, [&] {
      const std::int64_t begin = now_ns();
      for (int i = 0; i < timing.calls; ++i) call();
      gpu(cudaStreamSynchronize(stream_));
      return static_cast<float>(now_ns() - begin) * 1e-3f;
    });
  }

  /// Collective. As time(), of so many calls in one CUDA graph.
  Summary time_in_graph(const Timing& timing, const std::function<void()>& call) {
    call();  // once outside: what a first call sets up is no part of a graph
    sync();
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    gpu(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < timing.calls; ++i) call();
    gpu(cudaStreamEndCapture(stream_, &graph));
    gpu(cudaGraphInstantiate(&replay, graph, 0));
    gpu(cudaGraphUpload(replay, stream_));
    const Summary summary = time(timing, [&] { gpu(cudaGraphLaunch(replay, stream_)); });
    gpu(cudaGraphExecDestroy(replay));
    gpu(cudaGraphDestroy(graph));
    return summary;
  }

  /// Collective. Every rank's `mine`, as this rank can address it. Between processes `mine` is where memory begins, and
  /// the others' places must be given back by close().
  std::vector<std::byte*> exchange(std::byte* mine) {
    if (place_.processes) gpu(cudaIpcGetMemHandle(&board_.memory[rank()], mine));
    board_.address[rank()] = mine;
    barrier_.sync();
    if (!place_.processes) allow_peers();
    std::vector<std::byte*> all(num_ranks());
    for (int r = 0; r < num_ranks(); ++r) {
      if (r == rank() || !place_.processes) {
        all[r] = board_.address[r];
      } else {
        void* mapped = nullptr;
        gpu(cudaIpcOpenMemHandle(&mapped, board_.memory[r], cudaIpcMemLazyEnablePeerAccess));
        all[r] = static_cast<std::byte*>(mapped);
      }
    }
    barrier_.sync();
    return all;
  }
  void close(const std::vector<std::byte*>& exchanged) const {
    for (int r = 0; place_.processes && r < num_ranks(); ++r)
      if (r != rank()) cudaIpcCloseMemHandle(exchanged[r]);
  }

 private:
  int ranks_here() const {
    int count = 0;
    for (int r = 0; r < num_ranks(); ++r) count += near(r);
    return count;
  }

  template <class Once>
  Summary measure(const Timing& timing, const Once& once) {
    const int reps = std::min(timing.reps, kMaxReps);
    for (int run = -timing.warmup; run < reps; ++run) {
      if (timing.before) timing.before();
      sync();
      const float us = once();
      if (run >= 0) board_.us[rank()][run] = us;
    }
    barrier_.sync();
    std::vector<std::int64_t> slowest_ns(reps, 0);
    for (int run = 0; run < reps; ++run)
      for (int r = 0; r < num_ranks(); ++r)
        slowest_ns[run] = std::max(slowest_ns[run], static_cast<std::int64_t>(board_.us[r][run] * 1000 / timing.calls));
    barrier_.sync();
    return summarize(std::move(slowest_ns));
  }

  // Threads on several GPUs address each other's memory as it is, once that is allowed.
  void allow_peers() const {
    for (int device = 0; device < std::min(place_.num_gpus, num_ranks()); ++device) {
      if (device == place_.device) continue;
      const cudaError_t code = cudaDeviceEnablePeerAccess(device, 0);
      if (code == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();  // forget it
      } else {
        gpu(code);
      }
    }
  }

  Place place_;
  GpuBoard& board_;
  Barrier barrier_;
  std::shared_ptr<Bootstrap> group_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// Memory of each rank that all ranks can address. Made and destroyed by all of them.
class SharedGpuMemory {
 public:
  SharedGpuMemory(GpuRank& self, std::size_t bytes)
      : self_(self), mine_(std::max(bytes, kOwnBlock)), all_(self.exchange(mine_.get())) {}
  SharedGpuMemory(const SharedGpuMemory&) = delete;
  SharedGpuMemory& operator=(const SharedGpuMemory&) = delete;
  ~SharedGpuMemory() {
    cudaStreamSynchronize(self_.stream());
    self_.close(all_);
    try {
      self_.barrier().sync();  // nobody uses mine any more
    } catch (const std::exception&) {
      return;  // a rank failed, and all are about to end
    }
  }
  std::byte* get() const { return mine_.get(); }
  std::byte* of(int rank) const { return all_[rank]; }
  const std::vector<std::byte*>& all() const { return all_; }

 private:
  static constexpr std::size_t kOwnBlock = std::size_t{2} << 20;  // less may lie in a block with other memory
  GpuRank& self_;
  GpuMemory mine_;
  std::vector<std::byte*> all_;
};

/// Counted by a child: a process that has touched CUDA cannot fork ranks that use it.
inline int count_gpus() {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess ? count : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

/// Runs `body` on every rank; 0 if all went well, an exit code otherwise. With fewer GPUs than ranks, ranks share them
/// as threads.
inline int run_gpu_ranks(int num_ranks, const std::function<void(GpuRank&)>& body) {
  const int num_gpus = count_gpus();
  if (num_gpus == 0) {
    std::fprintf(stderr, "%s: there is no GPU\n", program_invocation_short_name);
    return 1;
  }
  const Mapping shared = map_shared(sizeof(GpuBoard));
  auto& board = *reinterpret_cast<GpuBoard*>(shared.get());
  const bool processes = num_gpus >= num_ranks && num_ranks > 1;
  const auto run = [&](int rank, std::shared_ptr<Bootstrap> group) {
    try {
      GpuRank self(board, {rank, num_ranks, rank % num_gpus, num_gpus, processes}, std::move(group));
      body(self);
      return 0;
    } catch (const std::exception& error) {
      if (board.board.failed.exchange(1) == 0) std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
      return 1;
    }
  };
  bool failed = false;
  if (!processes) {
    auto groups = in_process_group(num_ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_ranks; ++rank)
      threads.emplace_back([&, rank] {
        if (run(rank, groups[rank]) != 0) _exit(1);  // the other ranks may wait for this one in a kernel
      });
    for (std::thread& thread : threads) thread.join();
    return 0;
  }
  TcpRendezvous where;
  where.port = free_port();
  where.num_ranks = num_ranks;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("fork failed");
    if (child > 0) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    where.rank = rank;
    _exit(run(rank, tcp_group(where)));
  }
  for (int status = 0; wait(&status) > 0;) {
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    if (WIFSIGNALED(status)) std::fprintf(stderr, "a rank was ended by signal %d\n", WTERMSIG(status));
    failed = true;
    board.board.failed.store(1);
  }
  return failed ? 1 : 0;
}

}  // namespace deep_ep::bench
