// SPDX-License-Identifier: MIT
#include "any_buffer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <utility>

#include "device.h"

namespace deep_ep::test {

std::unique_ptr<AnyBuffer> AnyBuffer::open(std::shared_ptr<Bootstrap> group, const Config& config, Options options) {
  if (on_cuda()) {
    device::use_for(group->rank());
    options.backend = BackendKind::kCuda;
    options.cuda_device = device::of_rank(group->rank());
  }
  return std::unique_ptr<AnyBuffer>(new AnyBuffer(Buffer::open(std::move(group), config, options)));
}

TensorView AnyBuffer::place(const TensorView& tensor, std::vector<Tensor>& keep) const {
  keep.push_back(to_backend(tensor));
  return keep.back();
}

DispatchInput AnyBuffer::place(const DispatchInput& input, std::vector<Tensor>& keep) const {
  DispatchInput there = input;
  for (TensorView* tensor : {&there.x, &there.scales, &there.topk_idx, &there.topk_weights})
    *tensor = place(*tensor, keep);
  for (TensorView& side : there.side) side = place(side, keep);
  return there;
}

namespace {

// The same rows in a tensor that has room for as many as the handle says; what is behind them are NaNs.
Tensor with_room(const TensorView& rows, std::int64_t came, std::int64_t room) {
  if (!rows.given() || rows.shape[0] != came || device::holds(rows.data)) return Tensor(rows, nullptr);
  TensorView shape = rows;
  shape.shape[0] = room;
  Tensor roomy = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(shape.bytes())});
  std::memset(roomy.data, 0xff, roomy.bytes());
  std::memcpy(roomy.data, rows.data, rows.bytes());
  shape.data = roomy.data;
  return Tensor(shape, roomy.owner);
}

// Inputs are made for as many rows as come; a GPU's low-latency handle wants the shape of its outputs.
void make_room(CombineInput& input, std::vector<Tensor>& keep) {
  if (!input.handle || !has_room_to_spare(*input.handle)) return;
  const Handle& h = *input.handle;
  if (h.layout == OutputLayout::kPadded) return;
  const std::int64_t came = rows_that_came(h);
  for (TensorView* tensor : {&input.x, &input.topk_weights}) {
    keep.push_back(with_room(*tensor, came, h.num_rows));
    *tensor = keep.back();
  }
}

}  // namespace

Tensor AnyBuffer::allocate_rows(const CombineInput& input) {
  CombineInput roomy = input;
  std::vector<Tensor> keep;
  make_room(roomy, keep);
  const Tensor memory = allocate(DType::kU8, {static_cast<std::int64_t>(roomy.x.bytes())});
  overwrite(memory, roomy.x.data);
  TensorView rows = roomy.x;
  rows.data = memory.data;
  return Tensor(rows, memory.owner);
}

CombineInput AnyBuffer::place(const CombineInput& input, std::vector<Tensor>& keep) const {
  CombineInput there = input;
  make_room(there, keep);
  for (TensorView* tensor : {&there.x, &there.topk_weights, &there.weights, &there.bias[0], &there.bias[1], &there.out})
    *tensor = place(*tensor, keep);
  return there;
}

namespace {

// The result in the caller's `out`; that the backend wrote where it was told is checked on the way.
CombineOutput bring_home(CombineOutput got, const TensorView& out, const TensorView& placed) {
  if (!out.given() || out.data == placed.data) return got;
  EXPECT_EQ(got.x.data, placed.data) << "the sum lies elsewhere than in `out`";
  const Tensor copy = to_host(got.x);
  std::memcpy(out.data, copy.data, out.bytes());
  got.x = Tensor(out, nullptr);
  return got;
}

class HomewardReceiver final : public Ticket<CombineOutput>::Receiver {
 public:
  HomewardReceiver(Ticket<CombineOutput> ticket, const TensorView& out, const TensorView& placed)
      : ticket_(std::move(ticket)), out_(out), placed_(placed) {}
  CombineOutput receive() override { return bring_home(ticket_.receive(), out_, placed_); }

 private:
  Ticket<CombineOutput> ticket_;
  TensorView out_, placed_;
};

}  // namespace

DispatchLayout AnyBuffer::dispatch_layout(const TensorView& topk_idx, int num_experts,
                                          const std::shared_ptr<const Placement>& placement) const {
  const Tensor there = to_backend(topk_idx);
  const DispatchLayout layout = std::as_const(*buffer_).dispatch_layout(there, num_experts, placement);
  return {to_host(layout.tokens_per_rank), to_host(layout.tokens_per_node), to_host(layout.tokens_per_expert),
          to_host(layout.is_token_in_rank)};
}

DispatchOutput AnyBuffer::dispatch(const DispatchInput& input) {
  std::vector<Tensor> keep;
  return buffer_->dispatch(place(input, keep));
}

CombineOutput AnyBuffer::combine(const CombineInput& input) {
  std::vector<Tensor> keep;
  const CombineInput there = place(input, keep);
  return bring_home(buffer_->combine(there), input.out, there.out);
}

Ticket<DispatchOutput> AnyBuffer::low_latency_dispatch(const DispatchInput& input) {
  return buffer_->low_latency_dispatch(place(input, kept_));
}

Ticket<CombineOutput> AnyBuffer::low_latency_combine(const CombineInput& input) {
  const CombineInput there = place(input, kept_);
  auto ticket = buffer_->low_latency_combine(there);
  if (!on_cuda()) return ticket;
  return Ticket<CombineOutput>(std::make_unique<HomewardReceiver>(std::move(ticket), input.out, there.out));
}

CombineOutput dispatch_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_rows, const TensorView& grad_topk_weights) {
  const Tensor rows = to_backend(grad_rows), weights = to_backend(grad_topk_weights);
  return deep_ep::dispatch_backward(buffer.plain(), handle, rows, weights);
}

DispatchOutput combine_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                const TensorView& grad_out) {
  const Tensor gradient = to_backend(grad_out);
  return deep_ep::combine_backward(buffer.plain(), handle, gradient);
}

WeightedCombineGradient weighted_combine_backward(AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle,
                                                  const TensorView& grad_out, const TensorView& weights,
                                                  const TensorView& rows) {
  const Tensor gradient = to_backend(grad_out), factors = to_backend(weights), placed = to_backend(rows);
  return deep_ep::weighted_combine_backward(buffer.plain(), handle, gradient, factors, placed);
}

}  // namespace deep_ep::test
