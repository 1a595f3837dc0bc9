// SPDX-License-Identifier: MIT
// Low-latency slots: one message per (token, destination rank), at a fixed place in the destination's window.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/config.h"
#include "plan/output.h"

namespace deep_ep::plan {

//   [ src_token: i32, placed: i32, slot of each selection: i32 x topk, weights: f32 x topk | row | scales | side 0 |
//   ... ]   each 16-byte aligned
// On hosts a source's messages lie in order of arrival and say which token each is; inside a node the part up to the
// row lies at the destination, and the rest, once for all destinations, at the source. GPUs have plan/lines.h instead.
struct MessageLayout {
  static constexpr std::size_t kAlignment = 16;

  std::size_t src_token_at = 0;
  std::size_t placed_at = 0;  // not 0: the row lies at its places already
  std::size_t slots_at = 0;
  std::size_t weights_at = 0;
  std::size_t row_at = 0;
  std::size_t scales_at = 0;
  std::size_t side_at[kMaxSide] = {};
  std::size_t bytes = 0;

  static MessageLayout place(const RowShape& shape) {
    const std::size_t topk = static_cast<std::size_t>(shape.num_topk);
    MessageLayout message;
    std::size_t end = 0;
    message.src_token_at = take(end, 4, kAlignment);
    message.placed_at = take(end, 4, 4);
    message.slots_at = take(end, 4 * topk, 4);
    message.weights_at = take(end, shape.topk_weights ? 4 * topk : 0, 4);
    message.row_at = take(end, shape.row_bytes, kAlignment);
    message.scales_at = take(end, 4 * static_cast<std::size_t>(shape.num_scales), kAlignment);
    for (int i = 0; i < shape.num_side; ++i) message.side_at[i] = take(end, shape.side_bytes[i], kAlignment);
    message.bytes = align_up(end, kRegionAlignment);
    return message;
  }
};

/// A message between GPUs that share no memory: it brings the number of each selection's row too, among those that its
/// source sends to that slot. Hosts count them as they place them, and need less room.
struct FarMessage : MessageLayout {
  std::size_t rows_at = 0;

  static FarMessage place(const RowShape& shape) {
    FarMessage message;
    static_cast<MessageLayout&>(message) = MessageLayout::place(shape);
    message.rows_at = take(message.bytes, 4 * static_cast<std::size_t>(shape.num_topk), 4);
    message.bytes = align_up(message.bytes, kRegionAlignment);
    return message;
  }
};

/// Bytes of one ticket's slots for dispatch: a message from every token of every source.
inline std::size_t dispatch_slot_bytes(int num_ranks, int max_tokens_per_rank, std::size_t message_bytes) {
  return static_cast<std::size_t>(num_ranks) * max_tokens_per_rank * message_bytes;
}

/// Weights that one row brings home, so placed that a row's can be written alone over a network.
EP_HOST_DEVICE constexpr std::size_t combine_weights_stride(int num_topk) {
  return align_up(4 * static_cast<std::size_t>(num_topk), MessageLayout::kAlignment);
}

/// Bytes of one ticket's slots for combine: a row for every selection, the weights that its rank sends home, and on
/// hosts its number where it is read in place.
inline std::size_t combine_slot_bytes(int max_tokens_per_rank, int num_topk, std::size_t row_bytes) {
  return static_cast<std::size_t>(max_tokens_per_rank) * num_topk *
         (align_up(row_bytes, kRegionAlignment) + combine_weights_stride(num_topk) + sizeof(std::int32_t));
}

/// How far apart rows lie in combine's slots on hosts, which share a ticket's memory as widely as it allows: at least
/// their size, if combine_slot_bytes() of them fit.
inline std::size_t combine_row_stride(std::size_t ticket_bytes, int max_tokens_per_rank, int num_topk) {
  const std::size_t slots = static_cast<std::size_t>(max_tokens_per_rank) * num_topk;
  return (ticket_bytes - combine_slot_bytes(max_tokens_per_rank, num_topk, 0)) / slots / kRegionAlignment *
         kRegionAlignment;
}

/// How far apart the messages of two sources lie in dispatch's slots on hosts, likewise.
inline std::size_t dispatch_source_stride(std::size_t ticket_bytes, int num_ranks) {
  return ticket_bytes / num_ranks / kRegionAlignment * kRegionAlignment;
}

/// Bytes that one ticket needs to serve every call within `capacity`.
inline std::size_t low_latency_ticket_bytes(const LowLatencyCapacity& capacity, int num_ranks) {
  RowShape shape;
  shape.row_bytes = capacity.row_bytes;
  shape.num_topk = capacity.num_topk;
  shape.topk_weights = true;
  shape.num_side = 1;
  // Scales and several side tensors are aligned one by one: 16 bytes more for each at most.
  shape.side_bytes[0] = capacity.side_bytes + (kMaxSide + 1) * MessageLayout::kAlignment;
  const std::size_t dispatch =
      dispatch_slot_bytes(num_ranks, capacity.max_tokens_per_rank, FarMessage::place(shape).bytes);
  const std::size_t combine = combine_slot_bytes(capacity.max_tokens_per_rank, capacity.num_topk, capacity.row_bytes);
  return align_up(dispatch > combine ? dispatch : combine, kRegionAlignment);
}

/// How a row of combine is cut on GPUs into parts that arrive one by one, each with a flag of its own. Follows from
/// what all ranks agree on.
struct RowParts {
  int count = 1;
  int bytes = 0;  // of a part but the last, a multiple of kUnit

  static constexpr std::size_t kUnit = 1024;

  /// `flags`: that a source has for all its tokens, at least one for each.
  static RowParts cut(std::size_t row_bytes, std::size_t max_tokens, std::size_t flags) {
    const auto parts_of = [&](std::size_t bytes) { return row_bytes > 0 ? (row_bytes + bytes - 1) / bytes : 1; };
    const std::size_t most = flags / max_tokens > 0 ? flags / max_tokens : 1;
    std::size_t bytes = 2 * kUnit;
    if (parts_of(bytes) > most) bytes = align_up((row_bytes + most - 1) / most, kUnit);
    return {static_cast<int>(parts_of(bytes)), static_cast<int>(bytes)};
  }
};

/// Flags of one ticket: one for each part of each token, from each rank that may send rows of it.
inline std::size_t low_latency_flags(const LowLatencyCapacity& capacity, int num_ranks) {
  const std::size_t parts = (capacity.row_bytes + RowParts::kUnit - 1) / RowParts::kUnit;
  constexpr std::size_t kLeast = 4;  // so that smaller rows may be more
  return static_cast<std::size_t>(num_ranks) * capacity.max_tokens_per_rank * (parts > kLeast ? parts : kLeast);
}

}  // namespace deep_ep::plan
