// SPDX-License-Identifier: MIT
// The C calls on a buffer: open and close, dispatch, combine, low latency.
#include "capi/objects.h"

namespace deep_ep::capi {

namespace {

Buffer& buffer_of(deep_ep_buffer* buffer) { return *given(buffer, "buffer").buffer; }
const Buffer& buffer_of(const deep_ep_buffer* buffer) { return *given(buffer, "buffer").buffer; }

/// Arguments that could not even be converted are refused like those that the library rejects: the peers hear of it
/// instead of waiting for this rank.
template <typename Input>
auto converted(Buffer& buffer, Operation operation, const Input* input) {
  try {
    return input_of(input);
  } catch (const std::exception& error) {
    buffer.refuse(operation, error.what());
    throw;
  }
}

std::unique_ptr<deep_ep_dispatch_result> result_object(DispatchOutput output) {
  return std::make_unique<deep_ep_dispatch_result>(std::move(output));
}

std::unique_ptr<deep_ep_combine_result> result_object(CombineOutput output) {
  return std::unique_ptr<deep_ep_combine_result>(new deep_ep_combine_result{std::move(output)});
}

Options options_of(const deep_ep_options* options) {
  const deep_ep_options o = read(options, "options", EP_END_OF(deep_ep_options, pin_workers));
  Options made{.num_workers = o.num_workers, .pin_workers = o.pin_workers != 0};
  choose_backend(o.backend, o.cuda_device, made);
  return made;
}

Tensor allocate(Buffer& buffer, DType dtype, int ndim, const std::int64_t* shape) {
  switch (ndim) {
    case 1: return buffer.allocate(dtype, {shape[0]});
    case 2: return buffer.allocate(dtype, {shape[0], shape[1]});
    case 3: return buffer.allocate(dtype, {shape[0], shape[1], shape[2]});
  }
  throw Error(ErrorCode::kInvalidArgument, fmt::format("ndim: {}, possible are 1 .. {}", ndim, TensorView::kMaxDims));
}

void require_shape(const std::int64_t* shape, int ndim) {
  given(shape, "shape");
  for (int dim = 0; dim < ndim && dim < TensorView::kMaxDims; ++dim) {
    require(shape[dim] >= 0, "shape[{}]: {}, at least 0", dim, shape[dim]);
  }
}

CallShape call_of(const deep_ep_call_shape* shape) {
  const deep_ep_call_shape s = read(&given(shape, "shape"), "shape", EP_END_OF(deep_ep_call_shape, low_latency));
  CallShape made;
  made.dtype = dtype_of(s.dtype, "shape.dtype");
  made.hidden = s.hidden;
  made.num_tokens = s.num_tokens;
  made.num_topk = s.num_topk;
  made.num_experts = s.num_experts;
  made.fp8 = s.fp8 != 0;
  made.low_latency = s.low_latency != 0;
  return made;
}

}  // namespace
}  // namespace deep_ep::capi

using namespace deep_ep::capi;

extern "C" {

deep_ep_status deep_ep_buffer_open(const deep_ep_group* group, const deep_ep_config* config,
                                   const deep_ep_options* options, deep_ep_buffer** buffer) {
  return make_object(buffer, [&] {
    auto opened = deep_ep::Buffer::open(given(group, "group").group, config_of(config), options_of(options));
    return std::unique_ptr<deep_ep_buffer>(new deep_ep_buffer{std::move(opened)});
  });
}

void deep_ep_buffer_close(deep_ep_buffer* buffer) { delete buffer; }

int deep_ep_buffer_rank(const deep_ep_buffer* buffer) { return buffer != nullptr ? buffer->buffer->rank() : -1; }
int deep_ep_buffer_num_ranks(const deep_ep_buffer* buffer) {
  return buffer != nullptr ? buffer->buffer->num_ranks() : -1;
}
int deep_ep_buffer_num_nodes(const deep_ep_buffer* buffer) {
  return buffer != nullptr ? buffer->buffer->num_nodes() : -1;
}

int deep_ep_buffer_node_of(const deep_ep_buffer* buffer, int rank) {
  if (rank < 0 || rank >= deep_ep_buffer_num_ranks(buffer)) return -1;
  return buffer->buffer->node_of(rank);
}

deep_ep_status deep_ep_check(deep_ep_buffer* buffer) {
  return guarded([&] { buffer_of(buffer).check(); });
}

deep_ep_status deep_ep_set_masked(deep_ep_buffer* buffer, int rank, int masked) {
  return guarded([&] { buffer_of(buffer).set_masked(rank, masked != 0); });
}

int deep_ep_masked(const deep_ep_buffer* buffer, int rank) {
  if (rank < 0 || rank >= deep_ep_buffer_num_ranks(buffer)) return -1;
  return buffer->buffer->masked(rank) ? 1 : 0;
}

deep_ep_status deep_ep_supports(const deep_ep_buffer* buffer, const deep_ep_call_shape* shape) {
  return guarded([&] {
    const deep_ep::Support support = buffer_of(buffer).supports(call_of(shape));
    if (!support) throw deep_ep::Error(deep_ep::ErrorCode::kUnsupported, support.reason);
  });
}

deep_ep_status deep_ep_allocate(deep_ep_buffer* buffer, deep_ep_dtype dtype, int ndim, const int64_t* shape,
                                deep_ep_allocation** allocation) {
  return make_object(allocation, [&] {
    require_shape(shape, ndim);
    deep_ep::Tensor tensor = allocate(buffer_of(buffer), dtype_of(dtype, "dtype"), ndim, shape);
    return std::unique_ptr<deep_ep_allocation>(new deep_ep_allocation{std::move(tensor)});
  });
}

deep_ep_status deep_ep_dispatch_layout(const deep_ep_buffer* buffer, const deep_ep_tensor* topk_idx, int num_experts,
                                       const deep_ep_placement* placement, deep_ep_layout_result** result) {
  return make_object(result, [&] {
    deep_ep::DispatchLayout layout =
        buffer_of(buffer).dispatch_layout(view_of(topk_idx, "topk_idx"), num_experts, placement_of(placement));
    return std::unique_ptr<deep_ep_layout_result>(new deep_ep_layout_result{std::move(layout)});
  });
}

deep_ep_status deep_ep_dispatch(deep_ep_buffer* buffer, const deep_ep_dispatch_input* input,
                                deep_ep_dispatch_result** result) {
  return make_object(result, [&] {
    deep_ep::Buffer& on = buffer_of(buffer);
    return result_object(on.dispatch(converted(on, deep_ep::Operation::kDispatch, input)));
  });
}

deep_ep_status deep_ep_combine(deep_ep_buffer* buffer, const deep_ep_combine_input* input,
                               deep_ep_combine_result** result) {
  return make_object(result, [&] {
    deep_ep::Buffer& on = buffer_of(buffer);
    return result_object(on.combine(converted(on, deep_ep::Operation::kCombine, input)));
  });
}

deep_ep_status deep_ep_low_latency_dispatch(deep_ep_buffer* buffer, const deep_ep_dispatch_input* input,
                                            deep_ep_dispatch_ticket** ticket) {
  return make_object(ticket, [&] {
    deep_ep::Buffer& on = buffer_of(buffer);
    auto sent = on.low_latency_dispatch(converted(on, deep_ep::Operation::kLowLatencyDispatch, input));
    return std::unique_ptr<deep_ep_dispatch_ticket>(new deep_ep_dispatch_ticket{std::move(sent)});
  });
}

deep_ep_status deep_ep_low_latency_dispatch_receive(deep_ep_dispatch_ticket* ticket, deep_ep_dispatch_result** result) {
  return make_object(result, [&] { return result_object(given(ticket, "ticket").ticket.receive()); });
}

deep_ep_status deep_ep_low_latency_combine(deep_ep_buffer* buffer, const deep_ep_combine_input* input,
                                           deep_ep_combine_ticket** ticket) {
  return make_object(ticket, [&] {
    deep_ep::Buffer& on = buffer_of(buffer);
    auto sent = on.low_latency_combine(converted(on, deep_ep::Operation::kLowLatencyCombine, input));
    return std::unique_ptr<deep_ep_combine_ticket>(new deep_ep_combine_ticket{std::move(sent)});
  });
}

deep_ep_status deep_ep_low_latency_combine_receive(deep_ep_combine_ticket* ticket, deep_ep_combine_result** result) {
  return make_object(result, [&] { return result_object(given(ticket, "ticket").ticket.receive()); });
}

void deep_ep_dispatch_ticket_free(deep_ep_dispatch_ticket* ticket) { delete ticket; }
void deep_ep_combine_ticket_free(deep_ep_combine_ticket* ticket) { delete ticket; }

}  // extern "C"
