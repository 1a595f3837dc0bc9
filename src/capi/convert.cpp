// SPDX-License-Identifier: MIT
// Arguments from C to C++ and back. What a call means is checked by the Buffer; here only what C++ types could not
// express.
#include "capi/objects.h"

namespace deep_ep::capi {

namespace {

static_assert(static_cast<int>(DType::kU8) == DEEP_EP_U8 && static_cast<int>(DType::kFp8E4m3) == DEEP_EP_FP8);
static_assert(static_cast<int>(DType::kBf16) == DEEP_EP_BF16 && static_cast<int>(DType::kFp16) == DEEP_EP_FP16);
static_assert(static_cast<int>(DType::kFp32) == DEEP_EP_FP32 && static_cast<int>(DType::kI32) == DEEP_EP_I32);
static_assert(static_cast<int>(DType::kI64) == DEEP_EP_I64 && static_cast<int>(DType::kBool) == DEEP_EP_BOOL);
static_assert(static_cast<int>(OutputLayout::kByRank) == DEEP_EP_BY_RANK);
static_assert(static_cast<int>(OutputLayout::kByExpert) == DEEP_EP_BY_EXPERT);
static_assert(static_cast<int>(OutputLayout::kPadded) == DEEP_EP_PADDED);
static_assert(static_cast<int>(ScaleOrder::kRowMajor) == DEEP_EP_ROW_MAJOR);
static_assert(static_cast<int>(ScaleOrder::kColumnMajor) == DEEP_EP_COLUMN_MAJOR);
static_assert(static_cast<int>(SumOrder::Key::kRank) == DEEP_EP_SUM_BY_RANK);
static_assert(static_cast<int>(SumOrder::Key::kTopK) == DEEP_EP_SUM_BY_TOPK);
static_assert(static_cast<int>(WeightsHome::kSumOverRanks) == DEEP_EP_SUM_OVER_RANKS);
static_assert(static_cast<int>(WeightsHome::kFromOwner) == DEEP_EP_FROM_OWNER);
static_assert(static_cast<int>(WireFormat::kAsIs) == DEEP_EP_WIRE_AS_IS);
static_assert(static_cast<int>(WireFormat::kLogFmt10) == DEEP_EP_WIRE_LOGFMT10);
static_assert(static_cast<int>(WireFormat::kFp8) == DEEP_EP_WIRE_FP8);

void make_contiguous(TensorView& view) {
  std::int64_t stride = 1;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    view.strides[dim] = stride;
    require(view.shape[dim] == 0 || !__builtin_mul_overflow(stride, view.shape[dim], &stride),
            "tensor: dimension {} has {} entries, too many to address", dim, view.shape[dim]);
  }
}

std::optional<Fp8Options> fp8_of(deep_ep_fp8_mode mode) {
  switch (checked_enum(mode, DEEP_EP_FP8_UE8M0_SCALES, "fp8")) {
    case DEEP_EP_NO_FP8: break;
    case DEEP_EP_FP8_SCALES: return Fp8Options{.round_scale = false, .ue8m0 = false};
    case DEEP_EP_FP8_ROUNDED_SCALES: return Fp8Options{.round_scale = true, .ue8m0 = false};
    case DEEP_EP_FP8_UE8M0_SCALES: return Fp8Options{.round_scale = true, .ue8m0 = true};
  }
  return std::nullopt;
}

template <typename T>
T or_default(T value, T fallback) {
  return value != T{0} ? value : fallback;
}

}  // namespace

DType dtype_of(deep_ep_dtype dtype, const char* name) {
  return static_cast<DType>(checked_enum(dtype, DEEP_EP_BOOL, name));
}

std::chrono::milliseconds timeout_of(std::int64_t timeout_ms) {
  // Beyond a century the deadline would overflow the clock.
  constexpr std::int64_t kLongest = std::int64_t{100} * 365 * 24 * 3600 * 1000;
  require(timeout_ms >= 0 && timeout_ms <= kLongest, "timeout_ms: {}, possible are 0 .. {}", timeout_ms, kLongest);
  return std::chrono::milliseconds(timeout_ms);
}

TensorView view_of(const deep_ep_tensor* tensor, const char* name) {
  const deep_ep_tensor t = read(tensor, name, sizeof(deep_ep_tensor));
  TensorView view;
  if (t.ndim == 0) return view;
  require(t.ndim >= 0 && t.ndim <= TensorView::kMaxDims, "{}.ndim: {}, possible are 0 .. {}", name, t.ndim,
          TensorView::kMaxDims);
  view.data = t.data;
  view.dtype = dtype_of(t.dtype, name);
  view.ndim = t.ndim;
  bool strides_given = false;
  for (int dim = 0; dim < t.ndim; ++dim) {
    require(t.shape[dim] >= 0, "{}.shape[{}]: {}, at least 0", name, dim, t.shape[dim]);
    view.shape[dim] = t.shape[dim];
    view.strides[dim] = t.strides[dim];
    strides_given = strides_given || t.strides[dim] != 0;
  }
  if (!strides_given) make_contiguous(view);
  require(view.data != nullptr || view.numel() == 0, "{}.data: NULL for {}", name, describe(view));
  return view;
}

void write_tensor(deep_ep_tensor* theirs, const TensorView& view) {
  deep_ep_tensor ours{};
  ours.size = sizeof(ours);
  ours.data = view.data;
  ours.dtype = static_cast<deep_ep_dtype>(view.dtype);
  ours.ndim = view.ndim;
  for (int dim = 0; dim < view.ndim; ++dim) {
    ours.shape[dim] = view.shape[dim];
    ours.strides[dim] = view.strides[dim];
  }
  write(theirs, ours, "tensor", sizeof(deep_ep_tensor));
}

Config config_of(const deep_ep_config* config) {
  const deep_ep_config c = read(config, "config", EP_END_OF(deep_ep_config, ranks_per_node));
  const Config defaults;
  Config made;
  made.max_experts = or_default(c.max_experts, defaults.max_experts);
  require(c.num_ranks_per_node >= 0, "config.num_ranks_per_node: {}, at least 0", c.num_ranks_per_node);
  if (c.num_ranks_per_node > 0) {
    const int* nodes = &given(c.ranks_per_node, "config.ranks_per_node");
    made.ranks_per_node.assign(nodes, nodes + c.num_ranks_per_node);
  }
  made.low_latency.max_tokens_per_rank = c.low_latency_max_tokens_per_rank;
  made.low_latency.row_bytes = c.low_latency_row_bytes;
  made.low_latency.num_topk = or_default(c.low_latency_num_topk, defaults.low_latency.num_topk);
  made.low_latency.side_bytes = or_default(c.low_latency_side_bytes, defaults.low_latency.side_bytes);
  made.arena_bytes = c.arena_bytes;
  made.num_tickets = or_default(c.num_tickets, defaults.num_tickets);
  made.timeout = or_default(timeout_of(c.timeout_ms), defaults.timeout);
  made.open_timeout = or_default(timeout_of(c.open_timeout_ms), defaults.open_timeout);
  return made;
}

void choose_backend(deep_ep_backend backend, const int* cuda_device, Options& options) {
  const bool cuda = checked_enum(backend, DEEP_EP_CUDA, "backend") == DEEP_EP_CUDA;
  options.backend = cuda ? BackendKind::kCuda : BackendKind::kHost;
  require(cuda || cuda_device == nullptr, "cuda_device: {} for a backend without GPUs", cuda_device ? *cuda_device : 0);
  if (cuda_device == nullptr) return;
  require(*cuda_device >= 0, "cuda_device: {}, at least 0", *cuda_device);
  options.cuda_device = *cuda_device;
}

std::shared_ptr<const Placement> placement_of(const deep_ep_placement* placement) {
  return placement != nullptr ? placement->placement : nullptr;
}

DispatchInput input_of(const deep_ep_dispatch_input* input) {
  const deep_ep_dispatch_input in = read(&given(input, "input"), "input", EP_END_OF(deep_ep_dispatch_input, layout));
  DispatchInput made;
  made.x = view_of(in.x, "x");
  made.scales = view_of(in.scales, "scales");
  made.topk_idx = view_of(in.topk_idx, "topk_idx");
  made.topk_weights = view_of(in.topk_weights, "topk_weights");
  require(in.num_side >= 0, "num_side: {}, at least 0", in.num_side);
  for (int i = 0; i < in.num_side; ++i) made.side.push_back(view_of((&given(in.side, "side"))[i], "side"));
  made.num_experts = in.num_experts;
  made.placement = placement_of(in.placement);
  made.layout = static_cast<OutputLayout>(checked_enum(in.layout, DEEP_EP_PADDED, "layout"));
  made.expert_alignment = or_default(in.expert_alignment, 1);
  made.max_tokens_per_rank = in.max_tokens_per_rank;
  made.fp8 = fp8_of(in.fp8);
  made.scale_order = static_cast<ScaleOrder>(checked_enum(in.scale_order, DEEP_EP_COLUMN_MAJOR, "scale_order"));
  made.mask_topk_weights = in.keep_other_weights == 0;
  made.max_rows = in.max_rows;
  made.at_once = in.at_once != 0;
  made.mask_silent = in.mask_silent != 0;
  if (in.handle != nullptr) made.handle = in.handle->handle;
  made.stream = in.stream;
  made.timeout = timeout_of(in.timeout_ms);
  made.num_workers = workers_of(in.num_workers);
  return made;
}

CombineInput input_of(const deep_ep_combine_input* input) {
  const deep_ep_combine_input in = read(&given(input, "input"), "input", offsetof(deep_ep_combine_input, weights));
  CombineInput made;
  made.x = view_of(in.x, "x");
  made.handle = given(in.handle, "handle").handle;
  made.topk_weights = view_of(in.topk_weights, "topk_weights");
  made.weights_home = static_cast<WeightsHome>(checked_enum(in.weights_home, DEEP_EP_FROM_OWNER, "weights_home"));
  made.weights = view_of(in.weights, "weights");
  made.bias = {view_of(in.bias[0], "bias[0]"), view_of(in.bias[1], "bias[1]")};
  made.order.key = static_cast<SumOrder::Key>(checked_enum(in.sum_key, DEEP_EP_SUM_BY_TOPK, "sum_key"));
  made.order.round_per_rank = in.round_per_rank != 0;
  made.order.round_per_node = in.round_per_node != 0;
  made.order.bias_first = in.bias_last == 0;
  made.out = view_of(in.out, "out");
  made.wire = static_cast<WireFormat>(checked_enum(in.wire, DEEP_EP_WIRE_FP8, "wire"));
  made.pre_reduce = in.pre_reduce != 0;
  made.at_once = in.at_once != 0;
  made.mask_silent = in.mask_silent != 0;
  made.stream = in.stream;
  made.timeout = timeout_of(in.timeout_ms);
  made.num_workers = workers_of(in.num_workers);
  return made;
}

}  // namespace deep_ep::capi
