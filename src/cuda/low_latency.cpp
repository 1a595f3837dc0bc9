// SPDX-License-Identifier: MIT
// The host's part of low latency: makes room, fills the kernels' arguments once, and launches the same kernel to send
// and to receive.
#include <algorithm>

#include "check.h"
#include "cuda/failure.h"
#include "cuda/low_latency.h"
#include "cuda/operations.h"
#include "plan/lines.h"

namespace deep_ep::cuda {

namespace {

// Tensors of one handle in one piece of memory.
class Pieces {
 public:
  void add(Tensor& tensor, DType dtype, std::initializer_list<std::int64_t> shape) {
    tensor = Tensor(TensorView(static_cast<void*>(nullptr), dtype, shape), nullptr);
    wanted_.push_back({&tensor, plan::take(bytes_, tensor.bytes(), 16)});
  }
  std::shared_ptr<void> allocate(Context& context, const Call& call) {
    std::shared_ptr<void> memory = context.output_memory(std::max<std::size_t>(bytes_, 1), call);
    for (const auto& [tensor, at] : wanted_) {
      tensor->data = static_cast<std::byte*>(memory.get()) + at;
      tensor->owner = memory;
    }
    return memory;
  }

 private:
  std::vector<std::pair<Tensor*, std::size_t>> wanted_;
  std::size_t bytes_ = 0;
};

plan::RowParts parts_of(const Context& context, std::size_t row_bytes, int max_tokens) {
  const std::size_t flags = context.layout().flags_of_ticket / static_cast<std::size_t>(context.num_ranks);
  return plan::RowParts::cut(row_bytes, static_cast<std::size_t>(max_tokens), flags);
}

// An operation between its two kernels. `Launch` launches one of them.
template <typename Output, typename Params>
class Receiver final : public Ticket<Output>::Receiver {
 public:
  struct Sent {
    std::shared_ptr<Context> context;
    Call call;
    Params params{};
    Output output;
    std::shared_ptr<const void> handle;  // what the second kernel reads or writes, as is the next
    std::shared_ptr<void> memory;
    void (*launch)(const Params& params, const Call& call) = nullptr;
    bool at_once = false;
    bool mask_silent = false;
  };

  explicit Receiver(Sent sent) : sent_(std::move(sent)) {}
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;

  void send() {
    Context& context = *sent_.context;
    sent_.params.phases = sent_.at_once ? kSendAndReceive : kSend;
    if (!sent_.at_once) {
      context.open_ticket(sent_.call);
      open_ = true;
    }
    sent_.launch(sent_.params, sent_.call);
    context.end_sending(sent_.call);
  }

  Output receive() override {
    Context& context = *sent_.context;
    const std::lock_guard lock(context.calls());
    if (sent_.at_once) {
      if (sent_.call.wait && !sent_.call.capturing) context.raise_late();
      return std::move(sent_.output);
    }
    close();
    const Call call = context.resume(sent_.call);
    if (sent_.mask_silent) {
      SilentParams silent{sent_.params.common, sent_.params.ticket, context.silencing_peers()};
      silent.common.serial = call.serial;
      launch_leave_out_silent(silent, call.stream);
    }
    sent_.params.phases = kReceive;
    sent_.params.common.serial = call.serial;
    sent_.launch(sent_.params, call);
    context.end(call);
    return std::move(sent_.output);
  }

  const Output* promised() const override { return &sent_.output; }

  // A ticket that is dropped: its slots are given back once nobody writes there any more.
  ~Receiver() override {
    if (!open_) return;
    try {
      Context& context = *sent_.context;
      const std::lock_guard lock(context.calls());
      close();
      const Call call = context.resume(sent_.call);
      AbandonParams params{sent_.params.common, sent_.params.ticket};
      params.common.serial = call.serial;
      launch_abandon(params, call.stream);
      context.end_sending(call);
    } catch (const Error&) {
      // Nobody to tell. The slots stay taken: a later call finds no room and says so.
    }
  }

 private:
  void close() {
    sent_.context->close_ticket(sent_.call);
    open_ = false;
  }

  Sent sent_;
  bool open_ = false;
};

template <typename Output, typename Params>
Ticket<Output> send(typename Receiver<Output, Params>::Sent sent) {
  auto receiver = std::make_unique<Receiver<Output, Params>>(std::move(sent));
  receiver->send();
  return Ticket<Output>(std::move(receiver));
}

// What fails before anything is sent is told to the peers, who have begun the same call.
template <typename Prepare>
void refusing(Context& context, const Call& call, const Prepare& prepare) {
  try {
    prepare();
  } catch (const Error& error) {
    context.refuse(call, error.what());
    throw;
  }
}

// Dispatch
// ---------------------------------------------------------------------------------------------------------------------

class Dispatch {
 public:
  using Sent = Receiver<DispatchOutput, LowLatencyDispatchParams>::Sent;

  Dispatch(const std::shared_ptr<Context>& context, const DispatchCall& call)
      : context_(*context), call_(call), num_slots_(call.placement->num_slots(context->rank)) {
    sent_.context = context;
    sent_.call = context->begin(call.operation, call.in.stream, call.timeout, call.num_workers);
    sent_.mask_silent = call.in.mask_silent;
    sent_.at_once = call.in.at_once && !call.in.mask_silent;  // who is silent is decided between the two kernels
    sent_.launch = [](const LowLatencyDispatchParams& params, const Call& now) {
      launch_low_latency_dispatch(params, now.blocks, now.stream);
    };
  }

  Ticket<DispatchOutput> run() {
    refusing(context_, sent_.call, [&] {
      fill_source();
      make_output();
      make_handle();
      check_shared();
    });
    return send<DispatchOutput, LowLatencyDispatchParams>(std::move(sent_));
  }

 private:
  std::int64_t most_arrivals() const { return std::int64_t{context_.num_ranks} * call_.max_tokens_per_rank; }

  // Rows of the output: the most that can come.
  std::int64_t most_rows() const {
    switch (call_.layout) {
      case OutputLayout::kByRank: return most_arrivals();
      case OutputLayout::kByExpert:
        return most_arrivals() * call_.num_topk + std::int64_t{num_slots_} * (call_.expert_alignment - 1);
      case OutputLayout::kPadded: return most_arrivals() * num_slots_;
    }
    return 0;
  }

  void fill_source() {
    LowLatencyDispatchParams& p = sent_.params;
    const DispatchInput& in = call_.in;
    const DevicePlacement& placement = context_.on_device(call_.placement, sent_.call);
    p.common = context_.common(sent_.call, call_.signature);
    p.window = context_.window();
    p.shape = call_.shape;
    p.lines = plan::LineMessage::place(call_.shape);
    p.count_bytes = static_cast<std::uint32_t>(plan::count_bytes(call_.placement->max_slots()));
    p.messages_at = p.count_bytes * static_cast<std::uint32_t>(context_.num_ranks);
    p.pieces = std::max(plan::pieces_of_row(static_cast<std::int64_t>(call_.shape.row_bytes)), 1);
    p.far_message = plan::FarMessage::place(call_.shape);
    p.far_source_bytes = plan::dispatch_source_stride(context_.layout().low_latency_ticket_bytes, context_.num_ranks);
    p.message_bytes = plan::MessageLayout::place(call_.shape).bytes;
    p.layout = call_.layout;
    p.expert_alignment = call_.expert_alignment;
    p.max_tokens_per_rank = call_.max_tokens_per_rank;
    p.num_topk = call_.num_topk;
    p.num_tokens = call_.num_tokens;
    p.num_experts = call_.num_experts;
    p.hidden = call_.hidden;
    p.x = static_cast<const std::byte*>(in.x.data);
    p.x_dtype = in.x.dtype;
    p.quantize = call_.quantize;
    p.scale_kind = call_.scale_kind;
    if (in.scales.given()) {
      p.scales = static_cast<const std::int32_t*>(in.scales.data);
      p.scale_strides[0] = in.scales.strides[0], p.scale_strides[1] = in.scales.strides[1];
    }
    p.topk_idx = in.topk_idx.data;
    p.topk_idx_64 = in.topk_idx.dtype == DType::kI64;
    p.topk_weights = static_cast<const float*>(in.topk_weights.data);
    p.mask_topk_weights = in.mask_topk_weights;
    for (int i = 0; i < call_.shape.num_side; ++i) p.side[i] = static_cast<const std::byte*>(in.side[i].data);
    p.placement = placement.view;
    p.one_copy_each = placement.num_copies == call_.num_experts;
    p.even = placement.even;
    p.first_copy = placement.first_copy;
    p.max_slots = call_.placement->max_slots();
    p.route = route_shape(p.num_topk, p.max_slots);
    p.num_slots = num_slots_;
    p.per.pieces = plan::Divisor(p.pieces);
    p.per.ranks = plan::Divisor(context_.num_ranks);
    p.per.topk = plan::Divisor(p.num_topk);
    p.per.of_step = plan::Divisor(p.route.of_step);
    if (p.even > 0) p.per.even = plan::Divisor(p.even);
    p.per.count_lines = plan::Divisor(plan::count_lines(num_slots_));
    p.most_arrivals = most_arrivals();
    p.most_rows = most_rows();
    p.scales_given = !call_.quantize && call_.shape.num_scales > 0;
  }

  void make_output() {
    LowLatencyDispatchParams& p = sent_.params;
    p.at = plan::OutputBlock::place(call_.shape, call_.layout, most_rows(), most_arrivals());
    const std::shared_ptr<void> owner = context_.output_memory(p.at.total_bytes, sent_.call);
    p.block = static_cast<std::byte*>(owner.get());
    const OutputTensors tensors{call_, p.at, most_rows(), most_arrivals(), num_slots_, context_.num_ranks};
    sent_.output = tensors.make(p.block, owner);
  }

  void make_handle() {
    auto handle = std::make_shared<Handle>(handle_for(call_, context_.num_ranks));
    Handle& h = *handle;
    h.cuda_device = context_.device;
    const std::int64_t ranks = context_.num_ranks, slots = num_slots_, topk = call_.num_topk,
                       arrivals = most_arrivals();
    const bool padded = call_.layout == OutputLayout::kPadded;
    h.num_rows = most_rows();
    h.num_arrivals = arrivals;
    Tensor ticket;
    Pieces pieces;
    pieces.add(ticket, DType::kI64, {1});
    pieces.add(h.dst_rank, DType::kI32, {call_.num_tokens, topk});
    pieces.add(h.first_arrival, DType::kI32, {ranks + 1});
    pieces.add(h.slot_rows, DType::kI32, {slots});
    pieces.add(h.slot_first_row, DType::kI32, {slots + 1});
    pieces.add(h.tokens_between, DType::kI32, {ranks, ranks});
    pieces.add(h.src_token, DType::kI32, {arrivals});
    pieces.add(h.arrival_row, DType::kI32, {arrivals, topk});
    if (call_.shape.topk_weights) pieces.add(h.arrival_weights, DType::kFp32, {arrivals, topk});
    if (padded) pieces.add(h.row_token, DType::kI32, {slots, arrivals});
    if (padded) pieces.add(h.source_range, DType::kI64, {slots, ranks});
    pieces.add(h.own_row, DType::kI32, {call_.num_tokens, topk});
    if (call_.shape.topk_weights) pieces.add(h.own_weights, DType::kFp32, {call_.num_tokens, topk});
    pieces.allocate(context_, sent_.call);
    LowLatencyDispatchParams& p = sent_.params;
    p.ticket = ticket.as<std::uint64_t>();
    p.dst_rank = h.dst_rank.as<std::int32_t>();
    p.tables = {
        h.first_arrival.as<std::int32_t>(),  h.slot_rows.as<std::int32_t>(), h.slot_first_row.as<std::int32_t>(),
        h.tokens_between.as<std::int32_t>(), h.src_token.as<std::int32_t>(), h.arrival_row.as<std::int32_t>(),
        h.arrival_weights.as<float>(),       h.row_token.as<std::int32_t>(), h.source_range.as<std::int64_t>(),
        h.own_row.as<std::int32_t>(),        h.own_weights.as<float>()};
    sent_.handle = handle;
    sent_.output.handle = std::move(handle);
  }

  void check_shared() const {
    constexpr std::size_t kOfKernel = 20 << 10;  // what the kernel declares itself, flags to be raised
    const std::size_t needed = low_latency_shared_bytes(sent_.params) + kOfKernel;
    require(needed <= static_cast<std::size_t>(context_.shared_limit()),
            "low latency on a GPU: {} slots on {} ranks need {} bytes of shared memory, a block has {}", num_slots_,
            context_.num_ranks, needed, context_.shared_limit());
  }

  Context& context_;
  const DispatchCall& call_;
  const int num_slots_;
  Sent sent_;
};

// Combine
// ---------------------------------------------------------------------------------------------------------------------

class Combine {
 public:
  using Sent = Receiver<CombineOutput, LowLatencyCombineParams>::Sent;

  Combine(const std::shared_ptr<Context>& context, const CombineCall& call)
      : context_(*context), call_(call), handle_(*call.in.handle) {
    sent_.context = context;
    sent_.call = context->begin(call.operation, call.in.stream, call.timeout, call.num_workers);
    sent_.mask_silent = call.in.mask_silent;
    sent_.at_once = call.in.at_once && !call.in.mask_silent;
    sent_.handle = call.in.handle;
    sent_.launch = [](const LowLatencyCombineParams& params, const Call& now) {
      launch_low_latency_combine(params, now.blocks, now.stream);
    };
  }

  Ticket<CombineOutput> run() {
    refusing(context_, sent_.call, [&] {
      fill();
      make_output();
    });
    return send<CombineOutput, LowLatencyCombineParams>(std::move(sent_));
  }

 private:
  void fill() {
    LowLatencyCombineParams& p = sent_.params;
    const CombineInput& in = call_.in;
    require(!in.pre_reduce || !in.weights.given() || handle_.arrival_weights.given(),
            "pre_reduce: weights are given, but the dispatch carried none");
    p.common = context_.common(sent_.call, call_.signature);
    p.window = context_.window();
    p.parts = parts_of(context_, call_.row_bytes, handle_.max_tokens_per_rank);
    p.layout = handle_.layout;
    p.order = in.order;
    p.dtype = call_.dtype;
    p.pre_reduce = in.pre_reduce;
    p.max_tokens_per_rank = handle_.max_tokens_per_rank;
    p.num_topk = handle_.num_topk;
    p.row_bytes = static_cast<std::int64_t>(call_.row_bytes);
    p.pieces = plan::pieces_of_row(p.row_bytes);
    const bool one_row = p.pre_reduce || p.layout == OutputLayout::kByRank;  // of a rank, for each token
    p.slots = plan::CombineSlots::place(context_.num_ranks, p.num_topk, one_row);
    p.slot_lines = plan::combine_slot_lines(p.row_bytes, p.num_topk);
    p.wire = in.wire;
    p.encoded = plan::EncodedRow::place(in.wire, call_.hidden);
    p.slot_bytes = static_cast<std::int64_t>(plan::align_up(call_.wire_bytes, plan::MessageLayout::kAlignment));
    const std::size_t rows = static_cast<std::size_t>(p.max_tokens_per_rank) * p.slots.of_token;
    // Where several rows of a rank come home, parts are as fast from the first token on; and far rows come as parts do.
    p.by_lines = in.wire == WireFormat::kAsIs && one_row && rows <= plan::kFewRows && p.common.far.end == nullptr &&
                 plan::call_lines(context_.num_ranks) + rows * p.slot_lines <= context_.layout().line_bytes_of_ticket;
    p.x = static_cast<const std::byte*>(in.x.data);
    p.x_weights = static_cast<const float*>(in.topk_weights.data);
    if (in.pre_reduce && in.weights.given()) p.arrival_weights = handle_.arrival_weights.as<float>();
    p.first_arrival = handle_.first_arrival.as<std::int32_t>();
    p.src_token = handle_.src_token.as<std::int32_t>();
    p.arrival_row = handle_.arrival_row.as<std::int32_t>();
    p.num_tokens = static_cast<int>(handle_.num_tokens);
    // x need not last beyond the kernel that sends, and what is encoded loses what it would lose on the way.
    if (sent_.at_once && in.wire == WireFormat::kAsIs && !in.topk_weights.given()) {
      p.own_row = handle_.own_row.as<std::int32_t>();
      if (p.arrival_weights != nullptr) p.own_weights = handle_.own_weights.as<float>();
    }
    p.dst_rank = handle_.dst_rank.as<std::int32_t>();
    p.node_of_rank = context_.node_of_rank();
    p.weights = static_cast<const float*>(in.weights.data);
    for (int i = 0; i < 2; ++i)
      p.bias[i] = in.bias[i].given() ? static_cast<const std::byte*>(in.bias[i].data) : nullptr;
    p.weights_home = in.weights_home;
  }

  void make_output() {
    LowLatencyCombineParams& p = sent_.params;
    CombineOutput& out = sent_.output;
    const bool given = call_.in.out.given();
    Tensor ticket;
    Pieces pieces;
    pieces.add(ticket, DType::kI64, {1});
    if (call_.hidden > 0 && !given) pieces.add(out.x, call_.dtype, {handle_.num_tokens, call_.hidden});
    if (call_.in.topk_weights.given())
      pieces.add(out.topk_weights, DType::kFp32, {handle_.num_tokens, std::int64_t{handle_.num_topk}});
    sent_.memory = pieces.allocate(context_, sent_.call);
    if (given) out.x = Tensor(call_.in.out, nullptr);
    p.ticket = ticket.as<std::uint64_t>();
    p.out = static_cast<std::byte*>(out.x.data);
    p.weights_out = out.topk_weights.as<float>();
  }

  Context& context_;
  const CombineCall& call_;
  const Handle& handle_;
  Sent sent_;
};

}  // namespace

Ticket<DispatchOutput> low_latency_dispatch(const std::shared_ptr<Context>& context, const DispatchCall& call) {
  return Dispatch(context, call).run();
}

Ticket<CombineOutput> low_latency_combine(const std::shared_ptr<Context>& context, const CombineCall& call) {
  return Combine(context, call).run();
}

}  // namespace deep_ep::cuda
