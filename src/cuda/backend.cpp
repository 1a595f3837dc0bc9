// SPDX-License-Identifier: MIT
// The CUDA backend's front: hands each call to its operation.
#include "backend.h"

#include "check.h"
#include "cuda/operations.h"

namespace deep_ep::cuda {

namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendInput& input) : context_(std::make_shared<Context>(input)) {}

  DispatchOutput dispatch(const DispatchCall& call) override {
    const std::lock_guard lock(context_->calls());
    return cuda::dispatch(*context_, call);
  }
  CombineOutput combine(const CombineCall& call) override {
    const std::lock_guard lock(context_->calls());
    return cuda::combine(*context_, call);
  }
  DispatchLayout dispatch_layout(const LayoutCall& call) override {
    const std::lock_guard lock(context_->calls());
    return cuda::dispatch_layout(*context_, call);
  }
  Ticket<DispatchOutput> low_latency_dispatch(const DispatchCall& call) override {
    const std::lock_guard lock(context_->calls());
    return cuda::low_latency_dispatch(context_, call);
  }
  Ticket<CombineOutput> low_latency_combine(const CombineCall& call) override {
    const std::lock_guard lock(context_->calls());
    return cuda::low_latency_combine(context_, call);
  }
  void refuse(Operation operation, const std::string& why) override {
    const std::lock_guard lock(context_->calls());
    context_->refuse(operation, why);
  }
  void check() override {
    const std::lock_guard lock(context_->calls());
    context_->check();
  }

  Tensor allocate(const TensorView& shape) override {
    plan::Arena::Block block = context_->arena_block(shape.bytes(), false);
    require(block.owner != nullptr, "arena_bytes: {} bytes are needed, {} are free in one piece", shape.bytes(),
            context_->arena_room());
    Tensor tensor(shape, std::move(block.owner));
    tensor.data = context_->window() + block.at;
    return tensor;
  }
  std::shared_ptr<void> lend(std::vector<std::shared_ptr<void>> owners, Stream user) override {
    return context_->lend(std::move(owners), user);
  }

  std::string describe() const override {
    return context_->link() == nullptr
               ? ""
               : context_->link()->describe() + "network.gpu_memory = staged through pinned host memory\n";
  }
  void set_masked(int rank, bool masked) override { context_->set_masked(rank, masked); }
  bool masked(int rank) const override { return context_->masked(rank); }
  Statistics statistics() const override { return context_->statistics(); }
  void reset_statistics() override { context_->reset_statistics(); }

 private:
  const std::shared_ptr<Context> context_;  // tickets have it too
};

}  // namespace

std::unique_ptr<Backend> open_backend(const BackendInput& input) { return std::make_unique<CudaBackend>(input); }

}  // namespace deep_ep::cuda
