// SPDX-License-Identifier: MIT
#include "cuda/returns.h"

#include <algorithm>
#include <utility>

#include "cuda/capture.h"
#include "cuda/failure.h"

namespace deep_ep::cuda {

namespace {

// Owners may be dropped on a thread that works on another device.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

bool being_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

}  // namespace

Returns::~Returns() {
  drain();
  for (cudaEvent_t event : spare_) cudaEventDestroy(event);
}

Returns::Owner Returns::lend(std::vector<Owner> owners, cudaStream_t user) {
  std::erase(owners, nullptr);
  if (owners.empty()) return nullptr;
  auto* lent = new std::vector<Owner>(std::move(owners));
  return Owner(lent, [self = shared_from_this(), user](std::vector<Owner>* dropped) {
    self->take({std::move(*dropped), user});
    delete dropped;
  });
}

void Returns::take(Entry entry) noexcept {
  const OnDevice here(device_);
  entry.serial = newest_.load(std::memory_order_relaxed);
  std::lock_guard lock(mutex_);
  if (!record(entry)) cudaGetLastError();
  entries_.push_back(std::move(entry));
}

// False where the stream is being captured: an event recorded there would belong to the graph.
bool Returns::record(Entry& entry) noexcept {
  if (entry.event != nullptr) return true;
  if (being_captured(entry.user)) return false;
  cudaEvent_t event = nullptr;
  if (!spare_.empty()) {
    event = spare_.back();
    spare_.pop_back();
  } else if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) {
    return false;
  }
  if (cudaEventRecord(event, entry.user) != cudaSuccess) {
    spare_.push_back(event);
    return false;
  }
  entry.event = event;
  return true;
}

void Returns::recycle(cudaEvent_t event) {
  if (event != nullptr) spare_.push_back(event);
}

void Returns::sweep(std::uint64_t completed) {
  std::vector<Entry> done;  // freed after the lock: an owner may take other locks
  const OutsideCapture outside;
  std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < entries_.size();) {
    Entry& entry = entries_[i];
    if (!record(entry) || entry.serial > completed || cudaEventQuery(entry.event) != cudaSuccess) {
      ++i;
      continue;
    }
    recycle(entry.event);
    done.push_back(std::move(entry));
    std::swap(entry, entries_.back());
    entries_.pop_back();
  }
  cudaGetLastError();  // "not ready" is no error
}

std::vector<Returns::Entry> Returns::all() {
  std::lock_guard lock(mutex_);
  return std::exchange(entries_, {});
}

void Returns::reclaim(cudaStream_t stream) {
  for (Entry& entry : all()) {
    std::lock_guard lock(mutex_);
    if (record(entry) && cudaStreamWaitEvent(stream, entry.event) == cudaSuccess)
      recycle(entry.event);
    else
      entries_.push_back(std::move(entry));
  }
}

void Returns::drain() {
  for (Entry& entry : all()) {
    std::lock_guard lock(mutex_);
    if (record(entry)) cudaEventSynchronize(entry.event);
    recycle(entry.event);
  }
}

// Graphs
// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct Graveyard {
  std::mutex mutex;
  std::vector<std::shared_ptr<void>> owners;
};

// Never destroyed: graphs may outlive all static objects.
Graveyard& graveyard() {
  static auto* yard = new Graveyard;
  return *yard;
}

using Kept = std::vector<std::shared_ptr<void>>;

void bury(void* kept) {
  const std::unique_ptr<Kept> owners(static_cast<Kept*>(kept));
  std::lock_guard lock(graveyard().mutex);
  std::move(owners->begin(), owners->end(), std::back_inserter(graveyard().owners));
}

cudaGraph_t graph_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr),
        "cudaStreamGetCaptureInfo");
#else
  check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr), "cudaStreamGetCaptureInfo");
#endif
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

}  // namespace

void give_to_graph(cudaStream_t stream, std::vector<std::shared_ptr<void>> owners) {
  if (owners.empty()) return;
  cudaGraph_t graph = graph_of(stream);
  if (graph == nullptr) return;  // the capture has failed: there will be no replay
  auto kept = std::make_unique<Kept>(std::move(owners));
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, kept.get(), bury, 1, cudaUserObjectNoDestructorSync), "cudaUserObjectCreate");
  kept.release();
  check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove), "cudaGraphRetainUserObject");
}

void sweep_graphs() {
  Kept owners;  // freed after the lock
  std::lock_guard lock(graveyard().mutex);
  owners.swap(graveyard().owners);
}

}  // namespace deep_ep::cuda
