// SPDX-License-Identifier: MIT
// Calls of one buffer, one after the other whatever streams they come on, and what their kernels report.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "check.h"
#include "cuda/context.h"
#include "cuda/failure.h"

namespace deep_ep::cuda {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

Call Context::begin_local(Stream stream) {
  Call call;
  call.wait = stream == nullptr;
  call.stream = call.wait ? stream_->get() : static_cast<cudaStream_t>(stream);
  take_turn(call);
  return call;
}

// Calls of one buffer run one after the other, whatever streams they come on.
void Context::take_turn(Call& call) {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda::check(cudaStreamIsCapturing(call.stream, &status), "cudaStreamIsCapturing");
  call.capturing = capturing_ = status != cudaStreamCaptureStatusNone;
  captured_.clear();  // of a call that failed
  if (!call.capturing && last_stream_ != nullptr && last_stream_ != call.stream)
    cuda::check(cudaStreamWaitEvent(call.stream, last_done_), "cudaStreamWaitEvent");
  returns_->sweep(completed());
  sweep_graphs();
}

Call Context::plain_call(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers) {
  const bool low_latency = operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine;
  Call call = begin_local(stream);
  call.operation = operation;
  call.timeout = timeout;
  call.blocks = num_workers > 0 ? std::min(num_workers, most_blocks_)
                : low_latency   ? low_latency_blocks_
                                : default_blocks_;
  call.number = ++operations_;
  count_launch(call);
  return call;
}

void Context::count_launch(Call& call) {
  call.serial = ++serial_;
  returns_->note_call(call.serial);
}

Call Context::resume(const Call& sent) {
  Call call = sent;
  take_turn(call);
  count_launch(call);
  return call;
}

// Found here, because on the device it would be a wait for ourselves.
void Context::refuse_where_tickets_are_open(const Call& call) {
  const bool low_latency =
      call.operation == Operation::kLowLatencyDispatch || call.operation == Operation::kLowLatencyCombine;
  const auto depth = static_cast<std::uint64_t>(low_latency ? std::min(plan::kOperationsInFlight, config.num_tickets)
                                                            : plan::kOperationsInFlight);
  if (open_tickets_.empty() || *open_tickets_.begin() + depth > call.number) return;
  const std::string why = fmt::format(
      "{}: the ticket of operation {} is still open, and {} needs its place: receive it first (num_tickets "
      "= {})",
      name(call.operation), *open_tickets_.begin(), call.number, config.num_tickets);
  refuse(call, why);
  throw Error(ErrorCode::kInvalidArgument, why);
}

Call Context::begin(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers) {
  count([](Statistics& statistics) { ++statistics.operations; });
  Call call = plain_call(operation, stream, timeout, num_workers);
  Fault fault;
  if (!call.capturing && take_fault(fault)) {
    launch_refusal(call, fmt::format("an earlier call of rank {} had failed", rank));
    end(call);
    raise(fault);
  }
  refuse_where_tickets_are_open(call);
  sweep();
  return call;
}

Common Context::common(const Call& call, const Signature& signature) const {
  Common common{};
  common.state = state_;
  common.mailbox = device_mailbox_;
  common.counters = counters_;
  common.peers = device_peers_;
  common.far = far_;
  common.layout = layout_;
  common.tickets = plan::Divisor(layout_.num_tickets);
  common.rank = rank;
  common.num_ranks = num_ranks;
  common.operation = call.operation;
  common.timeout_ns = static_cast<std::uint64_t>(std::chrono::nanoseconds(call.timeout).count());
  common.serial = call.serial;
  std::copy(signature.fields.begin(), signature.fields.end(), common.signature);
  return common;
}

void Context::launched(const Call& call) {
  if (const cudaError_t code = cudaGetLastError(); code != cudaSuccess)
    cuda::check(code, fmt::format("launching {}", name(call.operation)));
  if (call.capturing) {
    give_to_graph(call.stream, std::exchange(captured_, {}));
    return;
  }
  cuda::check(cudaEventRecord(last_done_, call.stream), "cudaEventRecord");
  last_stream_ = call.stream;
}

void Context::end(const Call& call) {
  end_sending(call);
  if (call.wait && !call.capturing) raise_fault();
}

void Context::end_sending(const Call& call) {
  launched(call);
  if (call.wait && !call.capturing) cuda::check(cudaStreamSynchronize(call.stream), name(call.operation));
}

void Context::await_counts(const Call& call) {
  cuda::check(cudaGetLastError(), fmt::format("launching {}", name(call.operation)));
  // The kernel has the deadline; the host's is a net below it, for a GPU that does not answer at all.
  const auto deadline = Clock::now() + 2 * call.timeout + std::chrono::seconds(10);
  const std::atomic_ref<std::uint64_t> counted(mailbox_->counted);
  while (counted.load(std::memory_order_acquire) != call.serial) {
    if (Clock::now() < deadline) continue;
    cuda::check(cudaStreamQuery(call.stream), name(call.operation));
    throw Error(ErrorCode::kSystem, fmt::format("{}: the GPU did not answer", name(call.operation)));
  }
  raise_fault();
}

void Context::launch_refusal(const Call& call, const std::string& why) {
  RefuseParams params{};
  params.common = common(call, Signature{});
  why.copy(params.text, sizeof params.text - 1);
  launch_refuse(params, call.stream);
}

void Context::refuse(Operation operation, const std::string& why) {
  count([](Statistics& statistics) { ++statistics.refused; });
  refuse(plain_call(operation, nullptr, config.timeout, 1), why);
}

void Context::refuse(const Call& begun, const std::string& why) {
  launch_refusal(begun, why);
  end(begun);
}

void Context::check() {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  if (last_stream_ != nullptr) cuda::check(cudaEventSynchronize(last_done_), "cudaEventSynchronize");
  raise_fault();
}

// Acquire: the kernel wrote the record, fenced, then set the kind.
bool Context::fault_waits() const {
  return std::atomic_ref<std::uint32_t>(mailbox_->fault.kind).load(std::memory_order_acquire) != Fault::kNone;
}

bool Context::take_fault(Fault& fault) {
  if (!fault_waits()) return false;
  fault = mailbox_->fault;
  quarantine_doubts();
  std::atomic_ref<std::uint32_t>(mailbox_->fault.kind).store(Fault::kNone, std::memory_order_release);
  return true;
}

void Context::raise_fault() {
  Fault fault;
  if (take_fault(fault)) raise(fault);
}

// Between nodes the one who is waited for may only wait himself: a rank that has died, or is silent altogether, is to
// blame before one who was to pass its rows on.
void Context::raise_timeout(const Fault& fault) {
  int peer = fault.peer;
  if (link_) {
    std::vector<char> masked;
    std::vector<int> active;
    for (const Peer& other : peers()) {
      masked.push_back(other.active == 0);
      if (other.active != 0) active.push_back(static_cast<int>(masked.size()) - 1);
    }
    for (int other : active)
      if (windows_[other] && windows_[other]->owner_gone()) link_->report_dead(other, "its process has ended");
    int blamed = link_->dead_rank(masked);
    if (blamed < 0) blamed = link_->silent_rank(peer, active);
    if (blamed >= 0) peer = blamed;
  }
  throw Error(WaitRecord{rank, name(static_cast<Operation>(fault.phase)), peer, fault.epoch,
                         static_cast<std::uint64_t>(fault.expected), static_cast<std::uint64_t>(fault.seen),
                         is_gone(peer) || (link_ && link_->dead(peer))});
}

void Context::raise(const Fault& fault) {
  const auto operation = static_cast<Operation>(fault.phase);
  const bool late = fault.kind == Fault::kTimeout || fault.kind == Fault::kGaveUp;
  count([&](Statistics& statistics) { ++(late ? statistics.timeouts : statistics.refused); });
  switch (static_cast<Fault::Kind>(fault.kind)) {
    case Fault::kTimeout: raise_timeout(fault);
    case Fault::kGaveUp:
      throw Error(WaitRecord{rank, "combine (that rank gave up first)", fault.peer, fault.epoch, 1, 0, false});
    case Fault::kDiffers: {
      Signature ours, theirs;
      ours.fields[fault.field] = fault.expected;
      theirs.fields[fault.field] = fault.seen;
      ours.require_same(theirs, rank, fault.peer);
      break;
    }
    case Fault::kBadId:
      require(false, "rank {} refused this {}: topk_idx[{}, {}]: expert {}, experts are 0 .. {}", fault.peer,
              name(operation), fault.expected / fault.num_topk, fault.expected % fault.num_topk, fault.seen,
              fault.num_experts - 1);
      break;
    case Fault::kRefused:
      require(false, "rank {} refused this {}: {}", fault.peer, name(operation), fault.refusal);
      break;
    case Fault::kNoRoom:
      require(false, "arena_bytes: rank {} needs {} bytes of arena for this dispatch, {} are free there", fault.peer,
              fault.expected, fault.seen);
      break;
    case Fault::kFullSlot:
      require(false, "kPadded: a slot of rank {} would get {} rows, it has room for {}", fault.peer, fault.expected,
              fault.seen);
      break;
    case Fault::kTooManyRows:
      require(false, "max_rows: rank {} would receive {} rows, max_rows there is {}", fault.peer, fault.expected,
              fault.seen);
      break;
    case Fault::kStray:
      require(false, "rank {} sent or asked for something at number {} of a {}, {} are awaited", fault.peer, fault.seen,
              name(operation), fault.expected);
      break;
    case Fault::kNone: break;
  }
  throw Error(ErrorCode::kSystem, "a fault of unknown kind was reported");
}

}  // namespace deep_ep::cuda
