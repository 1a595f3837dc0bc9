// SPDX-License-Identifier: MIT
#include "cuda/operations.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cuda/failure.h"
#include "cuda/forward_combine.h"
#include "cuda/forward_dispatch.h"

namespace deep_ep::cuda {

namespace {

class Dispatch {
 public:
  Dispatch(Context& context, const DispatchCall& call)
      : context_(context),
        call_(call),
        cached_(call.in.handle != nullptr),
        now_(context.begin(call.operation, call.in.stream, call.timeout, call.num_workers)),
        num_slots_(call.placement->num_slots(context.rank)) {}

  DispatchOutput run() {
    context_.show_slots(num_slots_);
    check_unit();
    require(!now_.capturing || cached_ || call_.in.max_rows > 0,
            "stream: an exact-size dispatch waits for its counts and cannot be captured: give max_rows");
    if (!cached_) {
      make_handle();
      notify();
    }
    if (exact()) {
      send_ahead();
    } else {
      size_output();
      send(num_rows_, num_arrivals_);
    }
    return output();
  }

 private:
  // The number of arrivals of kPadded is known by nobody before the counts either: it waits as an exact call does.
  bool exact() const { return !cached_ && call_.in.max_rows == 0; }

  void await_counts() {
    context_.await_counts(now_);
    const std::int32_t* first = context_.counted_first_row();
    handle_->counted_first_row.assign(first, first + num_slots_ + 1);
  }

  void make_handle() {
    handle_ = std::make_shared<Handle>(handle_for(call_, context_.num_ranks));
    handle_->cuda_device = context_.device;
    const std::int64_t tokens = call_.num_tokens, topk = call_.num_topk, ranks = context_.num_ranks;
    for (Tensor* tensor : {&handle_->dst_rank, &handle_->dst_row, &handle_->dst_arrival})
      *tensor = context_.local_tensor(DType::kI32, {tokens, topk});
    handle_->first_arrival = context_.local_tensor(DType::kI32, {ranks + 1});
    handle_->slot_rows = context_.local_tensor(DType::kI32, {std::int64_t{num_slots_}});
    handle_->slot_first_row = context_.local_tensor(DType::kI32, {std::int64_t{num_slots_} + 1});
    handle_->tokens_between = context_.local_tensor(DType::kI32, {ranks, ranks});
    slot_ = context_.local_tensor(DType::kI32, {tokens, topk});
    relative_row_ = context_.local_tensor(DType::kI32, {tokens, topk});
    relative_arrival_ = context_.local_tensor(DType::kI32, {tokens, topk});
    first_row_ = context_.local_tensor(DType::kI32, {ranks, std::int64_t{num_slots_}});
  }

  Routes routes(const Handle& handle) const {
    return {handle.dst_rank.as<std::int32_t>(),    handle.dst_row.as<std::int32_t>(),
            handle.dst_arrival.as<std::int32_t>(), slot_.as<std::int32_t>(),
            relative_row_.as<std::int32_t>(),      relative_arrival_.as<std::int32_t>()};
  }

  void notify() {
    const DevicePlacement& placement = context_.on_device(call_.placement, now_);
    constexpr int kTokensPerWarp = 16;
    const int blocks = std::clamp(call_.num_tokens / (kNotifyWarps * kTokensPerWarp), 1, now_.blocks);
    const int segments = blocks * kNotifyWarps;
    const std::int64_t keys = context_.num_ranks + placement.num_copies;
    const std::size_t word_of_each_key = static_cast<std::size_t>(keys) * kNotifyWarps * sizeof(std::int32_t);
    const int in_shared = static_cast<int>(std::min<std::size_t>(kMostCounterBytes / word_of_each_key, 2));
    counts_ = context_.local_tensor(DType::kI32, {(in_shared > 0 ? 0 : segments) + blocks + 1, keys});
    NotifyParams p{};
    p.common = context_.common(now_, call_.signature);
    p.routes = routes(*handle_);
    p.topk_idx = call_.in.topk_idx.data;
    p.topk_idx_64 = call_.in.topk_idx.dtype == DType::kI64;
    p.num_tokens = call_.num_tokens;
    p.num_topk = call_.num_topk;
    p.num_experts = call_.num_experts;
    p.placement = placement.view;
    p.first_copy = placement.first_copy;
    p.num_copies = placement.num_copies;
    p.totals = counts_.as<std::int32_t>();
    p.block_counts = p.totals + keys;
    p.segment_counts = p.block_counts + blocks * keys;
    p.segment_tokens = std::max(1, (call_.num_tokens + segments - 1) / segments);
    p.words_in_shared = in_shared;
    p.layout = call_.layout;
    p.expert_alignment = call_.expert_alignment;
    p.max_tokens_per_rank = call_.max_tokens_per_rank;
    p.num_slots = num_slots_;
    p.first_arrival = handle_->first_arrival.as<std::int32_t>();
    p.slot_rows = handle_->slot_rows.as<std::int32_t>();
    p.slot_first_row = handle_->slot_first_row.as<std::int32_t>();
    p.tokens_between = handle_->tokens_between.as<std::int32_t>();
    p.first_row = first_row_.as<std::int32_t>();
    p.counted_first_row = exact() ? context_.device_first_row() : nullptr;
    launch_notify(p, blocks, now_.stream);
  }

  // Exact size: the kernel that sends is launched behind notify, before the counts are known here, into room that was
  // guessed. Where the guess was too small it has done nothing, and is launched again.
  void send_ahead() {
    block_ = context_.arena_reservation(likely_bytes());
    context_.keep_in_doubt(now_, block_.owner);
    send(kAsCounted, kAsCounted);
    await_counts();
    num_rows_ = context_.counted_rows(), num_arrivals_ = context_.counted_arrivals();
    at_ = plan::OutputBlock::place(call_.shape, call_.layout, num_rows_, num_arrivals_);
    if (at_.total_bytes <= block_.bytes) {
      if (block_.owner) context_.arena().settle(block_, at_.total_bytes);
      return;
    }
    context_.not_in_doubt(now_);  // offered to nobody
    block_ = {};
    find_room();
    send(num_rows_, num_arrivals_);
  }

  // Of the output if every rank has as many tokens as we have and sends all of them here.
  std::size_t likely_bytes() const {
    const std::int64_t tokens = std::int64_t{call_.num_tokens} * context_.num_ranks;
    std::int64_t rows = tokens;
    if (call_.layout == OutputLayout::kPadded)
      rows = std::int64_t{num_slots_} * context_.num_ranks * call_.max_tokens_per_rank;
    if (call_.layout == OutputLayout::kByExpert)
      rows = tokens * std::min(call_.num_topk, num_slots_) + std::int64_t{num_slots_} * (call_.expert_alignment - 1);
    return plan::OutputBlock::place(call_.shape, call_.layout, rows, tokens).total_bytes;
  }

  // Makes room for what comes; where there is none the peers are told with the reply, and we raise at the end.
  void size_output() {
    const Handle* handle = call_.in.handle.get();
    num_rows_ = handle != nullptr ? handle->num_rows : call_.in.max_rows;
    num_arrivals_ = handle != nullptr ? handle->num_arrivals : call_.in.max_rows;
    at_ = plan::OutputBlock::place(call_.shape, call_.layout, num_rows_, num_arrivals_);
    find_room();
  }
  void find_room() {
    block_ = context_.arena_block(at_.total_bytes, true, now_);
    context_.keep_in_doubt(now_, block_.owner);
  }

  void send(std::int64_t rows, std::int64_t arrivals) {
    DispatchParams p{};
    const Handle& handle = cached_ ? *call_.in.handle : *handle_;
    p.common = context_.common(now_, call_.signature);
    p.routes = routes(handle);
    p.shape = call_.shape;
    p.layout = call_.layout;
    p.cached = cached_;
    p.num_tokens = call_.num_tokens;
    p.num_topk = call_.num_topk;
    p.num_slots = num_slots_;
    p.hidden = call_.hidden;
    p.x = static_cast<const std::byte*>(call_.in.x.data);
    p.x_dtype = call_.in.x.dtype;
    p.scale_kind = call_.scale_kind;
    if (call_.in.scales.given()) {
      p.scales = static_cast<const std::int32_t*>(call_.in.scales.data);
      p.scale_strides[0] = call_.in.scales.strides[0], p.scale_strides[1] = call_.in.scales.strides[1];
    }
    p.topk_weights = static_cast<const float*>(call_.in.topk_weights.data);
    p.mask_topk_weights = call_.in.mask_topk_weights;
    for (int i = 0; i < call_.shape.num_side; ++i) p.side[i] = static_cast<const std::byte*>(call_.in.side[i].data);
    const bool has_room = block_.owner || rows == kAsCounted;
    p.verdict = has_room ? Reply::kAccepted : Reply::kArenaTooSmall;
    p.needed = at_.total_bytes;
    p.there = context_.arena_room();
    p.block_at = block_.at;
    p.room = block_.bytes;
    p.rows = rows;
    p.arrivals = arrivals;
    p.max_rows = cached_ ? 0 : call_.in.max_rows;
    p.first_arrival = handle.first_arrival.as<std::int32_t>();
    p.first_row = first_row_.as<std::int32_t>();
    p.slot_rows = handle.slot_rows.as<std::int32_t>();
    p.slot_first_row = handle.slot_first_row.as<std::int32_t>();
    p.tokens_between = handle.tokens_between.as<std::int32_t>();
    p.roles = plan::roles_of(now_.blocks, context_.neighbourhood(), call_.quantize);
    launch_dispatch(p, call_.quantize, now_.blocks, now_.stream, context_.shared_limit());
    if (context_.link() != nullptr) forward(p);
    context_.launched(now_);
    if (has_room) return;
    const auto there = static_cast<std::size_t>(p.there);
    Call waiting = now_;
    waiting.wait = !now_.capturing;
    context_.end(waiting);  // raises the same, found by the kernel
    require(false, "arena_bytes: rank {} needs {} bytes of arena for this dispatch, {} are free there", context_.rank,
            at_.total_bytes, there);
  }

  // Rows of far nodes, there and from there, and the end of the operation.
  void forward(const DispatchParams& p) {
    ForwardDispatchParams f{};
    f.dispatch = p;
    f.quantize = call_.quantize;
    f.unit = plan::TokenUnit::place(call_.shape, call_.layout);
    f.chunking = plan::Chunking::of(f.unit.bytes, context_.link()->slot_bytes());
    f.node_of_rank = context_.node_of_rank();
    f.num_nodes = context_.topology.num_nodes;
    constexpr int kTokensPerPacker = 64;  // or more: the last chunk of each is seldom full
    f.packers = std::clamp(call_.num_tokens / kTokensPerPacker, 1, now_.blocks);
    launch_forward_dispatch(f, now_.blocks, now_.stream);
  }

  // The same on all ranks, whose calls are alike.
  void check_unit() const {
    if (context_.link() == nullptr) return;
    const std::size_t unit = plan::TokenUnit::place(call_.shape, call_.layout).bytes;
    const std::size_t slot = context_.link()->slot_bytes() - plan::kChunkHeadBytes;
    if (unit <= slot) return;
    const std::string why =
        fmt::format("forward_slot_bytes: a row, with what travels beside it, is {} bytes, a slot has {}", unit, slot);
    context_.refuse(now_, why);
    throw Error(ErrorCode::kInvalidArgument, why);
  }

  DispatchOutput output() {
    std::byte* base = context_.window() + block_.at;
    std::shared_ptr<void> owner = block_.owner;
    block_.owner.reset();
    if (!cached_) keep_sources(base);
    if (block_.landing) {  // the arena is at its budget: the next exchange needs this room
      owner = context_.local(at_.total_bytes);
      copy_on_stream(owner.get(), base, at_.total_bytes);
      base = static_cast<std::byte*>(owner.get());
      context_.count([&](Statistics& statistics) { statistics.copied_out_bytes += at_.total_bytes; });
    }
    const OutputTensors tensors{call_, at_, num_rows_, num_arrivals_, num_slots_, context_.num_ranks};
    DispatchOutput out = tensors.make(base, owner);
    out.handle = cached_ ? call_.in.handle : std::shared_ptr<const Handle>(handle_);
    context_.end(now_);
    return out;
  }

  // Small, but kept as long as the handle: copied, so that a kept handle does not hold the rows' block.
  void keep_sources(const std::byte* base) {
    handle_->num_rows = num_rows_;
    handle_->num_arrivals = num_arrivals_;
    handle_->src_token = context_.local_tensor(DType::kI32, {num_arrivals_});
    copy_on_stream(handle_->src_token.data, base + at_.src_token_at, handle_->src_token.bytes());
    if (call_.layout == OutputLayout::kByRank) return;
    handle_->arrival_row = context_.local_tensor(DType::kI32, {num_arrivals_, call_.num_topk});
    copy_on_stream(handle_->arrival_row.data, base + at_.arrival_row_at, handle_->arrival_row.bytes());
  }

  void copy_on_stream(void* dst, const void* src, std::size_t bytes) {
    if (bytes > 0) check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, now_.stream), "cudaMemcpyAsync");
  }

  Context& context_;
  const DispatchCall& call_;
  const bool cached_;
  const Call now_;
  const int num_slots_;
  std::shared_ptr<Handle> handle_;
  static constexpr std::int64_t kAsCounted = -1;  // rows that notify counts
  static constexpr std::size_t kMostCounterBytes = std::size_t{96} << 10;
  // Used by this call's kernels only; whoever takes this memory next runs after them.
  Tensor slot_, relative_row_, relative_arrival_, first_row_, counts_;
  plan::OutputBlock at_;
  plan::Arena::Block block_;
  std::int64_t num_rows_ = 0, num_arrivals_ = 0;
};

class Combine {
 public:
  Combine(Context& context, const CombineCall& call)
      : context_(context),
        call_(call),
        handle_(*call.in.handle),
        now_(context.begin(call.operation, call.in.stream, call.timeout, call.num_workers)) {
    if (context.link() != nullptr) forwarded_.emplace(context, call);
  }

  CombineOutput run() {
    CombineParams p{};
    p.common = context_.common(now_, call_.signature);
    if (!stage(p)) return {};
    p.layout = handle_.layout;
    p.order = call_.in.order;
    p.dtype = call_.dtype;
    p.num_tokens = static_cast<int>(handle_.num_tokens);
    p.num_topk = handle_.num_topk;
    p.hidden = call_.hidden;
    p.row_bytes = call_.row_bytes;
    p.num_rows = handle_.num_rows;
    p.dst_rank = handle_.dst_rank.as<std::int32_t>();
    p.row = p.weights_row = handle_.dst_row.as<std::int32_t>();
    p.node_of_rank = context_.node_of_rank();
    p.weights = static_cast<const float*>(call_.in.weights.data);
    for (int i = 0; i < 2; ++i)
      p.bias[i] = call_.in.bias[i].given() ? static_cast<const std::byte*>(call_.in.bias[i].data) : nullptr;
    CombineOutput out = make_output();
    p.out = static_cast<std::byte*>(out.x.data);
    p.weights_out = static_cast<float*>(out.topk_weights.data);
    p.weights_home = call_.in.weights_home;
    Tensor steps;
    if (handle_.num_topk > kMostLocalSteps)
      steps = context_.local_tensor(DType::kU8, {std::max<std::int64_t>(handle_.num_tokens, 1), handle_.num_topk,
                                                 static_cast<std::int64_t>(sizeof(plan::SumStep))});
    const Tensor terms = context_.local_tensor(DType::kU8, {std::max<std::int64_t>(handle_.num_tokens, 1),
                                                            handle_.num_topk, static_cast<std::int64_t>(sizeof(Term))});
    const Tensor num_steps = context_.local_tensor(DType::kI32, {handle_.num_tokens});
    p.steps = static_cast<plan::SumStep*>(steps.data);
    p.terms = static_cast<Term*>(terms.data);
    p.num_terms = num_steps.as<std::int32_t>();
    if (forwarded_) forwarded_->launch(p, now_);
    launch_combine(p, now_.blocks, now_.stream);
    for (auto& block : staged_) context_.keep_in_doubt(now_, std::move(block));
    context_.end(now_);
    return out;
  }

 private:
  // Rows in our arena stay there, others are copied into it once. Where there is no room for them, or no slot between
  // nodes holds one, the peers hear it.
  bool stage(CombineParams& p) {
    try {
      if (forwarded_) forwarded_->require_slots();
      if (call_.in.x.given()) p.x_at = readable(call_.in.x);
      if (call_.in.topk_weights.given()) p.weights_at = readable(call_.in.topk_weights);
    } catch (const Error& error) {
      RefuseParams refusal{};
      refusal.common = p.common;
      std::string(error.what()).copy(refusal.text, sizeof refusal.text - 1);
      launch_refuse(refusal, now_.stream);
      context_.end(now_);
      throw;
    }
    return true;
  }

  std::uint64_t readable(const TensorView& tensor) {
    const std::size_t bytes = tensor.bytes();
    plan::Arena& arena = context_.arena();
    constexpr std::uintptr_t kBulkAlignment = 16;
    const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % kBulkAlignment == 0;
    if (bytes > 0 && aligned && arena.contains(tensor.data, bytes)) return arena.offset_of(tensor.data);
    plan::Arena::Block block = context_.arena_block(bytes, true, now_);
    require(block.owner != nullptr,
            "arena_bytes: rank {} needs {} bytes of arena to stage combine's input, {} are free there", context_.rank,
            bytes, context_.arena_room());
    if (bytes > 0)
      check(cudaMemcpyAsync(context_.window() + block.at, tensor.data, bytes, cudaMemcpyDeviceToDevice, now_.stream),
            "cudaMemcpyAsync");
    context_.count([&](Statistics& statistics) { statistics.staged_bytes += bytes; });
    staged_.push_back(std::move(block.owner));
    return block.at;
  }

  CombineOutput make_output() {
    CombineOutput out;
    const std::int64_t tokens = handle_.num_tokens;
    if (call_.hidden > 0)
      out.x = call_.in.out.given() ? Tensor(call_.in.out, nullptr)
                                   : context_.local_tensor(call_.dtype, {tokens, call_.hidden});
    if (call_.in.topk_weights.given())
      out.topk_weights = context_.local_tensor(DType::kFp32, {tokens, handle_.num_topk});
    return out;
  }

  Context& context_;
  const CombineCall& call_;
  const Handle& handle_;
  const Call now_;
  std::optional<ForwardedCombine> forwarded_;  // where there are ranks that share no memory with us
  std::vector<std::shared_ptr<void>> staged_;
};

}  // namespace

DispatchLayout dispatch_layout(Context& context, const LayoutCall& asked) {
  const Call now = context.begin_local(asked.stream);
  const std::int64_t tokens = asked.topk_idx.size(0), topk = asked.topk_idx.size(1), experts = asked.num_experts;
  const std::int64_t ranks = context.num_ranks, nodes = context.topology.num_nodes;
  // All counters in one piece, which is cleared at once.
  const Tensor bad = context.local_tensor(DType::kI64, {1});
  const Tensor counters = context.local_tensor(DType::kI32, {ranks + nodes + experts});
  const Tensor member = context.local_tensor(DType::kBool, {tokens, ranks});
  check(cudaMemsetAsync(bad.data, 0, bad.bytes(), now.stream), "cudaMemsetAsync");
  check(cudaMemsetAsync(counters.data, 0, counters.bytes(), now.stream), "cudaMemsetAsync");
  LayoutParams p{};
  p.topk_idx = asked.topk_idx.data;
  p.topk_idx_64 = asked.topk_idx.dtype == DType::kI64;
  p.num_tokens = static_cast<int>(tokens), p.num_topk = static_cast<int>(topk), p.num_experts = asked.num_experts;
  p.num_ranks = context.num_ranks, p.num_nodes = context.topology.num_nodes, p.rank = context.rank;
  p.placement = context.on_device(asked.placement, now).view;
  p.counters = counters.as<std::int32_t>();
  p.is_token_in_rank = member.as<std::uint8_t>();
  p.bad_selection = bad.as<unsigned long long>();
  launch_layout(p, now.stream);
  context.end(now);
  if (now.wait) {
    std::int64_t from_end = 0;
    context.copy(&from_end, bad.data, sizeof from_end, cudaMemcpyDeviceToHost);
    const std::int64_t at = tokens * topk - from_end;
    require(from_end == 0, "topk_idx[{}, {}]: this expert does not exist, experts are 0 .. {}", at / topk, at % topk,
            experts - 1);
  }
  const auto part = [&](std::int64_t first, std::int64_t count) {
    return Tensor(TensorView(counters.as<std::int32_t>() + first, DType::kI32, {count}), counters.owner);
  };
  return {part(0, ranks), part(ranks, nodes), part(ranks + nodes, experts), member};
}

DispatchOutput dispatch(Context& context, const DispatchCall& call) { return Dispatch(context, call).run(); }
CombineOutput combine(Context& context, const CombineCall& call) { return Combine(context, call).run(); }

}  // namespace deep_ep::cuda
