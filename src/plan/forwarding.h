// SPDX-License-Identifier: MIT
// Between nodes: who takes a node's tokens in and passes them on, and how what crosses is cut into chunks. Arithmetic
// only; both ends compute the same from the same call.
//
// What one rank sends another is a **stream** of equal units: tokens (dispatch), requests and rows that answer them
// (combine). Units travel in chunks, each in one slot of the receiver, in any order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/align.h"
#include "plan/output.h"
#include "plan/topology.h"
#include "plan/window.h"

namespace deep_ep::plan {

/// Slots that a rank keeps for each rank of other nodes, and so the chunks that may be under way between the two.
/// The first is for requests alone: they are taken out at once, so rows that nobody takes out yet cannot hold them up.
inline constexpr int kForwardSlots = 8;
inline constexpr int kRequestSlot = 0;

/// What a rank maps beside its window to reach far ranks, in bytes; pages are taken as they are used.
struct FarMemory {
  std::size_t slot_bytes = 0;
  std::size_t mirrors = 0;      // for the control part of each window
  std::size_t slots = 0;        // to receive in, and as many to send from
  std::size_t low_latency = 0;  // to send from
  /// Doorbell and words, announcements and replies: what lies before the regions that GPUs alone use.
  static std::size_t mirror_bytes(const WindowLayout& window) { return window.flags_at; }
  std::size_t total() const { return mirrors + 2 * slots + low_latency; }

  static FarMemory of(const WindowLayout& window, std::size_t forward_slot_bytes) {
    const auto ranks = static_cast<std::size_t>(window.num_ranks);
    FarMemory memory;
    memory.slot_bytes = align_up(forward_slot_bytes, 16);
    memory.mirrors = ranks * mirror_bytes(window);
    memory.slots = ranks * kForwardSlots * memory.slot_bytes;
    memory.low_latency = ranks * static_cast<std::size_t>(window.num_tickets) * window.low_latency_ticket_bytes;
    return memory;
  }
};

/// The rank of `node` that takes in what `src` sends there: the one on the same rail, which is src's place in its own
/// node modulo the size of that one. Ranks that are left out do not count; -1 where nobody is left.
inline int rail(const Topology& topology, int src, int node, const std::vector<char>& left_out) {
  int present = 0;
  const int begin = topology.first_rank_of_node[node], end = topology.first_rank_of_node[node + 1];
  for (int rank = begin; rank < end; ++rank) present += !left_out[rank];
  if (present == 0) return -1;
  int skip = topology.member_of(src) % present;
  for (int rank = begin; rank < end; ++rank)
    if (!left_out[rank] && skip-- == 0) return rank;
  return -1;
}

enum class Stream : std::uint32_t { kTokens = 1, kRequests = 2, kRows = 3 };

/// In front of each chunk.
struct ChunkHead {
  std::uint64_t epoch = 0;
  Stream stream = Stream::kTokens;
  std::uint32_t units = 0;       // in this chunk
  std::uint64_t first_unit = 0;  // of the stream
  std::uint64_t bytes = 0;       // of the chunk, this head included
  // GPUs, each of whose blocks packs a stream of its own:
  std::uint32_t of_streams = 1;  // that the source sends in this operation
  bool last = false;             // of its stream
};

inline constexpr std::size_t kChunkHeadBytes = 64;
static_assert(sizeof(ChunkHead) <= kChunkHeadBytes);

/// How a stream is cut.
struct Chunking {
  std::size_t unit_bytes = 0;
  std::int64_t per_chunk = 1;  // 0: a unit does not fit into a slot

  EP_HOST_DEVICE static Chunking of(std::size_t unit_bytes, std::size_t slot_bytes) {
    return {unit_bytes, static_cast<std::int64_t>((slot_bytes - kChunkHeadBytes) / (unit_bytes > 0 ? unit_bytes : 1))};
  }
  EP_HOST_DEVICE std::int64_t chunk_of(std::int64_t unit) const { return unit / per_chunk; }
  EP_HOST_DEVICE std::int64_t num_chunks(std::int64_t units) const { return (units + per_chunk - 1) / per_chunk; }
  std::int64_t units_in(std::int64_t chunk, std::int64_t units) const {
    return std::min(per_chunk, units - chunk * per_chunk);
  }
  /// Where a unit lies in its chunk.
  EP_HOST_DEVICE std::size_t at(std::int64_t unit) const {
    return kChunkHeadBytes + static_cast<std::size_t>(unit % per_chunk) * unit_bytes;
  }
  EP_HOST_DEVICE std::size_t chunk_bytes(std::int64_t units_in_chunk) const {
    return kChunkHeadBytes + static_cast<std::size_t>(units_in_chunk) * unit_bytes;
  }
};

/// One selection as it crosses: which member of the receiving node took it, in which slot and row there.
struct Selection {
  std::int16_t member = -1;  // -1: not in this node
  std::uint16_t slot = 0;
  std::int32_t row = -1;
};

inline constexpr std::size_t kUnitAlignment = 16;

/// A token on its way to a node: the row once, and where each of the node's ranks wants it.
//   [ row | scales | weights: f32 x topk | selections x topk | arrivals: i32 x topk | token: i32 | side 0 | ... ]
struct TokenUnit {
  std::size_t scales_at = 0;
  std::size_t weights_at = 0;
  std::size_t selections_at = 0;
  std::size_t arrivals_at = 0;  // not for kByRank, whose rows are arrivals
  std::size_t token_at = 0;
  std::size_t side_at[kMaxSide] = {};
  std::size_t bytes = 0;

  static TokenUnit place(const RowShape& shape, OutputLayout layout) {
    const std::size_t topk = static_cast<std::size_t>(shape.num_topk);
    TokenUnit unit;
    std::size_t end = shape.row_bytes;  // a multiple of 16
    unit.scales_at = take(end, 4 * static_cast<std::size_t>(shape.num_scales), 4);
    unit.weights_at = take(end, shape.topk_weights ? 4 * topk : 0, 4);
    unit.selections_at = take(end, sizeof(Selection) * topk, 4);
    unit.arrivals_at = take(end, layout == OutputLayout::kByRank ? 0 : 4 * topk, 4);
    unit.token_at = take(end, 4, 4);
    for (int i = 0; i < shape.num_side; ++i) unit.side_at[i] = take(end, shape.side_bytes[i], 4);
    unit.bytes = align_up(end, kUnitAlignment);
    return unit;
  }
};

/// What a combine asks of a node for one token: its selections there, with their factors where rows are weighed and
/// joined before they cross.
//   [ selections x topk | factors: f32 x topk ]
struct RequestUnit {
  std::size_t factors_at = 0;
  std::size_t bytes = 0;

  static RequestUnit place(int num_topk, bool factors) {
    const std::size_t topk = static_cast<std::size_t>(num_topk);
    RequestUnit unit;
    std::size_t end = sizeof(Selection) * topk;
    unit.factors_at = take(end, factors ? 4 * topk : 0, 4);
    unit.bytes = align_up(end, kUnitAlignment);
    return unit;
  }
};

/// What comes back: a row, and the top-k weights that come home beside it. Rows that keep their order of summation come
/// one by one (`joined` false), else a node's sum for each token, with the weights of all its rows.
//   [ row | weights: f32 x (rows that it may stand for) x (entries of each) ]
struct ReturnUnit {
  std::size_t weights_at = 0;
  std::size_t weights_of_one = 0;  // floats that one of the joined rows brings
  std::size_t bytes = 0;

  static ReturnUnit place(std::size_t row_bytes, int num_topk, bool weights, bool by_rank, bool joined) {
    ReturnUnit unit;
    unit.weights_of_one = !weights ? 0 : by_rank ? static_cast<std::size_t>(num_topk) : 1;
    std::size_t end = row_bytes;
    unit.weights_at = take(end, 4 * unit.weights_of_one * (joined ? static_cast<std::size_t>(num_topk) : 1), 4);
    unit.bytes = align_up(end, kUnitAlignment);
    return unit;
  }
};

}  // namespace deep_ep::plan
