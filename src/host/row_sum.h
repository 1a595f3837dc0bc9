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

/// One worker's adder. Many results are streamed: RowOps::flush() before anybody else is told of them.
class RowSum {
 public:
  RowSum(const CombineCall& call, const plan::Topology& topology, const RowOps& ops);

  /// Adds token's rows into out[hidden]. row_of(k, rank) gives the row that came back for selection k.
  template <typename RowOf>
  void sum(int token, const std::int32_t* dst_rank, const RowOf& row_of, void* out) {
    sum(
        token, dst_rank, row_of, [](int) -> const void* { return nullptr; }, out);
  }

  /// The same where a node's rows may have been joined before they crossed: node_sum(rank) gives the sum of that rank's
  /// node, or null where its rows came one by one. Only in orders that round sums per node.
  template <typename RowOf, typename NodeSum>
  void sum(int token, const std::int32_t* dst_rank, const RowOf& row_of, const NodeSum& node_sum, void* out) {
    const int count = plan_steps(dst_rank);
    clear(token);
    for (int i = 0; i < count; ++i) {
      const void* joined = node_sum(steps_[i].rank);
      if (joined == nullptr) {
        add(steps_[i], row_of(steps_[i].k, steps_[i].rank));
      } else if (steps_[i].closes_node) {
        of_all_.rows.push_back(joined);
      }
    }
    finish(out);
  }

  /// The sum of one node, as it crosses: dst_rank names ranks of that node only, and the call has no bias.
  template <typename RowOf>
  void join(int token, const std::int32_t* dst_rank, const RowOf& row_of, void* out) {
    const int count = plan_steps(dst_rank);
    clear(token);
    for (int i = 0; i < count; ++i) add(steps_[i], row_of(steps_[i].k, steps_[i].rank));
    ops_.copy(out, of_all_.rows.front(), call_.row_bytes);
  }

 private:
  // Rows that are added in turn and rounded once.
  struct Level {
    std::vector<const void*> rows;
    std::vector<float> weights;  // used where the caller's rows enter and have weights
  };

  int plan_steps(const std::int32_t* dst_rank);
  void clear(int token);
  void add(const plan::SumStep& step, const void* row);
  void add_bias();
  const void* close(Level& level);
  void sum_level(const Level& level, void* dst, bool stream) const;
  void finish(void* out);

  const CombineCall& call_;
  const plan::Topology& topology_;
  const RowOps& ops_;
  const bool one_row_per_rank_;
  const bool stream_;  // results go past the caches
  std::int64_t token_ = 0;
  std::vector<plan::SumStep> steps_;
  Level of_rank_, of_node_, of_all_;
  Level& lowest_;                                      // where the caller's rows enter
  std::vector<std::unique_ptr<std::byte[]>> rounded_;  // complete sums of ranks and nodes
  std::size_t num_rounded_ = 0;
};

}  // namespace deep_ep::host
