// SPDX-License-Identifier: MIT
// The public Buffer: checks each call once, chooses the backend, hands the call over.
#include "deep_ep/buffer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "arguments.h"
#include "backend.h"
#include "check.h"
#include "plan/routing.h"

namespace deep_ep {

struct Buffer::State {
  int rank = 0;
  Config config;
  plan::Topology topology;
  plan::WindowLayout layout;
  bool on_device = false;
  std::unique_ptr<Backend> backend;                      // none: closed
  std::map<int, std::shared_ptr<const Placement>> even;  // by number of experts: built once

  CallScope scope() const { return {rank, topology.num_ranks, config, layout, on_device}; }

  Backend& open() const {
    require(backend != nullptr, "the buffer is closed");
    return *backend;
  }

  std::shared_ptr<const Placement> even_placement(const DispatchInput& in) {
    if (in.placement || in.handle || in.num_experts < 1) return nullptr;
    auto& placement = even[in.num_experts];
    if (!placement) placement = Placement::even(in.num_experts, topology.num_ranks);
    return placement;
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

Buffer::Buffer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Buffer::~Buffer() { close(); }

namespace {

std::unique_ptr<Backend> open_backend(const BackendInput& input) {
  if (input.options.backend == BackendKind::kHost) return host::open_backend(input);
#ifdef EP_WITH_CUDA
  return cuda::open_backend(input);
#else
  throw Error(ErrorCode::kUnsupported, "backend: this library was built without CUDA (DEEP_EP_CUDA=OFF)");
#endif
}

}  // namespace

std::unique_ptr<Buffer> Buffer::open(std::shared_ptr<Bootstrap> group, const Config& config, const Options& options) {
  require(group != nullptr, "group must be given");
  require(options.num_workers >= 0, "num_workers must not be negative: {}", options.num_workers);
  auto state = std::make_unique<State>();
  const int num_ranks = group->num_ranks();
  state->rank = group->rank();
  state->config = config;
  state->topology = plan::Topology::from(config.ranks_per_node, num_ranks);
  state->layout =
      plan::WindowLayout::place(config, num_ranks, plan::arena_bytes_of(config, num_ranks, plan::machine_bytes()));
  state->on_device = options.backend == BackendKind::kCuda;
  state->backend = open_backend({std::move(group), config, options, state->topology});
  return std::unique_ptr<Buffer>(new Buffer(std::move(state)));
}

int Buffer::rank() const { return state_->rank; }
int Buffer::num_ranks() const { return state_->topology.num_ranks; }
int Buffer::num_nodes() const { return state_->topology.num_nodes; }
const Config& Buffer::config() const { return state_->config; }

int Buffer::node_of(int rank) const {
  require(rank >= 0 && rank < num_ranks(), "rank must be 0 .. {}: {}", num_ranks() - 1, rank);
  return state_->topology.node_of_rank[rank];
}

DispatchLayout Buffer::dispatch_layout(const TensorView& given_idx, int num_experts,
                                       const std::shared_ptr<const Placement>& placement) const {
  check_topk_idx(given_idx, num_experts, true);
  const Tensor topk_idx = state_->open().to_host(given_idx);
  check_topk_idx(topk_idx, num_experts);
  const auto placed = placement ? placement : Placement::even(num_experts, num_ranks());
  check_placement(*placed, num_experts, state_->scope());
  const plan::PlacementView view{placed->first_replica().data(), placed->all_replicas().data(),
                                 state_->topology.node_of_rank.data(), placed->policy()};
  const plan::Routes routes = plan::make_routes(topk_idx, view, num_ranks(), placed->max_slots(), rank());
  const std::int64_t tokens = routes.num_tokens;
  const auto zeros = [](DType dtype, std::initializer_list<std::int64_t> shape) {
    Tensor tensor = Tensor::allocate(dtype, shape);
    std::fill_n(tensor.as<std::byte>(), tensor.bytes(), std::byte{0});
    return tensor;
  };
  DispatchLayout layout{zeros(DType::kI32, {num_ranks()}), zeros(DType::kI32, {num_nodes()}),
                        zeros(DType::kI32, {num_experts}), zeros(DType::kBool, {tokens, num_ranks()})};
  std::copy(routes.tokens_to.begin(), routes.tokens_to.end(), layout.tokens_per_rank.as<std::int32_t>());
  std::vector<std::int64_t> last_token(num_nodes(), -1);
  for (std::int64_t i = 0; i < topk_idx.numel(); ++i) {
    if (routes.rank[i] < 0) continue;
    const std::int64_t token = i / routes.num_topk;
    const int node = state_->topology.node_of_rank[routes.rank[i]];
    ++layout.tokens_per_expert.as<std::int32_t>()[plan::expert_id(topk_idx, i)];
    layout.is_token_in_rank.as<std::uint8_t>()[token * num_ranks() + routes.rank[i]] = 1;
    if (std::exchange(last_token[node], token) != token) ++layout.tokens_per_node.as<std::int32_t>()[node];
  }
  for (Tensor* tensor :
       {&layout.tokens_per_rank, &layout.tokens_per_node, &layout.tokens_per_expert, &layout.is_token_in_rank})
    *tensor = state_->open().from_host(std::move(*tensor));
  return layout;
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
Statistics Buffer::statistics() const { return state_->open().statistics(); }
void Buffer::check() { state_->open().check(); }
void Buffer::reset_statistics() { state_->open().reset_statistics(); }
void Buffer::close() { state_->backend.reset(); }

}  // namespace deep_ep
