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

/// Combine, where one row of a rank comes home: more rows than this cost more by the third that lines add than they
/// save.
inline constexpr int kFewRows = 128;

/// Every low-latency call begins with the calls themselves, one rank's after the other: a line for each field of a
/// signature, at the front of the ticket's lines whatever the call is.
inline constexpr int kMostFields = 32;
inline constexpr int kCallBytes = kMostFields * kLineBytes;
EP_HOST_DEVICE constexpr std::size_t call_lines(int num_ranks) {
  return static_cast<std::size_t>(num_ranks) * kCallBytes;
}

EP_HOST_DEVICE constexpr int pieces_of_row(std::int64_t row_bytes) {
  return static_cast<int>((row_bytes + kPieceBytes - 1) / kPieceBytes);
}
/// Bytes of the lines that hold so many words.
EP_HOST_DEVICE constexpr std::size_t word_lines(int words) {
  return static_cast<std::size_t>((words + kLineWords - 1) / kLineWords) * kLineBytes;
}

/// Combine: a row and the weights that come home with it, in a slot.
EP_HOST_DEVICE constexpr std::size_t combine_slot_lines(std::int64_t row_bytes, int num_topk) {
  return align_up(static_cast<std::size_t>(pieces_of_row(row_bytes)) * kPieceLineBytes + word_lines(num_topk),
                  kRegionAlignment);
}

/// Combine: the slots of a token, one for each of its selections, or one for each rank where these are fewer and only
/// one row of a rank comes home.
struct CombineSlots {
  int of_token = 0;
  bool by_rank = false;

  static CombineSlots place(int num_ranks, int num_topk, bool one_row_per_rank) {
    const bool by_rank = one_row_per_rank && num_ranks < num_topk;
    return {by_rank ? num_ranks : num_topk, by_rank};
  }
};

/// Dispatch: what one token's message holds.
//   [ heads: a line for each selection (slot, row, arrival) | weights | pieces of the row | scales | side 0 | ... ]
// A quantised piece has up to four lines of scales: line g those of the groups that are the g-th of their 512 channels.
struct LineMessage {
  static constexpr int kScaleLines = 4;  // of a quantised piece

  std::uint32_t weights_at = 0;
  std::uint32_t row_at = 0;
  std::uint32_t scales_at = 0;
  std::uint32_t side_at[kMaxSide] = {};
  std::uint32_t bytes = 0;

  static LineMessage place(const RowShape& shape) {
    const std::size_t pieces = static_cast<std::size_t>(pieces_of_row(static_cast<std::int64_t>(shape.row_bytes)));
    std::size_t end = static_cast<std::size_t>(shape.num_topk) * kLineBytes;
    const auto put = [&](std::size_t bytes, std::size_t alignment) {
      return static_cast<std::uint32_t>(take(end, bytes, alignment));
    };
    LineMessage message;
    message.weights_at = put(shape.topk_weights ? word_lines(shape.num_topk) : 0, kLineBytes);
    message.row_at = put(pieces * kPieceLineBytes, kRegionAlignment);
    const std::size_t of_pieces = pieces * kScaleLines * kLineBytes;
    message.scales_at = put(shape.num_scales > 0 ? std::max(of_pieces, word_lines(shape.num_scales)) : 0, kLineBytes);
    for (int i = 0; i < shape.num_side; ++i)
      message.side_at[i] = put(word_lines(static_cast<int>(shape.side_bytes[i] / 4)), kLineBytes);
    message.bytes = static_cast<std::uint32_t>(align_up(end, kRegionAlignment));
    return message;
  }
};

/// What a source counts for a receiver: its tokens and arrivals, then the rows of each slot, three a line.
EP_HOST_DEVICE constexpr int count_lines(int slots) { return 1 + (slots + kLineWords - 1) / kLineWords; }

inline std::size_t count_bytes(int slots) {
  return align_up(static_cast<std::size_t>(count_lines(slots)) * kLineBytes, kRegionAlignment);
}

/// Bytes of lines of a dispatch: the calls, counts of each source, then a message for each of its tokens.
inline std::size_t dispatch_lines(int num_ranks, int max_tokens, int max_slots, const LineMessage& message) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  return call_lines(num_ranks) +
         ranks * (count_bytes(max_slots) + static_cast<std::size_t>(max_tokens) * message.bytes);
}

/// Bytes of lines that one ticket needs: every dispatch within `capacity`, and combine of few rows.
inline std::size_t line_bytes(const LowLatencyCapacity& capacity, int num_ranks, int max_slots) {
  RowShape shape;
  shape.row_bytes = capacity.row_bytes;
  shape.num_topk = capacity.num_topk;
  shape.topk_weights = true;
  shape.num_scales = 1;
  shape.num_side = 1;
  // Scales and several side tensors take up lines of their own.
  shape.side_bytes[0] = capacity.side_bytes + (kMaxSide + 1) * kLineBytes;
  const std::size_t dispatch =
      dispatch_lines(num_ranks, capacity.max_tokens_per_rank, max_slots, LineMessage::place(shape));
  const auto rows = static_cast<std::size_t>(std::min(capacity.max_tokens_per_rank * capacity.num_topk, kFewRows));
  const std::size_t combine =
      call_lines(num_ranks) +
      rows * combine_slot_lines(static_cast<std::int64_t>(capacity.row_bytes), capacity.num_topk);
  return align_up(std::max(dispatch, combine), kRegionAlignment);
}

}  // namespace deep_ep::plan
