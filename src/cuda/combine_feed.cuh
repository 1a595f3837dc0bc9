// SPDX-License-Identifier: MIT
// Combine: how rows come to a warp that adds them. Rows are cut into pieces. A warp takes its tokens in turn, of each
// token piece after piece, and of each piece one term after the other. Where nodes are joined by a network, the
// requests of far homes are tokens too.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kRingBytes = 12288;  // of one warp, at most

struct Source {
  const std::byte* x;  // null: takes no part
  const float* weights;
  std::uint64_t* finished;  // the word there by which it hears that we read no more; null: takes no part, or far
};

/// Which tokens a warp sums, and how their rows are cut: all pieces but the last are whole.
struct Share {
  int first, step, end;
  std::int64_t row_bytes;
  int piece_bytes, pieces;

  __device__ Share(int first_token, int every, int past, std::int64_t of_row, int of_piece)
      : first(first_token),
        step(every),
        end(past),
        row_bytes(of_row),
        piece_bytes(of_piece),
        pieces(static_cast<int>((of_row + of_piece - 1) / of_piece)) {}
  __device__ std::int64_t piece_at(int piece) const { return std::int64_t{piece} * piece_bytes; }
  __device__ int bytes(int piece) const {
    return piece + 1 < pieces ? piece_bytes : static_cast<int>(row_bytes - piece_at(piece));
  }
};

/// The terms of one token as a warp holds them, 32 at a time: lane i has number base + i.
struct Terms {
  int token, count, base;
  Term term;

  __device__ float weight_of(int number) const { return __shfl_sync(kAllLanes, term.weight, number % 32); }
  __device__ std::int32_t closes_of(int number) const { return __shfl_sync(kAllLanes, term.closes, number % 32); }
};

/// The terms of all tokens, in device memory: as in CombineParams, where they cost no registers.
struct TermTable {
  const Term* terms;  // [tokens, num_topk]
  const std::int32_t* num_terms;
  int num_topk;
};

/// Reads terms of this warp's tokens. `Table`: CombineParams or TermTable.
template <class Table>
struct TermReader {
  const Table& table;
  const Source* sources;
  const Share& share;
  int lane;

  /// Looks at nothing that it reads: whoever reads ahead must not wait here. Terms behind the last mean nothing.
  __device__ Terms read(int token, int base = 0) const {
    Terms terms{token, 0, base, Term{}};
    if (token >= share.end) return terms;
    terms.count = table.num_terms[token];
    if (base + lane < table.num_topk) terms.term = table.terms[std::int64_t{token} * table.num_topk + base + lane];
    return terms;
  }
  /// Makes `terms` hold that one; true if that had to be read. Nearly all tokens have no more than a warp has lanes.
  __device__ bool reach(Terms& terms, int number) const {
    if (terms.count <= 32 || number / 32 * 32 == terms.base) return false;
    terms = read(terms.token, number / 32 * 32);
    return true;
  }
  /// Of the lane's term.
  __device__ const std::byte* row(const Terms& terms) const {
    if (terms.base + lane >= terms.count) return nullptr;
    return sources[terms.term.rank].x + terms.term.row * share.row_bytes;
  }
  /// Of the term with that number, `mine` being each lane's.
  __device__ static const std::byte* row_of(const std::byte* mine, int number) {
    return reinterpret_cast<const std::byte*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), number % 32));
  }
};

/// A warp's ring of stages in shared memory, which lasts for as many feeds as there are. A feed takes it over, so that
/// it lies in registers, and gives it back as it is then.
struct Ring {
  std::byte* stages;
  std::uint64_t* full;  // barriers, one for each stage
  int filling = 0, emptying = 0;
  std::uint32_t parity = 0;  // of the stage that is emptied next
};

#if EP_BULK_COPY
/// The ring is filled by bulk loads, ahead of the sums by as many as there are stages; the terms of the token after the
/// one that is loaded are read meanwhile.
template <int kVectors, class Table = CombineParams>
class Feed {
 public:
  static constexpr int kPiece = kVectors * 32 * 16;
  static constexpr int kStages = kRingBytes / kPiece;
  static constexpr std::size_t kBytes = std::size_t{kStages} * kPiece;  // of one warp
  static constexpr int kBarriers = kStages;

  __device__ Feed(const TermReader<Table>& reader, const Ring& ring)
      : reader_(reader),
        ring_(ring),
        ahead_(reader.read(reader.share.first)),
        next_(reader.read(reader.share.first + reader.share.step)) {
    skip_empty();
    for (int i = 0; i < kStages; ++i) load();
  }
  /// The lane's vectors of the oldest load, once it is there. What lies beyond a row's end means nothing.
  __device__ const uint4* await(const Terms&, int, int) const {
    ptx::barrier_wait(ring_.full + ring_.emptying, ring_.parity);
    return reinterpret_cast<const uint4*>(ring_.stages + ring_.emptying * kPiece) + reader_.lane;
  }
  __device__ static uint4 read(const uint4* vectors, int i, int) { return vectors[32 * i]; }
  __device__ const Ring& ring() const { return ring_; }
  /// All lanes have read it: its stage is filled again.
  __device__ void release() {
    if (++ring_.emptying == kStages) ring_.emptying = 0, ring_.parity ^= 1;
    __syncwarp();
    load();
  }

 private:
  __device__ void load() {
    if (ahead_.token >= reader_.share.end) return;
    if (reader_.reach(ahead_, index_)) row_ = reader_.row(ahead_);
    const std::byte* const row = TermReader<Table>::row_of(row_, index_);
    if (reader_.lane == 0)
      ptx::bulk_load(ring_.stages + ring_.filling * kPiece, row + reader_.share.piece_at(piece_),
                     static_cast<std::uint32_t>(reader_.share.bytes(piece_)), ring_.full + ring_.filling);
    if (++ring_.filling == kStages) ring_.filling = 0;
    if (++index_ < ahead_.count) return;
    index_ = 0;
    if (++piece_ < reader_.share.pieces) return;
    piece_ = 0;
    next_token();
    skip_empty();
  }
  __device__ void next_token() {
    ahead_ = next_;
    next_ = reader_.read(ahead_.token + reader_.share.step);
  }
  __device__ void skip_empty() {
    while (ahead_.count == 0 && ahead_.token < reader_.share.end) next_token();
    row_ = reader_.row(ahead_);
  }

  const TermReader<Table>& reader_;
  Ring ring_;
  Terms ahead_, next_;
  const std::byte* row_ = nullptr;  // of the lane's term in ahead_
  int piece_ = 0, index_ = 0;       // of the next load
};
#else
/// Without bulk copies rows are read where they lie.
template <int kVectors, class Table = CombineParams>
class Feed {
 public:
  static constexpr int kPiece = kVectors * 32 * 16;
  static constexpr std::size_t kBytes = 0;
  static constexpr int kBarriers = 1;

  __device__ Feed(const TermReader<Table>& reader, const Ring& ring) : reader_(reader), ring_(ring) {}
  __device__ const Ring& ring() const { return ring_; }
  __device__ const uint4* await(const Terms& terms, int number, int piece) const {
    const std::byte* const row = TermReader<Table>::row_of(reader_.row(terms), number);
    return reinterpret_cast<const uint4*>(row + reader_.share.piece_at(piece)) + reader_.lane;
  }
  __device__ uint4 read(const uint4* vectors, int i, int bytes) const {
    return (32 * i + reader_.lane) * 16 < bytes ? vectors[32 * i] : uint4{};
  }
  __device__ void release() {}

 private:
  const TermReader<Table>& reader_;
  const Ring ring_;
};
#endif

}  // namespace
}  // namespace deep_ep::cuda
