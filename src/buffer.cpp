// SPDX-License-Identifier: MIT
// The public Buffer: checks each call once, chooses the backend, hands the call over.
#include "deep_ep/buffer.h"

#include <map>
#include <optional>
#include <utility>

#include "arguments.h"
#include "backend.h"
#include "check.h"
#include "introduction.h"

namespace deep_ep {

struct Buffer::State {
  int rank = 0;
  Config config;
  plan::Topology topology;
  plan::WindowLayout layout;
  bool on_device = false;
  std::unique_ptr<Backend> backend;                      // none: closed
  std::map<int, std::shared_ptr<const Placement>> even;  // by number of experts: built once

  void prepare(BackendInput& input);

  CallScope scope() const { return {rank, topology.num_ranks, config, layout, on_device}; }

  Backend& open() const {
    require(backend != nullptr, "the buffer is closed");
    return *backend;
  }

  std::shared_ptr<const Placement> even_placement(int num_experts) {
    auto& placement = even[num_experts];
    if (!placement) placement = Placement::even(num_experts, topology.num_ranks);
    return placement;
  }
  std::shared_ptr<const Placement> even_placement(const DispatchInput& in) {
    return in.placement || in.handle || in.num_experts < 1 ? nullptr : even_placement(in.num_experts);
  }

  // A call that fails its checks still counts as made: the peers are told, and stay in step.
  template <typename Check>
  auto checked(Operation operation, const Check& check) {
    open();
    try {
      return check();
    } catch (const Error& error) {
      refuse(operation, error.what());
      throw;
    }
  }

  void refuse(Operation operation, const std::string& why) {
    Backend& target = open();
    try {
      target.refuse(operation, why);
    } catch (const Error&) {
      // The peers do not listen; what the caller must hear is the first error.
    }
  }

  DispatchCall dispatch_call(Operation operation, const DispatchInput& in) {
    return checked(operation, [&] { return check_dispatch(operation, in, scope(), even_placement(in)); });
  }
  CombineCall combine_call(Operation operation, const CombineInput& in) {
    return checked(operation, [&] { return check_combine(operation, in, scope()); });
  }
};

bool has_backend(BackendKind kind) noexcept {
#ifdef EP_WITH_CUDA
  return kind == BackendKind::kHost || kind == BackendKind::kCuda;
#else
  return kind == BackendKind::kHost;
#endif
}

Buffer::Buffer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Buffer::~Buffer() { close(); }

namespace {

void require_backend(const Options& options) {
  if (options.backend == BackendKind::kHost) return;
#ifdef EP_WITH_CUDA
  cuda::require_device(options);
#else
  throw Error(ErrorCode::kUnsupported, "backend: this library was built without CUDA (DEEP_EP_CUDA=OFF)");
#endif
}

std::unique_ptr<Backend> open_backend(const BackendInput& input) {
#ifdef EP_WITH_CUDA
  if (input.options.backend == BackendKind::kCuda) return cuda::open_backend(input);
#endif
  return host::open_backend(input);
}

// The meeting before all others: a rank that cannot go on says so, and nobody waits for it.
void meet(Bootstrap& group, const std::optional<Error>& failure, std::chrono::milliseconds timeout) {
  std::optional<Error> theirs;
  try {
    theirs = first_failure(group, failure, timeout.count() > 0 ? timeout : Config().open_timeout);
  } catch (...) {
    if (!failure) throw;  // else nobody listens; what the caller must hear is the first error
  }
  if (failure) throw *failure;
  if (theirs) throw *theirs;
}

}  // namespace

// All that can fail on this rank alone.
void Buffer::State::prepare(BackendInput& input) {
  require(input.options.num_workers >= 0, "num_workers must not be negative: {}", input.options.num_workers);
  require_backend(input.options);
  rank = input.group->rank();
  const int num_ranks = input.group->num_ranks();
  topology = input.topology = plan::Topology::from(config.ranks_per_node, num_ranks);
  layout = plan::WindowLayout::place(config, num_ranks, plan::arena_bytes_of(config, num_ranks, plan::machine_bytes()));
  on_device = input.options.backend == BackendKind::kCuda;
  input.config.network = config.network.with_environment();
}

std::unique_ptr<Buffer> Buffer::open(std::shared_ptr<Bootstrap> group, const Config& config, const Options& options) {
  require(group != nullptr, "group must be given");
  auto state = std::make_unique<State>();
  state->config = config;
  BackendInput input{std::move(group), config, options, {}};
  std::optional<Error> failure;
  try {
    state->prepare(input);
  } catch (const Error& error) {
    failure = error;
  }
  meet(*input.group, failure, config.open_timeout);
  state->backend = open_backend(input);
  return std::unique_ptr<Buffer>(new Buffer(std::move(state)));
}

int Buffer::rank() const { return state_->rank; }
int Buffer::num_ranks() const { return state_->topology.num_ranks; }
int Buffer::num_nodes() const { return state_->topology.num_nodes; }
const Config& Buffer::config() const { return state_->config; }
BackendKind Buffer::backend() const { return state_->on_device ? BackendKind::kCuda : BackendKind::kHost; }

int Buffer::node_of(int rank) const {
  require(rank >= 0 && rank < num_ranks(), "rank must be 0 .. {}: {}", num_ranks() - 1, rank);
  return state_->topology.node_of_rank[rank];
}

DispatchLayout Buffer::dispatch_layout(const TensorView& topk_idx, int num_experts,
                                       const std::shared_ptr<const Placement>& placement, Stream stream) const {
  Backend& backend = state_->open();
  check_topk_idx(topk_idx, num_experts, state_->on_device);
  const auto placed = placement ? placement : state_->even_placement(num_experts);
  check_placement(*placed, num_experts, state_->scope());
  return backend.dispatch_layout({topk_idx, num_experts, placed, stream});
}

DispatchOutput Buffer::dispatch(const DispatchInput& input) {
  const DispatchCall call = state_->dispatch_call(Operation::kDispatch, input);
  return state_->open().dispatch(call);
}

CombineOutput Buffer::combine(const CombineInput& input) {
  const CombineCall call = state_->combine_call(Operation::kCombine, input);
  return state_->open().combine(call);
}

Ticket<DispatchOutput> Buffer::low_latency_dispatch(const DispatchInput& input) {
  const DispatchCall call = state_->dispatch_call(Operation::kLowLatencyDispatch, input);
  return state_->open().low_latency_dispatch(call);
}

Ticket<CombineOutput> Buffer::low_latency_combine(const CombineInput& input) {
  const CombineCall call = state_->combine_call(Operation::kLowLatencyCombine, input);
  return state_->open().low_latency_combine(call);
}

void Buffer::refuse(Operation operation, const std::string& why) { state_->refuse(operation, why); }

Tensor Buffer::allocate(DType dtype, std::initializer_list<std::int64_t> shape) {
  return state_->open().allocate(TensorView(static_cast<void*>(nullptr), dtype, shape));
}

std::shared_ptr<void> Buffer::lend(std::vector<std::shared_ptr<void>> owners, Stream user) {
  if (user != nullptr) return state_->open().lend(std::move(owners), user);
  return std::make_shared<std::vector<std::shared_ptr<void>>>(std::move(owners));
}

void Buffer::set_masked(int rank, bool masked) {
  require(rank >= 0 && rank < num_ranks(), "rank must be 0 .. {}: {}", num_ranks() - 1, rank);
  require(!masked || rank != this->rank(), "rank: a rank cannot mask itself: {}", rank);
  state_->open().set_masked(rank, masked);
}

bool Buffer::masked(int rank) const {
  require(rank >= 0 && rank < num_ranks(), "rank must be 0 .. {}: {}", num_ranks() - 1, rank);
  return state_->open().masked(rank);
}

Support Buffer::supports(const CallShape& shape) const { return check_support(shape, state_->scope()); }
std::string Buffer::describe() const { return state_->config.to_string() + state_->open().describe(); }

Statistics Buffer::statistics() const { return state_->open().statistics(); }
void Buffer::check() { state_->open().check(); }
void Buffer::reset_statistics() { state_->open().reset_statistics(); }
void Buffer::close() { state_->backend.reset(); }

}  // namespace deep_ep
