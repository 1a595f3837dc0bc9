// SPDX-License-Identifier: MIT
// A Buffer on the backend under test, which takes tensors of ordinary memory: on a GPU they are copied there for the
// call. Results stay where the backend put them; to_host() of memory.h brings them home.
#pragma once

#include <memory>
#include <vector>

#include "deep_ep/gradient.h"
#include "memory.h"

namespace deep_ep::test {

class AnyBuffer {
 public:
  static std::unique_ptr<AnyBuffer> open(std::shared_ptr<Bootstrap> group, const Config& config = {},
                                         Options options = {});

  int rank() const { return buffer_->rank(); }
  int num_ranks() const { return buffer_->num_ranks(); }
  int num_nodes() const { return buffer_->num_nodes(); }
  int node_of(int rank) const { return buffer_->node_of(rank); }
  const Config& config() const { return buffer_->config(); }
  Statistics statistics() const { return buffer_->statistics(); }
  void reset_statistics() { buffer_->reset_statistics(); }
  void set_masked(int rank, bool masked) { buffer_->set_masked(rank, masked); }
  bool masked(int rank) const { return buffer_->masked(rank); }
  Support supports(const CallShape& shape) const { return buffer_->supports(shape); }
  void close() { buffer_->close(); }
  Tensor allocate(DType dtype, std::initializer_list<std::int64_t> shape) { return buffer_->allocate(dtype, shape); }
  /// input.x, of ordinary memory, in memory of the buffer and in the shape that the handle wants there.
  Tensor allocate_rows(const CombineInput& input);

  /// Counts in ordinary memory.
  DispatchLayout dispatch_layout(const TensorView& topk_idx, int num_experts,
                                 const std::shared_ptr<const Placement>& placement = nullptr) const;
  DispatchOutput dispatch(const DispatchInput& input);
  /// A result that the caller wants in `out` is there, in ordinary memory, when the call returns.
  CombineOutput combine(const CombineInput& input);
  Ticket<DispatchOutput> low_latency_dispatch(const DispatchInput& input);
  Ticket<CombineOutput> low_latency_combine(const CombineInput& input);

  /// The Buffer itself, for what takes tensors of the backend only.
  Buffer& plain() { return *buffer_; }

 private:
  explicit AnyBuffer(std::unique_ptr<Buffer> buffer) : buffer_(std::move(buffer)) {}
  TensorView place(const TensorView& tensor, std::vector<Tensor>& keep) const;
  DispatchInput place(const DispatchInput& input, std::vector<Tensor>& keep) const;
  CombineInput place(const CombineInput& input, std::vector<Tensor>& keep) const;

  std::vector<Tensor> kept_;  // what low-latency calls may still read; first, so that it goes last
  std::unique_ptr<Buffer> buffer_;
};

/// The backward pass of deep_ep/gradient.h, likewise.
CombineOutput dispatch_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_rows, const TensorView& grad_topk_weights = {});
DispatchOutput combine_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_out);
WeightedCombineGradient weighted_combine_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                                  const TensorView& grad_out, const TensorView& weights,
                                                  const TensorView& rows);

}  // namespace deep_ep::test
