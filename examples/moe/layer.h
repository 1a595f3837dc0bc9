// SPDX-License-Identifier: MIT
// The layer as one rank runs it: dispatch, experts, combine. This is the part to read first if you came for DeepEP.
#pragma once

#include <memory>
#include <vector>

#include "deep_ep/buffer.h"
#include "expert.h"
#include "router.h"
#include "settings.h"

namespace moe {

/// One rank's end of the layer.
class Layer {
 public:
  /// Opens the buffer and makes the experts that this rank hosts. Collective.
  Layer(const Settings& settings, const std::shared_ptr<deep_ep::Bootstrap>& group);

  /// Sends every token to the ranks that host its experts, as BF16 or quantised to FP8 on the way. Rows come grouped by
  /// expert, each group padded with zeros to a multiple of the rows that an expert takes at a time. Collective.
  deep_ep::DispatchOutput dispatch(const std::vector<Bf16>& x, const Routing& routing, bool fp8);

  /// Each hosted expert on its group of rows. The result lies in the buffer's memory, where combine reads it in place.
  deep_ep::Tensor run_experts(const deep_ep::DispatchOutput& received);

  /// Brings the rows home and adds them up, weighted, in ascending order of the selection. Collective.
  deep_ep::Tensor combine(const deep_ep::Tensor& rows, const deep_ep::DispatchOutput& received, const Routing& routing);

  deep_ep::Buffer& buffer() { return *buffer_; }

 private:
  Settings settings_;
  std::shared_ptr<const deep_ep::Placement> placement_;
  std::unique_ptr<deep_ep::Buffer> buffer_;
  std::vector<Expert> experts_;  // by slot
};

/// Received rows first .. last - 1 as FP32, [rows, hidden]: widened BF16, or FP8 times its block's scale.
std::vector<float> widen_rows(const deep_ep::DispatchOutput& received, std::int64_t first, std::int64_t last);

}  // namespace moe
