// SPDX-License-Identifier: MIT
// The host backend's front: hands each call to its operation.
#include "backend.h"

#include "check.h"
#include "host/context.h"
#include "host/operations.h"

namespace deep_ep::host {

namespace {

class HostBackend final : public Backend {
 public:
  explicit HostBackend(const BackendInput& input) : context_(std::make_shared<Context>(input)) {}

  DispatchOutput dispatch(const DispatchCall& call) override { return host::dispatch(*context_, call); }
  CombineOutput combine(const CombineCall& call) override { return host::combine(*context_, call); }
  Ticket<DispatchOutput> low_latency_dispatch(const DispatchCall& call) override {
    return host::low_latency_dispatch(context_, call);
  }
  Ticket<CombineOutput> low_latency_combine(const CombineCall& call) override {
    return host::low_latency_combine(context_, call);
  }
  void refuse(Operation operation, const std::string& why) override { context_->refuse(operation, why); }

  DispatchLayout dispatch_layout(const LayoutCall& call) override {
    return host::dispatch_layout(call, context_->topology, context_->rank);
  }
  // Work on ordinary memory is done when its caller drops it.
  std::shared_ptr<void> lend(std::vector<std::shared_ptr<void>> owners, Stream) override {
    return std::make_shared<std::vector<std::shared_ptr<void>>>(std::move(owners));
  }

  Tensor allocate(const TensorView& shape) override {
    plan::Arena& arena = context_->arena();
    plan::Arena::Block block = arena.allocate(shape.bytes(), false);
    require(block.owner != nullptr, "arena_bytes: {} bytes are needed, {} are free in one piece", shape.bytes(),
            arena.largest_free());
    Tensor tensor(shape, std::move(block.owner));
    tensor.data = context_->window(context_->rank) + block.at;
    return tensor;
  }

  void set_masked(int rank, bool masked) override { context_->set_masked(rank, masked); }
  bool masked(int rank) const override { return context_->masked(rank); }
  std::string describe() const override { return context_->link() != nullptr ? context_->link()->describe() : ""; }
  Statistics statistics() const override { return context_->statistics(); }
  void reset_statistics() override { context_->reset_statistics(); }

 private:
  const std::shared_ptr<Context> context_;
};

}  // namespace

std::unique_ptr<Backend> open_backend(const BackendInput& input) { return std::make_unique<HostBackend>(input); }

}  // namespace deep_ep::host
