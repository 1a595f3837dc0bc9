// SPDX-License-Identifier: MIT
// Rows of combine that lie in ordinary memory, staged piece by piece: a piece is small enough to be read from the
// caches by the homes while the next is copied, and the same few megabytes serve all of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "backend.h"

namespace deep_ep::host {

/// The rows of kPieces pieces, in turn. A piece holds, for each home, the rows of as many of its tokens, in order
/// (token, selection). All ranks compute the same.
struct StagingRing {
  static constexpr int kPieces = 3;
  static constexpr std::size_t kPieceBytes = std::size_t{3} << 20;
  static constexpr std::int64_t kFewestTokens = 8;  // fewer are not worth the meeting of all ranks

  std::int64_t tokens = 0;         // of each home in a piece
  std::size_t rows_per_token = 0;  // at most
  std::size_t row_bytes = 0;
  int num_ranks = 0;

  static StagingRing of(const CombineCall& call, int num_ranks) {
    const Handle& handle = *call.in.handle;
    StagingRing ring;
    ring.num_ranks = num_ranks;
    ring.row_bytes = call.row_bytes;
    ring.rows_per_token = handle.layout == OutputLayout::kByRank ? 1 : static_cast<std::size_t>(handle.num_topk);
    const std::size_t of_one = ring.rows_per_token * ring.row_bytes * static_cast<std::size_t>(num_ranks);
    ring.tokens = static_cast<std::int64_t>(kPieceBytes / std::max<std::size_t>(of_one, 1));
    return ring;
  }

  bool worthwhile() const { return tokens >= kFewestTokens; }
  std::size_t rows_of_home() const { return rows_per_token * static_cast<std::size_t>(tokens); }  // in a piece
  std::size_t bytes() const { return kPieces * num_ranks * rows_of_home() * row_bytes; }
  /// Of a home's row in a piece, by its number there.
  std::size_t place(std::int64_t piece, int home, std::size_t row) const {
    const std::size_t homes_before = static_cast<std::size_t>(piece % kPieces) * num_ranks + home;
    return (homes_before * rows_of_home() + row) * row_bytes;
  }
};

}  // namespace deep_ep::host
