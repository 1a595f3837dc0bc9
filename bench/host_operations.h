// SPDX-License-Identifier: MIT
// The operations of the library that are measured, each with the bytes that it must move.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/digest.h"
#include "bench/limits.h"
#include "bench/workload.h"
#include "deep_ep/buffer.h"

namespace deep_ep::bench {

struct Operation {
  std::string name;
  bool low_latency = false;
  std::function<void()> before;  // untimed, before each run
  std::function<void()> run;
  std::function<std::int64_t()> digest;  // of the last run's result
  CopyShape copy;                        // what this rank copies for the memcpy limit
  std::int64_t copy_bytes = 0;           // read and written by all ranks' copies together
  std::int64_t must_bytes = 0;           // read and written by all ranks in this operation, at least
  std::function<void()> bare;            // the same reads and writes without protocol; may be empty
  std::string bound_name;                // another bound than copying; may be empty
  std::function<void()> bound;
};

inline TensorView bf16_view(const std::vector<std::uint16_t>& rows, std::int64_t num_rows, std::int64_t hidden) {
  return TensorView(static_cast<const void*>(rows.data()), DType::kBf16, {num_rows, hidden});
}

/// Rows are salted with the row of their scales, so both must be right.
inline std::int64_t digest_rows(const Tensor& x, const Tensor& scales, std::int64_t num_rows) {
  Digest digest;
  const std::size_t row_bytes = static_cast<std::size_t>(x.size(1)) * item_bytes(x.dtype);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    Digest of_scales;
    if (scales.given())
      of_scales.add(scales.as<float>() + row * scales.strides[0], static_cast<std::size_t>(scales.size(1)) * 4);
    digest.add(x.as<std::byte>() + static_cast<std::size_t>(row) * row_bytes, row_bytes,
               static_cast<std::uint64_t>(of_scales.value()));
  }
  return digest.value();
}

/// One slot after the other, its valid rows only.
inline std::int64_t digest_padded(const DispatchOutput& out) {
  Digest digest;
  const std::size_t row_bytes = static_cast<std::size_t>(out.x.size(2)) * item_bytes(out.x.dtype);
  for (std::int64_t slot = 0; slot < out.x.size(0); ++slot) {
    for (std::int64_t row = 0; row < out.handle->slot_rows.as<std::int32_t>()[slot]; ++row) {
      const std::size_t at = static_cast<std::size_t>(slot * out.x.size(1) + row);
      digest.add(out.x.as<std::byte>() + at * row_bytes, row_bytes, static_cast<std::uint64_t>(slot));
    }
  }
  return digest.value();
}

/// Everything one rank needs to make the calls; built before the memory that they take is measured.
class HostOperations {
 public:
  HostOperations(const Workload& work, int rank)
      : work_(work),
        rank_(rank),
        traffic_(traffic_of(work, work.num_tokens)),
        ll_traffic_(traffic_of(work, work.num_ll_tokens)),
        routing_(make_routing(work, rank, work.num_tokens)),
        ll_routing_(make_routing(work, rank, work.num_ll_tokens)),
        ranks_of_token_(ranks_of_tokens(work, routing_)),
        ll_places_(places_of_selections(work, rank)),
        x_(static_cast<std::size_t>(std::max(work.num_tokens, work.num_ll_tokens) * work.hidden)),
        result_(static_cast<std::size_t>(std::max(work.num_tokens, work.num_ll_tokens) * work.hidden)) {
    fill_rows(work, rank, std::max(work.num_tokens, work.num_ll_tokens), x_.data());
  }

  /// Room for what is kept at once, and a third more: the last quarter of an arena holds no output for longer than a
  /// call.
  Config config() const {
    ExchangeShape large;
    large.rows = traffic_.most_received();
    large.row_bytes = static_cast<std::size_t>(work_.row_bytes());
    large.num_topk = work_.num_topk;
    ExchangeShape padded = large;
    padded.rows = std::int64_t{work_.slots()} * work_.num_ranks * work_.num_ll_tokens;
    padded.tokens = std::int64_t{work_.num_ranks} * work_.num_ll_tokens;
    Config config;
    config.max_experts = work_.num_experts;
    config.arena_bytes = 2 * (arena_bytes_for(large) + arena_bytes_for(padded)) / 3 * 4 + (std::size_t{1} << 20);
    config.low_latency.max_tokens_per_rank = work_.num_ll_tokens;
    config.low_latency.row_bytes = static_cast<std::size_t>(work_.row_bytes());
    config.low_latency.num_topk = work_.num_topk;
    return config;
  }

  /// Collective: makes the outputs that the combines read.
  void prepare(Buffer& buffer) {
    buffer_ = &buffer;
    received_ = buffer.dispatch(large_input());
    ll_received_ = buffer.low_latency_dispatch(small_input(false)).receive();
  }

  /// The staged combine's input, in ordinary memory.
  void copy_received() {
    staged_.assign(received_.x.as<std::uint16_t>(), received_.x.as<std::uint16_t>() + received_.x.numel());
  }

  void release() { received_ = out_ = ll_received_ = ll_out_ = {}, combined_ = {}; }

  const Traffic& traffic() const { return traffic_; }

  std::vector<Operation> large(Limits* limits) {
    std::vector<Operation> all;
    for (const bool fp8 : {false, true}) {
      for (const bool cached : {false, true}) all.push_back(dispatch(fp8, cached, limits));
    }
    all.push_back(combine(false, limits));
    all.push_back(combine(true, limits));
    return all;
  }

  /// One row from each node, summed there.
  Operation combine_by_node() {
    Operation op = combine(false, nullptr, SumOrder::by_rank_and_node());
    op.name = "combine_bf16_by_node";
    return op;
  }

  std::vector<Operation> small(Limits* limits) {
    return {ll_dispatch(limits, false), ll_dispatch(limits, true), ll_dispatch(limits, true, ScaleOrder::kColumnMajor),
            ll_combine(false),          ll_combine(true),          ll_round_trip()};
  }

 private:
  DispatchInput large_input() const {
    DispatchInput in;
    in.x = bf16_view(x_, work_.num_tokens, work_.hidden);
    in.topk_idx =
        TensorView(static_cast<const void*>(routing_.topk_idx.data()), DType::kI64, {work_.num_tokens, work_.num_topk});
    in.topk_weights = TensorView(static_cast<const void*>(routing_.topk_weights.data()), DType::kFp32,
                                 {work_.num_tokens, work_.num_topk});
    in.num_experts = work_.num_experts;
    return in;
  }

  DispatchInput small_input(bool fp8, ScaleOrder scales = ScaleOrder::kRowMajor) const {
    DispatchInput in;
    in.x = bf16_view(x_, work_.num_ll_tokens, work_.hidden);
    in.topk_idx = TensorView(static_cast<const void*>(ll_routing_.topk_idx.data()), DType::kI64,
                             {work_.num_ll_tokens, work_.num_topk});
    in.num_experts = work_.num_experts;
    in.layout = OutputLayout::kPadded;
    in.max_tokens_per_rank = work_.num_ll_tokens;
    in.scale_order = scales;
    if (fp8) in.fp8 = Fp8Options{};
    return in;
  }

  CopyShape copy_shape(std::int64_t rows, std::int64_t row_bytes) const { return {rows, row_bytes}; }

  Operation dispatch(bool fp8, bool cached, Limits* limits) {
    const std::int64_t wire = fp8 ? work_.fp8_row_bytes() : work_.row_bytes();
    const std::int64_t tokens = std::int64_t{work_.num_ranks} * work_.num_tokens;
    const std::int64_t meta = cached ? 0 : work_.meta_bytes();
    Operation op;
    op.name = std::string("dispatch_") + (fp8 ? "fp8" : "bf16") + (cached ? "_cached" : "");
    DispatchInput in = large_input();
    if (fp8) in.fp8 = Fp8Options{};
    if (cached) {
      DispatchInput again;
      again.x = in.x;
      again.fp8 = in.fp8;
      again.handle = received_.handle;
      in = again;
    }
    op.before = [this] { out_ = {}; };
    op.run = [this, in] { out_ = buffer_->dispatch(in); };
    op.digest = [this] { return digest_rows(out_.x, out_.scales, out_.handle->num_rows); };
    op.copy = copy_shape(traffic_.sent(rank_), wire);
    op.copy_bytes = 2 * traffic_.all() * wire;
    op.must_bytes = tokens * (work_.row_bytes() + meta) + traffic_.all() * (wire + meta);
    op.bare = [this, fp8, limits] { limits->bare_dispatch(traffic_, ranks_of_token_, fp8); };
    if (fp8) {
      op.bound_name = "quantise only";
      op.bound = [this, limits] { limits->quantize_only(work_.num_tokens); };
    }
    return op;
  }

  Operation combine(bool staged, Limits* limits, const SumOrder& order = SumOrder::by_rank()) {
    const std::int64_t tokens = std::int64_t{work_.num_ranks} * work_.num_tokens;
    Operation op;
    op.name = staged ? "combine_bf16_staged" : "combine_bf16_in_place";
    CombineInput in;
    in.x = staged ? bf16_view(staged_, received_.x.size(0), work_.hidden) : TensorView(received_.x);
    in.handle = received_.handle;
    in.order = order;
    in.out = bf16_view(result_, work_.num_tokens, work_.hidden);
    op.before = [this] { out_ = {}; };
    op.run = [this, in] { combined_ = buffer_->combine(in); };
    op.digest = [this] { return digest_rows(combined_.x, {}, work_.num_tokens); };
    op.copy = copy_shape(traffic_.received(rank_), work_.row_bytes());
    op.copy_bytes = 2 * traffic_.all() * work_.row_bytes();
    const std::int64_t staged_rows = staged ? traffic_.all() - traffic_.own() : 0;
    op.must_bytes = (traffic_.all() + 2 * staged_rows + tokens) * work_.row_bytes();
    op.bare = [this, limits] { limits->bare_combine(traffic_, ranks_of_token_); };
    if (staged) op.bare = nullptr;
    return op;
  }

  // Low latency. A token is read once and written at each of its experts.
  std::int64_t ll_dispatch_bytes(std::int64_t wire) const {
    const std::int64_t tokens = std::int64_t{work_.num_ranks} * work_.num_ll_tokens;
    return tokens * work_.row_bytes() + ll_traffic_.num_selections * wire;
  }

  std::int64_t ll_combine_bytes(bool staged) const {
    const std::int64_t tokens = std::int64_t{work_.num_ranks} * work_.num_ll_tokens;
    const std::int64_t staged_rows = staged ? ll_traffic_.num_selections - ll_traffic_.own_selections : 0;
    return (ll_traffic_.num_selections + 2 * staged_rows + tokens) * work_.row_bytes();
  }

  Operation ll_dispatch(Limits* limits, bool fp8, ScaleOrder scales = ScaleOrder::kRowMajor) {
    const std::int64_t wire = fp8 ? work_.fp8_row_bytes() : work_.row_bytes();
    Operation op;
    op.name = std::string("ll_dispatch_") + (fp8 ? "fp8" : "bf16");
    if (scales == ScaleOrder::kColumnMajor) op.name += "_columns";
    op.low_latency = true;
    op.before = [this] { ll_out_ = {}; };
    op.run = [this, in = small_input(fp8, scales)] { ll_out_ = buffer_->low_latency_dispatch(in).receive(); };
    op.digest = [this] { return digest_padded(ll_out_); };
    op.copy = copy_shape(work_.num_ll_tokens * std::int64_t{work_.num_topk}, wire);
    op.copy_bytes = 2 * ll_traffic_.num_selections * wire;
    op.must_bytes = ll_dispatch_bytes(wire);
    op.bare = [this, fp8, limits] { limits->bare_ll_dispatch(ll_places_, fp8); };
    op.bound_name = "one round of signals";
    return op;
  }

  CombineInput ll_combine_input(bool staged) const {
    CombineInput in;
    in.x = ll_received_.x;
    in.zero_copy = !staged;
    in.at_once = true;
    in.handle = ll_received_.handle;
    in.weights = TensorView(static_cast<const void*>(ll_routing_.topk_weights.data()), DType::kFp32,
                            {work_.num_ll_tokens, work_.num_topk});
    in.order = SumOrder::by_topk();
    in.out = bf16_view(result_, work_.num_ll_tokens, work_.hidden);
    return in;
  }

  Operation ll_combine(bool staged) {
    Operation op;
    op.name = staged ? "ll_combine_bf16_staged" : "ll_combine_bf16_in_place";
    op.low_latency = true;
    op.before = [this] { ll_out_ = {}; };
    op.run = [this, in = ll_combine_input(staged)] { combined_ = buffer_->low_latency_combine(in).receive(); };
    op.digest = [this] { return digest_rows(combined_.x, {}, work_.num_ll_tokens); };
    op.copy = copy_shape(work_.num_ll_tokens * std::int64_t{work_.num_topk}, work_.row_bytes());
    op.copy_bytes = 2 * ll_traffic_.num_selections * work_.row_bytes();
    op.must_bytes = ll_combine_bytes(staged);
    op.bound_name = "one round of signals";
    return op;
  }

  Operation ll_round_trip() {
    Operation op = ll_combine(false);
    op.name = "ll_round_trip_fp8_bf16";
    op.run = [this, in = small_input(true), back = ll_combine_input(false)]() mutable {
      ll_out_ = buffer_->low_latency_dispatch(in).receive();
      back.handle = ll_out_.handle;
      combined_ = buffer_->low_latency_combine(back).receive();
    };
    op.must_bytes = ll_dispatch_bytes(work_.fp8_row_bytes()) + ll_combine_bytes(false);
    return op;
  }

  const Workload& work_;
  int rank_;
  Traffic traffic_;
  Traffic ll_traffic_;
  Routing routing_;
  Routing ll_routing_;
  std::vector<std::uint32_t> ranks_of_token_;
  std::vector<PlaceOfSelection> ll_places_;
  std::vector<std::uint16_t> x_;
  std::vector<std::uint16_t> result_;
  std::vector<std::uint16_t> staged_;
  Buffer* buffer_ = nullptr;
  DispatchOutput received_;     // what the large combines read, and the handle of the cached calls
  DispatchOutput out_;          // of the last large dispatch
  DispatchOutput ll_received_;  // what the low-latency combine reads
  DispatchOutput ll_out_;
  CombineOutput combined_;
};

}  // namespace deep_ep::bench
