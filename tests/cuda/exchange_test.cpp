// SPDX-License-Identifier: MIT
// Whole exchanges on one GPU, every byte compared with the host backend's on the same inputs.
#include "cases.h"

namespace deep_ep::test {
namespace {

Result run_case(const Case& c, Buffer& buffer, const Inputs& in, bool device) {
  Result result;
  const auto there = [&](const Tensor& tensor) { return device ? to_gpu(tensor) : tensor; };
  const Tensor x = there(in.x), idx = there(in.idx), weights = there(in.weights), scales = there(in.scales),
               side = there(in.side), home = there(in.home_weights), bias = there(in.bias);
  DispatchInput input;
  input.x = x;
  input.topk_idx = idx;
  input.topk_weights = weights;
  input.scales = scales;
  if (c.side > 0) input.side = {side};
  input.num_experts = c.experts;
  if (c.replicas) input.placement = placement_of(c);
  input.layout = c.layout;
  input.expert_alignment = c.alignment;
  input.max_tokens_per_rank = c.layout == OutputLayout::kPadded ? std::max(c.tokens, 1) : 0;
  if (c.fp8) input.fp8 = Fp8Options{c.round_scale, c.ue8m0};
  if (c.column_major) input.scale_order = ScaleOrder::kColumnMajor;
  input.mask_topk_weights = c.mask_weights;
  input.max_rows = c.max_rows;
  DispatchOutput out = buffer.dispatch(input);
  const Handle& h = *out.handle;
  const auto first_arrival = bytes_of(h.first_arrival), first_row = bytes_of(h.slot_first_row);
  const std::int64_t arrivals = reinterpret_cast<const std::int32_t*>(first_arrival.data())[c.ranks];
  const auto slots = h.slot_first_row.shape[0] - 1;
  const std::int64_t rows =
      c.layout == OutputLayout::kByRank ? arrivals : reinterpret_cast<const std::int32_t*>(first_row.data())[slots];
  const auto keep_output = [&](const std::string& call, const DispatchOutput& o) {
    keep_rows(result, call + " x", o.x, h, rows);
    keep_rows(result, call + " scales", o.scales, h, rows);
    if (o.topk_idx.given()) keep(result, call + " topk_idx", o.topk_idx);
    keep_rows(result, call + " topk_weights", o.topk_weights, h, rows);
    for (const Tensor& t : o.side)
      result.emplace_back(call + " side", bytes_of(TensorView(t.data, t.dtype, {arrivals, t.shape[1]})));
  };
  keep_output("dispatch", out);
  keep(result, "dst_rank", h.dst_rank);
  keep(result, "dst_row", h.dst_row);
  keep(result, "dst_arrival", h.dst_arrival);
  keep(result, "first_arrival", h.first_arrival);
  keep(result, "slot_rows", h.slot_rows);
  keep(result, "slot_first_row", h.slot_first_row);
  keep(result, "tokens_between", h.tokens_between);
  result.emplace_back("src_token", bytes_of(TensorView(h.src_token.data, DType::kI32, {arrivals})));
  if (h.arrival_row.given())
    result.emplace_back("arrival_row", bytes_of(TensorView(h.arrival_row.data, DType::kI32, {arrivals, c.topk})));

  DispatchInput again;
  again.x = x;
  again.scales = scales;
  again.topk_weights = weights;
  again.handle = out.handle;
  again.fp8 = input.fp8;
  keep_output("cached dispatch", buffer.dispatch(again));

  if (c.dtype != DType::kBf16 && c.dtype != DType::kFp16 && c.dtype != DType::kFp32) return result;
  // Back: rows of our own, the same on both backends.
  DispatchInput plain;
  plain.x = x;
  plain.handle = out.handle;
  DispatchOutput sent = buffer.dispatch(plain);
  for (const SumOrder& order : {SumOrder::by_rank(), SumOrder::by_rank_and_node(), SumOrder::by_topk(),
                                SumOrder{SumOrder::Key::kRank, true, true, false}}) {
    CombineInput combine;
    combine.x = sent.x;
    combine.handle = out.handle;
    combine.order = order;
    if (c.layout != OutputLayout::kByRank) combine.weights = home;
    combine.bias[0] = bias;
    if (c.weights) combine.topk_weights = out.topk_weights;
    CombineOutput back = buffer.combine(combine);
    keep(result, "combine", back.x);
    keep(result, "combine weights", back.topk_weights);
    combine.weights_home = WeightsHome::kFromOwner;
    combine.bias[0] = {};
    back = buffer.combine(combine);
    keep(result, "combine without bias", back.x);
    keep(result, "combine weights of the owner", back.topk_weights);
  }
  return result;
}

void expect_same_as_host(const Case& c) {
  std::ostringstream text;
  text << c;
  SCOPED_TRACE(text.str());
  std::vector<Result> host(c.ranks), device(c.ranks);
  Config config = small_config();
  config.max_experts = 4096;
  config.ranks_per_node = c.nodes;
  Options one_worker;
  one_worker.num_workers = 1;
  run_ranks(c.ranks, config, one_worker,
            [&](Buffer& b) { host[b.rank()] = run_case(c, b, inputs_of(c, b.rank()), false); });
  run_ranks(c.ranks, config, on_gpu(c.sms),
            [&](Buffer& b) { device[b.rank()] = run_case(c, b, inputs_of(c, b.rank()), true); });
  expect_equal(host, device);
}

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

TEST(CudaExchange, is_the_hosts_for_every_layout_and_number_of_ranks) {
  EP_NEEDS_GPU();
  for (int ranks : {1, 2, 4, 8})
    for (OutputLayout layout : kLayouts) expect_same_as_host({.ranks = ranks, .layout = layout, .alignment = 4});
}

TEST(CudaExchange, is_the_hosts_for_every_kind_of_row) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32, DType::kU8, DType::kFp8E4m3})
    for (OutputLayout layout : kLayouts)
      expect_same_as_host({.dtype = dtype, .layout = layout, .idx64 = false, .caller_scales = 3, .side = 5});
}

TEST(CudaExchange, quantises_as_the_host_does) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32})
    for (OutputLayout layout : kLayouts)
      for (int kind = 0; kind < 3; ++kind)
        for (bool column_major : {false, true})
          expect_same_as_host({.hidden = 2064,
                               .dtype = dtype,
                               .layout = layout,
                               .fp8 = true,
                               .round_scale = kind > 0,
                               .ue8m0 = kind > 1,
                               .column_major = column_major,
                               .specials = true});
}

TEST(CudaExchange, scales_every_largest_magnitude_as_the_host_does) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16})
    for (bool round_scale : {false, true})
      expect_same_as_host(
          {.tokens = 300, .hidden = 7168, .dtype = dtype, .fp8 = true, .round_scale = round_scale, .every_peak = true});
}

TEST(CudaExchange, serves_rows_of_any_width) {
  EP_NEEDS_GPU();
  for (std::int64_t hidden : {8, 16, 136, 1000, 4096, 7168, 16400, 40000}) {
    expect_same_as_host({.tokens = 20, .hidden = hidden});
    if (hidden % 16 == 0)
      expect_same_as_host({.tokens = 20, .hidden = hidden, .layout = OutputLayout::kByExpert, .fp8 = true});
  }
}

TEST(CudaExchange, serves_many_selections_and_many_experts) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts) {
    expect_same_as_host({.tokens = 30, .topk = 1, .layout = layout});
    expect_same_as_host({.ranks = 4, .tokens = 30, .hidden = 64, .topk = 32, .experts = 64, .layout = layout});
    expect_same_as_host({.ranks = 2, .tokens = 10, .hidden = 64, .topk = 70, .experts = 400, .layout = layout});
  }
  expect_same_as_host(
      {.ranks = 4, .tokens = 300, .hidden = 64, .topk = 8, .experts = 4096, .layout = OutputLayout::kByExpert});
}

TEST(CudaExchange, follows_placements_and_nodes) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts)
    expect_same_as_host({.ranks = 4, .layout = layout, .replicas = true, .mask_weights = false, .nodes = {2}});
}

TEST(CudaExchange, serves_no_tokens_and_bounded_outputs_on_any_number_of_sms) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts) expect_same_as_host({.tokens = 0, .layout = layout});
  for (int sms : {1, 3, 16}) {
    expect_same_as_host({.tokens = 700, .max_rows = 2000, .sms = sms});
    expect_same_as_host(
        {.tokens = 700, .layout = OutputLayout::kByExpert, .alignment = 8, .max_rows = 8000, .sms = sms});
  }
}

}  // namespace
}  // namespace deep_ep::test
