// SPDX-License-Identifier: MIT
#include "host/row_sum.h"

namespace deep_ep::host {

namespace {

// Results that are as large together are written past the caches, smaller ones stay in them for their reader. 128 rows
// of 14 KiB take 1.5 ms of low-latency combine past the caches and 1.2 through them; 4096 take 37 and 42.
constexpr std::int64_t kStreamResultsFrom = 4 << 20;

}  // namespace

RowSum::RowSum(const CombineCall& call, const plan::Topology& topology, const RowOps& ops)
    : call_(call),
      topology_(topology),
      ops_(ops),
      one_row_per_rank_(call.in.handle->layout == OutputLayout::kByRank),
      stream_(call.in.handle->num_tokens * static_cast<std::int64_t>(call.row_bytes) >= kStreamResultsFrom),
      steps_(call.in.handle->num_topk),
      lowest_(call.in.order.round_per_rank   ? of_rank_
              : call.in.order.round_per_node ? of_node_
                                             : of_all_) {}

int RowSum::plan_steps(const std::int32_t* dst_rank) {
  return plan::make_sum_steps(
      {call_.in.order, one_row_per_rank_, call_.in.handle->num_topk, dst_rank, topology_.node_of_rank.data()},
      steps_.data(), [](int) { return true; });  // where nothing comes from, dst_rank is -1
}

void RowSum::clear(int token) {
  token_ = token;
  num_rounded_ = 0;
  for (Level* level : {&of_rank_, &of_node_, &of_all_}) {
    level->rows.clear();
    level->weights.clear();
  }
  if (call_.in.order.bias_first) add_bias();
}

void RowSum::add(const plan::SumStep& step, const void* row) {
  lowest_.rows.push_back(row);
  if (call_.in.weights.given())
    lowest_.weights.push_back(call_.in.weights.as<const float>()[token_ * call_.in.handle->num_topk + step.k]);
  if (step.closes_rank) (call_.in.order.round_per_node ? of_node_ : of_all_).rows.push_back(close(of_rank_));
  if (step.closes_node) of_all_.rows.push_back(close(of_node_));
}

void RowSum::add_bias() {
  for (const TensorView& bias : call_.in.bias) {
    if (!bias.given()) continue;
    of_all_.rows.push_back(bias.as<const std::byte>() + token_ * static_cast<std::int64_t>(call_.row_bytes));
    // A weight of 1 adds exactly: fma(1, bias, sum) rounds as sum + bias does.
    if (&lowest_ == &of_all_ && call_.in.weights.given()) of_all_.weights.push_back(1.0f);
  }
}

// A complete sum is rounded to the rows' dtype, as if it had crossed a link, and is a row one level up. A single row is
// its own sum.
const void* RowSum::close(Level& level) {
  const void* sum = level.rows.front();
  if (level.rows.size() > 1 || !level.weights.empty()) {
    if (num_rounded_ == rounded_.size()) rounded_.push_back(std::make_unique<std::byte[]>(call_.row_bytes));
    sum = rounded_[num_rounded_].get();
    sum_level(level, rounded_[num_rounded_++].get(), false);
  }
  level.rows.clear();
  level.weights.clear();
  return sum;
}

void RowSum::sum_level(const Level& level, void* dst, bool stream) const {
  ops_.sum({.rows = level.rows.data(),
            .weights = level.weights.empty() ? nullptr : level.weights.data(),
            .count = static_cast<int>(level.rows.size()),
            .dtype = call_.dtype,
            .n = call_.hidden,
            .dst = dst,
            .stream = stream});
}

void RowSum::finish(void* out) {
  if (!call_.in.order.bias_first) add_bias();
  sum_level(of_all_, out, stream_);
}

}  // namespace deep_ep::host
