// SPDX-License-Identifier: MIT
// Where each output of a high-throughput dispatch lies inside its arena block. Receiver and senders compute this from
// the same numbers, so one offset is all they exchange.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/buffer.h"
#include "plan/align.h"

namespace deep_ep::plan {

inline constexpr int kMaxSide = 8;

/// What travels with one token: the same on every rank of a call.
struct RowShape {
  std::size_t row_bytes = 0;  // of x on the wire
  int num_scales = 0;         // 4-byte words per row
  bool scales_column_major = false;
  std::int64_t padded_slot_rows = 0;  // kPadded: rows of a slot, whose scales are a matrix of their own; else 0
  int num_topk = 0;
  int topk_idx_bytes = 0;  // 4 or 8; 0: ids do not travel (cached handle)
  bool topk_weights = false;
  int num_side = 0;
  std::size_t side_bytes[kMaxSide] = {};

  /// Bytes that travel with each row, and beside the rows once for each (token, rank): what Statistics counts as sent.
  EP_HOST_DEVICE std::uint64_t bytes_of_row(OutputLayout layout) const {
    return row_bytes + 4 * static_cast<std::uint64_t>(num_scales) +
           (topk_weights && layout != OutputLayout::kByRank ? 4 : 0);
  }
  EP_HOST_DEVICE std::uint64_t bytes_of_arrival(OutputLayout layout) const {
    const bool by_rank = layout == OutputLayout::kByRank;
    const auto topk = static_cast<std::uint64_t>(num_topk);
    std::uint64_t bytes = topk_weights && by_rank ? 4 * topk : 0;
    if (topk_idx_bytes > 0) bytes += 4 + topk * (static_cast<std::uint64_t>(topk_idx_bytes) + (by_rank ? 0 : 4));
    for (int i = 0; i < num_side; ++i) bytes += side_bytes[i];
    return bytes;
  }
};

//   x | scales | topk_idx | topk_weights | src_token | arrival_row | side 0 | side 1 | ...     each 128-byte aligned
struct OutputBlock {
  std::size_t x_at = 0;
  std::size_t scales_at = 0;
  std::size_t topk_idx_at = 0;
  std::size_t topk_weights_at = 0;
  std::size_t src_token_at = 0;
  std::size_t arrival_row_at = 0;
  std::size_t side_at[kMaxSide] = {};
  std::size_t total_bytes = 0;
  // Scales, in words. Column-major: one matrix for each group of rows, a slot of kPadded or everything.
  std::int64_t scale_row_stride = 0;
  std::int64_t scale_column_stride = 0;
  std::int64_t scale_group_rows = 1;
  std::int64_t scale_group_stride = 0;

  /// Where a row's first scale lies, in words from scales_at.
  EP_HOST_DEVICE std::int64_t first_scale(std::int64_t row) const {
    // Rows are fewer than 2^31: on a device a division of 64 bits costs as much as a row's scales. Nearly always there
    // is one group, and none is needed.
    const auto of_rows = static_cast<std::uint32_t>(row), in_group = static_cast<std::uint32_t>(scale_group_rows);
    if (of_rows < in_group) return row * scale_row_stride;
    return of_rows / in_group * scale_group_stride + of_rows % in_group * scale_row_stride;
  }

  EP_HOST_DEVICE static OutputBlock place(const RowShape& shape, OutputLayout layout, std::int64_t rows,
                                          std::int64_t arrivals) {
    const auto r = static_cast<std::size_t>(rows), a = static_cast<std::size_t>(arrivals);
    const std::size_t topk = static_cast<std::size_t>(shape.num_topk);
    const bool by_rank = layout == OutputLayout::kByRank;
    OutputBlock block;
    const std::int64_t group = shape.padded_slot_rows > 0 ? shape.padded_slot_rows : rows;
    const auto column = shape.padded_slot_rows > 0 ? group : static_cast<std::int64_t>(align_up(r, 4));
    block.scale_row_stride = shape.scales_column_major ? 1 : shape.num_scales;
    block.scale_column_stride = shape.scales_column_major ? column : 1;
    block.scale_group_rows = group > 0 ? group : 1;
    block.scale_group_stride = shape.num_scales * (shape.scales_column_major ? column : group);
    std::size_t end = 0;
    block.x_at = take(end, r * shape.row_bytes);
    block.scales_at = take(end, 4 * static_cast<std::size_t>(shape.num_scales) * align_up(r, 4));
    block.topk_idx_at = take(end, a * topk * shape.topk_idx_bytes);
    block.topk_weights_at = take(end, shape.topk_weights ? 4 * (by_rank ? a * topk : r) : 0);
    block.src_token_at = take(end, shape.topk_idx_bytes > 0 ? 4 * a : 0);
    block.arrival_row_at = take(end, shape.topk_idx_bytes > 0 && !by_rank ? 4 * a * topk : 0);
    for (int i = 0; i < shape.num_side; ++i) block.side_at[i] = take(end, a * shape.side_bytes[i]);
    block.total_bytes = align_up(end, kRegionAlignment);
    return block;
  }
};

}  // namespace deep_ep::plan
