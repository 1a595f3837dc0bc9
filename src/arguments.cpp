// SPDX-License-Identifier: MIT
#include "arguments.h"

#include <climits>
#include <numeric>
#include <string_view>

#include "check.h"
#include "plan/lines.h"
#include "plan/message.h"
#include "plan/wire.h"

namespace deep_ep {

namespace {

constexpr std::size_t kRowAlignment = 16;
constexpr int kMaxTopk = 1024;

bool is_number_type(DType dtype) { return dtype == DType::kBf16 || dtype == DType::kFp16 || dtype == DType::kFp32; }
bool is_low_latency(Operation operation) {
  return operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine;
}

void require_matrix(const TensorView& tensor, std::string_view what) {
  require(tensor.ndim == 2, "{} must have 2 dimensions: it is {}", what, describe(tensor));
}

void require_contiguous(const TensorView& tensor, std::string_view what) {
  require(tensor.contiguous(), "{} must be contiguous: {} has strides {}, {}, {}", what, describe(tensor),
          tensor.strides[0], tensor.strides[1], tensor.strides[2]);
}

// "bias must be bf16[8, 64]: it is bf16[8, 32]"
void require_shape(const TensorView& tensor, std::string_view what, DType dtype,
                   std::initializer_list<std::int64_t> shape) {
  const TensorView wanted(static_cast<void*>(nullptr), dtype, shape);
  const bool same = tensor.dtype == dtype && tensor.ndim == wanted.ndim && tensor.shape == wanted.shape;
  require(same, "{} must be {}: it is {}", what, describe(wanted), describe(tensor));
  require_contiguous(tensor, what);
}

void require_row_bytes(std::size_t bytes, std::string_view what) {
  require(bytes > 0 && bytes % kRowAlignment == 0, "{}: a row must be a multiple of {} bytes: {}", what, kRowAlignment,
          bytes);
}

// Rows, and how they travel.
void check_rows(DispatchCall& call) {
  const TensorView& x = call.in.x;
  require(x.given(), "x must be given");
  require_matrix(x, "x");
  require_contiguous(x, "x");
  require(x.size(0) <= INT_MAX, "x: {} rows are more than {}", x.size(0), INT_MAX);
  call.num_tokens = static_cast<int>(x.size(0));
  call.hidden = x.size(1);
  call.wire_dtype = x.dtype;
  require_row_bytes(static_cast<std::size_t>(call.hidden) * item_bytes(x.dtype), "x");
  if (call.in.fp8) {
    require(is_number_type(x.dtype), "fp8: x must be bf16, fp16 or fp32 to be quantised: it is {}", describe(x));
    require(!call.in.scales.given(),
            "fp8 and scales exclude each other: rows are quantised here, or were by the caller");
    require(!call.in.fp8->ue8m0 || call.in.fp8->round_scale,
            "fp8: ue8m0 needs round_scale: exponents hold powers of two only");
    call.quantize = true;
    call.wire_dtype = DType::kFp8E4m3;
    call.scale_kind = call.in.fp8->ue8m0         ? plan::Fp8Scale::kUe8m0
                      : call.in.fp8->round_scale ? plan::Fp8Scale::kPowerOfTwo
                                                 : plan::Fp8Scale::kExact;
    call.scale_dtype = call.in.fp8->ue8m0 ? DType::kI32 : DType::kFp32;
    call.shape.num_scales = static_cast<int>(plan::num_scales(call.hidden, call.scale_kind));
  }
  call.shape.row_bytes = static_cast<std::size_t>(call.hidden) * item_bytes(call.wire_dtype);
  require_row_bytes(call.shape.row_bytes, "x on the wire");
  call.shape.scales_column_major = call.in.scale_order == ScaleOrder::kColumnMajor;
}

// What travels beside the rows.
void check_companions(DispatchCall& call) {
  const DispatchInput& in = call.in;
  if (in.scales.given()) {
    require_matrix(in.scales, "scales");
    require(in.scales.dtype == DType::kFp32 || in.scales.dtype == DType::kI32,
            "scales must be fp32 or i32: they are {}", describe(in.scales));
    require_eq(in.scales.size(0), in.x.size(0), "scales rows == x rows");
    call.scale_dtype = in.scales.dtype;
    call.shape.num_scales = static_cast<int>(in.scales.size(1));
  }
  if (in.topk_weights.given()) {
    require_shape(in.topk_weights, "topk_weights", DType::kFp32, {call.num_tokens, call.num_topk});
    call.shape.topk_weights = true;
  }
  require(in.side.size() <= plan::kMaxSide, "side: {} tensors are more than {}", in.side.size(), plan::kMaxSide);
  call.shape.num_side = static_cast<int>(in.side.size());
  for (int i = 0; i < call.shape.num_side; ++i) {
    const TensorView& side = in.side[i];
    const std::string what = fmt::format("side[{}]", i);
    require_matrix(side, what);
    require_contiguous(side, what);
    require_eq(side.size(0), in.x.size(0), what + " rows == x rows");
    call.shape.side_bytes[i] = static_cast<std::size_t>(side.size(1)) * item_bytes(side.dtype);
    require(call.shape.side_bytes[i] % 4 == 0, "{}: a row must be a multiple of 4 bytes: {}", what,
            call.shape.side_bytes[i]);
  }
}

void require_same_memory(const Handle& handle, const CallScope& scope) {
  const auto where = [](bool on_device) { return on_device ? "on a GPU" : "in ordinary memory"; };
  require((handle.cuda_device >= 0) == scope.on_device, "handle: its tensors are {}, the buffer's are {}",
          where(handle.cuda_device >= 0), where(scope.on_device));
}

// Routes from ids, or from an earlier dispatch.
void check_routes(DispatchCall& call, const CallScope& scope, const std::shared_ptr<const Placement>& even) {
  const DispatchInput& in = call.in;
  if (in.handle) {
    const Handle& handle = *in.handle;
    require(!is_low_latency(call.operation), "handle: low-latency dispatch takes no handle");
    require(!handle.low_latency, "handle: it comes from a low-latency dispatch, whose rows only their receiver knows");
    require(!in.topk_idx.given(), "topk_idx must be left out with a handle: it is {}", describe(in.topk_idx));
    require(in.num_experts == 0 && !in.placement,
            "num_experts and placement must be left out with a handle: it brings them");
    require(in.layout == DispatchInput().layout && in.expert_alignment == 1 && in.max_tokens_per_rank == 0,
            "layout, expert_alignment and max_tokens_per_rank must be left out with a handle: it brings them");
    require(in.max_rows == 0 || in.max_rows == handle.num_rows,
            "max_rows must be left out with a handle, or its rows: {} vs {}", in.max_rows, handle.num_rows);
    require_eq(handle.num_ranks, scope.num_ranks, "handle's ranks == the buffer's ranks");
    require_same_memory(handle, scope);
    require_eq(in.x.size(0), handle.num_tokens, "x rows == tokens of the handle");
    call.placement = handle.placement;
    call.layout = handle.layout;
    call.expert_alignment = handle.expert_alignment;
    call.max_tokens_per_rank = handle.max_tokens_per_rank;
    call.num_experts = handle.num_experts;
    call.num_topk = handle.num_topk;
    return;
  }
  check_topk_idx(in.topk_idx, in.num_experts, scope.on_device);
  require_eq(in.topk_idx.size(0), in.x.size(0), "topk_idx rows == x rows");
  call.placement = in.placement ? in.placement : even;
  check_placement(*call.placement, in.num_experts, scope);
  call.layout = in.layout;
  call.expert_alignment = in.expert_alignment;
  call.max_tokens_per_rank = in.max_tokens_per_rank;
  call.num_experts = in.num_experts;
  call.num_topk = static_cast<int>(in.topk_idx.size(1));
  call.shape.topk_idx_bytes = static_cast<int>(item_bytes(in.topk_idx.dtype));
}

// What stands in the way of a low-latency call on a GPU; empty if nothing does.
std::string device_complaint(std::int64_t tokens, int num_topk, const CallScope& scope) {
  constexpr int kMostTopk = 32;  // a selection for each lane of a warp
  const std::size_t flags = static_cast<std::size_t>(std::max<std::int64_t>(tokens, 1)) * scope.num_ranks;
  if (!scope.on_device) return "";
  if (num_topk > kMostTopk) return fmt::format("low latency on a GPU: top-k must be 1 .. {}: {}", kMostTopk, num_topk);
  if (flags > scope.layout.flags_of_ticket)
    return fmt::format("low latency on a GPU: {} tokens need {} flags, the buffer has {}: raise Config::low_latency",
                       tokens, flags, scope.layout.flags_of_ticket);
  return "";
}

void check_capacity(const DispatchCall& call, const CallScope& scope) {
  const DispatchInput& in = call.in;
  require(call.expert_alignment >= 1, "expert_alignment must be at least 1: {}", call.expert_alignment);
  require(in.max_rows >= 0 && in.max_rows <= INT_MAX, "max_rows must be 0 .. {}: {}", INT_MAX, in.max_rows);
  const bool low_latency = is_low_latency(call.operation), padded = call.layout == OutputLayout::kPadded;
  require(in.max_rows == 0 || (!low_latency && !padded), "max_rows: {} has a bound of its own",
          low_latency ? "low latency" : "kPadded");
  if (low_latency)
    require(scope.config.low_latency.max_tokens_per_rank > 0,
            "the buffer was opened without low-latency slots: Config::low_latency.max_tokens_per_rank is 0");
  if (low_latency || padded) {
    require(call.max_tokens_per_rank >= 1, "max_tokens_per_rank must be at least 1 here: {}", call.max_tokens_per_rank);
    require(call.num_tokens <= call.max_tokens_per_rank, "x: {} tokens are more than max_tokens_per_rank: {}",
            call.num_tokens, call.max_tokens_per_rank);
    const std::int64_t rows = std::int64_t{call.placement->max_slots()} * scope.num_ranks * call.max_tokens_per_rank;
    require(!padded || rows <= INT_MAX, "kPadded: {} slots x {} ranks x {} tokens are more than {} rows",
            call.placement->max_slots(), scope.num_ranks, call.max_tokens_per_rank, INT_MAX);
  }
  if (low_latency) {
    const std::string complaint = device_complaint(call.max_tokens_per_rank, call.num_topk, scope);
    require(complaint.empty(), "{}", complaint);
    const std::size_t needed =
        scope.on_device ? plan::dispatch_lines(scope.num_ranks, call.max_tokens_per_rank, call.placement->max_slots(),
                                               plan::LineMessage::place(call.shape))
                        : plan::dispatch_slot_bytes(scope.num_ranks, call.max_tokens_per_rank,
                                                    plan::FarMessage::place(call.shape).bytes);
    const std::size_t there =
        scope.on_device ? scope.layout.line_bytes_of_ticket : scope.layout.low_latency_ticket_bytes;
    require(needed <= there,
            "low latency: {} tokens of {} bytes and top-{} need {} bytes of slots, the buffer has {}: raise "
            "Config::low_latency",
            call.max_tokens_per_rank, call.shape.row_bytes, call.num_topk, needed, there);
  }
}

Signature signature_of(const DispatchCall& call) {
  std::size_t side = 0;
  for (int i = 0; i < call.shape.num_side; ++i) side = side * 65599 + call.shape.side_bytes[i];
  Signature signature;
  auto& f = signature.fields;
  f[Signature::kOperation] = static_cast<std::int64_t>(call.operation);
  f[Signature::kLayout] = static_cast<std::int64_t>(call.layout);
  f[Signature::kRowDType] = static_cast<std::int64_t>(call.wire_dtype);
  f[Signature::kRowBytes] = static_cast<std::int64_t>(call.shape.row_bytes);
  f[Signature::kTopk] = call.num_topk;
  f[Signature::kExperts] = call.num_experts;
  f[Signature::kPlacement] = static_cast<std::int64_t>(call.placement->fingerprint());
  f[Signature::kAlignment] = call.expert_alignment;
  f[Signature::kMaxTokens] = call.max_tokens_per_rank;
  f[Signature::kTopkIdxBytes] = call.shape.topk_idx_bytes;
  f[Signature::kTopkWeights] = call.shape.topk_weights;
  f[Signature::kScales] = call.shape.num_scales;
  f[Signature::kScaleDType] = call.shape.num_scales > 0 ? static_cast<std::int64_t>(call.scale_dtype) : 0;
  f[Signature::kScaleOrder] = call.shape.scales_column_major;
  f[Signature::kSideBytes] = static_cast<std::int64_t>(side);
  f[Signature::kCached] = call.in.handle != nullptr;
  return signature;
}

template <typename Call, typename Input>
void check_options(Call& call, const Input& in, const CallScope& scope) {
  require(in.num_workers >= 0, "num_workers must not be negative: {}", in.num_workers);
  require(in.timeout.count() >= 0, "timeout must not be negative: {} ms", in.timeout.count());
  call.num_workers = in.num_workers;
  call.timeout = in.timeout.count() > 0 ? in.timeout : scope.config.timeout;
}

// Rows that come back have the arrangement that the dispatch gave.
void check_returning_rows(CombineCall& call, const CallScope& scope) {
  const CombineInput& in = call.in;
  const Handle& handle = *in.handle;
  const std::int64_t slots = handle.placement->num_slots(scope.rank);
  const std::int64_t slot_rows = std::int64_t{scope.num_ranks} * handle.max_tokens_per_rank;
  const bool padded = handle.layout == OutputLayout::kPadded;
  if (in.x.given()) {
    require(is_number_type(in.x.dtype), "x must be bf16, fp16 or fp32: it is {}", describe(in.x));
    call.dtype = in.x.dtype;
    call.hidden = in.x.size(in.x.ndim - 1);
    if (padded) {
      require_shape(in.x, "x", in.x.dtype, {slots, slot_rows, call.hidden});
    } else {
      require_shape(in.x, "x", in.x.dtype, {handle.num_rows, call.hidden});
    }
    call.row_bytes = static_cast<std::size_t>(call.hidden) * item_bytes(call.dtype);
    require_row_bytes(call.row_bytes, "x");
  }
  if (in.topk_weights.given()) {
    if (handle.layout == OutputLayout::kByRank) {
      require_shape(in.topk_weights, "topk_weights", DType::kFp32, {handle.num_arrivals, handle.num_topk});
    } else if (padded) {
      require_shape(in.topk_weights, "topk_weights", DType::kFp32, {slots, slot_rows});
    } else {
      require_shape(in.topk_weights, "topk_weights", DType::kFp32, {handle.num_rows});
    }
  }
}

// What is added and written at the tokens' home.
void check_home(const CombineCall& call) {
  const CombineInput& in = call.in;
  const Handle& handle = *in.handle;
  if (in.weights.given()) {
    require(handle.layout != OutputLayout::kByRank,
            "weights: rows of kByRank are sums over experts already; weigh them there");
    require_shape(in.weights, "weights", DType::kFp32, {handle.num_tokens, handle.num_topk});
  }
  const bool home = in.weights.given() || in.bias[0].given() || in.bias[1].given() || in.out.given();
  require(!home || in.x.given(), "weights, bias and out need x");
  for (int i = 0; i < 2; ++i)
    if (in.bias[i].given())
      require_shape(in.bias[i], fmt::format("bias[{}]", i), call.dtype, {handle.num_tokens, call.hidden});
  if (in.out.given()) require_shape(in.out, "out", call.dtype, {handle.num_tokens, call.hidden});
}

// How rows cross: joined before, in a wire format, and into which slots.
void check_way_home(CombineCall& call, const CallScope& scope) {
  const CombineInput& in = call.in;
  const bool low_latency = is_low_latency(call.operation);
  require(!in.pre_reduce || (low_latency && in.order.round_per_rank),
          "pre_reduce: low latency only, and needs order.round_per_rank");
  if (in.wire != WireFormat::kAsIs) {
    require(low_latency, "wire: {} is for low latency, here rows cross as they are", name(in.wire));
    require(!in.pre_reduce, "wire and pre_reduce exclude each other: {} is wanted", name(in.wire));
    require(!in.x.given() || call.dtype == DType::kBf16 || call.dtype == DType::kFp16,
            "wire: {} is for rows of bf16 and fp16: x is {}", name(in.wire), describe(in.x));
  }
  call.wire_bytes = plan::wire_row_bytes(in.wire, call.hidden, call.row_bytes);
  if (!low_latency) return;
  const Handle& handle = *in.handle;
  const std::size_t needed = plan::combine_slot_bytes(handle.max_tokens_per_rank, handle.num_topk, call.wire_bytes);
  require(needed <= scope.layout.low_latency_ticket_bytes,
          "low latency: {} tokens x top-{} of {} bytes need {} bytes of slots, the buffer has {}: raise "
          "Config::low_latency",
          handle.max_tokens_per_rank, handle.num_topk, call.wire_bytes, needed, scope.layout.low_latency_ticket_bytes);
}

Signature signature_of(const CombineCall& call) {
  const CombineInput& in = call.in;
  const Handle& handle = *in.handle;
  Signature signature;
  auto& f = signature.fields;
  f[Signature::kOperation] = static_cast<std::int64_t>(call.operation);
  f[Signature::kLayout] = static_cast<std::int64_t>(handle.layout);
  f[Signature::kRowDType] = static_cast<std::int64_t>(call.dtype);
  f[Signature::kRowBytes] = static_cast<std::int64_t>(call.row_bytes);
  f[Signature::kTopk] = handle.num_topk;
  f[Signature::kExperts] = handle.num_experts;
  f[Signature::kPlacement] = static_cast<std::int64_t>(handle.placement->fingerprint());
  f[Signature::kAlignment] = handle.expert_alignment;
  f[Signature::kMaxTokens] = handle.max_tokens_per_rank;
  f[Signature::kTopkWeights] = in.topk_weights.given();
  f[Signature::kWireFormat] = static_cast<std::int64_t>(in.wire);
  f[Signature::kPreReduced] = !in.pre_reduce ? 0 : in.weights.given() ? 2 : 1;
  return signature;
}

}  // namespace

void check_topk_idx(const TensorView& topk_idx, int num_experts, bool on_device) {
  require(topk_idx.given(), "topk_idx must be given");
  require_matrix(topk_idx, "topk_idx");
  require(topk_idx.dtype == DType::kI32 || topk_idx.dtype == DType::kI64, "topk_idx must be i32 or i64: it is {}",
          describe(topk_idx));
  require_contiguous(topk_idx, "topk_idx");
  require(topk_idx.size(0) <= INT_MAX, "topk_idx: {} rows are more than {}", topk_idx.size(0), INT_MAX);
  require(topk_idx.size(1) >= 1 && topk_idx.size(1) <= kMaxTopk, "topk_idx: top-k must be 1 .. {}: {}", kMaxTopk,
          topk_idx.size(1));
  require(num_experts >= 1, "num_experts must be at least 1: {}", num_experts);
  if (on_device) return;
  const std::int64_t topk = topk_idx.size(1), selections = topk_idx.numel();
  for (std::int64_t i = 0; i < selections; ++i) {
    const std::int64_t expert =
        topk_idx.dtype == DType::kI64 ? topk_idx.as<const std::int64_t>()[i] : topk_idx.as<const std::int32_t>()[i];
    require(expert < num_experts, "topk_idx[{}, {}]: expert {}, experts are 0 .. {}", i / topk, i % topk, expert,
            num_experts - 1);
  }
}

void check_placement(const Placement& placement, int num_experts, const CallScope& scope) {
  require_eq(placement.num_experts(), num_experts, "placement's experts == num_experts");
  require_eq(placement.num_ranks(), scope.num_ranks, "placement's ranks == the buffer's ranks");
  require(placement.all_replicas().size() <= static_cast<std::size_t>(scope.config.max_experts),
          "num_experts: {} experts, replicas counted, are more than Config::max_experts: {}",
          placement.all_replicas().size(), scope.config.max_experts);
}

DispatchCall check_dispatch(Operation operation, const DispatchInput& in, const CallScope& scope,
                            const std::shared_ptr<const Placement>& even) {
  DispatchCall call;
  call.operation = operation;
  call.in = in;
  check_options(call, in, scope);
  check_rows(call);
  check_routes(call, scope, even);
  check_companions(call);
  if (call.layout == OutputLayout::kPadded)
    call.shape.padded_slot_rows = std::int64_t{scope.num_ranks} * call.max_tokens_per_rank;
  call.shape.num_topk = call.num_topk;
  check_capacity(call, scope);
  call.signature = signature_of(call);
  return call;
}

CombineCall check_combine(Operation operation, const CombineInput& in, const CallScope& scope) {
  require(in.handle != nullptr, "handle must be given");
  const Handle& handle = *in.handle;
  require_eq(handle.num_ranks, scope.num_ranks, "handle's ranks == the buffer's ranks");
  require_same_memory(handle, scope);
  require(handle.low_latency == is_low_latency(operation), "handle: {} takes a handle of {}", name(operation),
          is_low_latency(operation) ? "low_latency_dispatch" : "dispatch");
  require(!handle.low_latency || scope.on_device || handle.home_slot.given(),
          "handle: it lacks home_slot, as one does that was saved: low latency takes it from its own dispatch");
  require(in.x.given() || in.topk_weights.given(), "x or topk_weights must be given");
  CombineCall call;
  call.operation = operation;
  call.in = in;
  check_options(call, in, scope);
  check_returning_rows(call, scope);
  check_home(call);
  check_way_home(call, scope);
  call.signature = signature_of(call);
  return call;
}

Support check_support(const CallShape& shape, const CallScope& scope) {
  const auto no = [](std::string reason) { return Support{false, std::move(reason)}; };
  const std::size_t row_bytes =
      static_cast<std::size_t>(std::max<std::int64_t>(shape.hidden, 0)) * item_bytes(shape.dtype);
  if (row_bytes == 0 || row_bytes % kRowAlignment != 0)
    return no(fmt::format("a row of {} x {} is {} bytes: it must be a multiple of {}", shape.hidden, name(shape.dtype),
                          row_bytes, kRowAlignment));
  if (shape.fp8 && (!is_number_type(shape.dtype) || shape.hidden % static_cast<std::int64_t>(kRowAlignment) != 0))
    return no(fmt::format("FP8 rows are quantised from bf16, fp16 or fp32 and need a multiple of {} channels: {} of {}",
                          kRowAlignment, shape.hidden, name(shape.dtype)));
  if (shape.num_topk < 1 || shape.num_topk > kMaxTopk)
    return no(fmt::format("top-k must be 1 .. {}: {}", kMaxTopk, shape.num_topk));
  if (shape.num_experts < 1 || shape.num_experts > scope.config.max_experts)
    return no(fmt::format("num_experts must be 1 .. Config::max_experts = {}: {}", scope.config.max_experts,
                          shape.num_experts));
  if (shape.num_tokens < 0 || shape.num_tokens > INT_MAX)
    return no(fmt::format("num_tokens must be 0 .. {}: {}", INT_MAX, shape.num_tokens));
  if (!shape.low_latency) return {};
  if (std::string complaint = device_complaint(shape.num_tokens, shape.num_topk, scope); !complaint.empty())
    return no(std::move(complaint));
  plan::RowShape row;
  row.row_bytes = row_bytes;
  row.num_topk = shape.num_topk;
  row.topk_weights = true;
  const int tokens = static_cast<int>(std::max<std::int64_t>(shape.num_tokens, 1));
  const std::size_t lines =
      plan::dispatch_lines(scope.num_ranks, tokens, scope.layout.max_slots, plan::LineMessage::place(row));
  if (scope.on_device && lines > scope.layout.line_bytes_of_ticket)
    return no(fmt::format("{} low-latency tokens need {} bytes of lines, the buffer has {}: raise Config::low_latency",
                          tokens, lines, scope.layout.line_bytes_of_ticket));
  const std::size_t needed =
      std::max(plan::dispatch_slot_bytes(scope.num_ranks, tokens, plan::FarMessage::place(row).bytes),
               plan::combine_slot_bytes(tokens, shape.num_topk, row_bytes));
  if (needed > scope.layout.low_latency_ticket_bytes)
    return no(fmt::format("{} low-latency tokens need {} bytes of slots, the buffer has {}: raise Config::low_latency",
                          tokens, needed, scope.layout.low_latency_ticket_bytes));
  return {};
}

}  // namespace deep_ep
