// SPDX-License-Identifier: MIT
// Small batches on GPUs: data that says itself that it has come. A line is sixteen bytes, written and read as one:
// three words of data and the number of the operation. Nothing but lines ever lies in their region of a window, so a
// line of an earlier operation is never taken for one of this.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "deep_ep/config.h"
#include "plan/align.h"
#include "plan/message.h"

namespace deep_ep::plan {

inline constexpr int kLineBytes = 16;
inline constexpr int kLineWords = 3;  // of data

/// A piece of a row: sixteen bytes three times for each lane of a warp, 512 bytes apart. Its lines lie in four rows of
/// 32: three words of each sixteen bytes in the first three, the fourth words of all three in the last.
inline constexpr int kPieceVectors = 3;
inline constexpr int kPieceBytes = kPieceVectors * 512;
inline constexpr int kPieceLineBytes = 4 * 32 * kLineBytes;

/// More tokens than this cost more by the third that lines add than they save.
inline constexpr int kFewTokens = 32;

EP_HOST_DEVICE constexpr int pieces_of_row(std::int64_t row_bytes) {
  return static_cast<int>((row_bytes + kPieceBytes - 1) / kPieceBytes);
}
/// Bytes of the lines that hold so many words.
EP_HOST_DEVICE constexpr std::size_t word_lines(int words) {
  return static_cast<std::size_t>((words + kLineWords - 1) / kLineWords) * kLineBytes;
}

/// Combine: a row and the weights that come home with it, in the slot of a selection.
EP_HOST_DEVICE constexpr std::size_t combine_slot_lines(std::int64_t row_bytes, int num_topk) {
  return align_up(static_cast<std::size_t>(pieces_of_row(row_bytes)) * kPieceLineBytes + word_lines(num_topk),
                  kRegionAlignment);
}
inline std::size_t combine_lines(int max_tokens, int num_topk, std::int64_t row_bytes) {
  return static_cast<std::size_t>(max_tokens) * num_topk * combine_slot_lines(row_bytes, num_topk);
}

/// Bytes of lines that one ticket needs for few tokens.
inline std::size_t line_bytes(const LowLatencyCapacity& capacity, int num_ranks) {
  (void)num_ranks;
  const int tokens = std::min(capacity.max_tokens_per_rank, kFewTokens);
  return align_up(combine_lines(tokens, capacity.num_topk, static_cast<std::int64_t>(capacity.row_bytes)),
                  kRegionAlignment);
}

}  // namespace deep_ep::plan
