// SPDX-License-Identifier: MIT
// Adds the rows of one token in the plan's order. Both kinds of combine end here.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "backend.h"
#include "host/rows.h"
#include "plan/sum_order.h"

namespace deep_ep::host {

/// One worker's adder. Sums are kept a piece of the row at a time, small enough for the nearest cache.
class RowSum {
 public:
  RowSum(const CombineCall& call, const plan::Topology& topology, const RowOps& ops);

  /// Adds token's rows into out[hidden]. row_of(k, rank) gives the row that came back for selection k.
  template <typename RowOf>
  void sum(int token, const std::int32_t* dst_rank, const RowOf& row_of, void* out) {
    const int count = plan_steps(dst_rank);
    for (int i = 0; i < count; ++i) rows_[i] = row_of(steps_[i].k, steps_[i].rank);
    add(token, count, static_cast<std::byte*>(out));
  }

 private:
  static constexpr std::int64_t kPiece = 1024;  // elements: 4 KiB for each level's sum

  int plan_steps(const std::int32_t* dst_rank);
  void add(int token, int count, std::byte* out);
  void add_step(const plan::SumStep& step, const void* row, float weight, std::int64_t n);
  void close(float* sum, float* into, std::int64_t n);
  void add_bias(float* sum, int token, std::int64_t first, std::int64_t n);

  const CombineCall& call_;
  const plan::Topology& topology_;
  const RowOps& ops_;
  const bool one_row_per_rank_;
  std::vector<plan::SumStep> steps_;
  std::vector<const std::byte*> rows_;
  std::unique_ptr<float[]> sums_;  // of the rank, of the node, of all: kPiece each
  float *of_rank_, *of_node_, *of_all_;
  std::unique_ptr<std::byte[]> rounded_;
};

}  // namespace deep_ep::host
