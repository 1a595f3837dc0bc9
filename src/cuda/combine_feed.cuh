// SPDX-License-Identifier: MIT
// Combine: how rows come to a warp that adds them. Rows are cut into pieces. A warp takes its tokens in turn, of each
// token piece after piece, and of each piece one term after the other.
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
};

/// Which tokens a warp sums, and how their rows are cut: all pieces but the last are whole.
struct Share {
  int first, step, end;
  std::int64_t row_bytes;
  int piece_bytes, pieces;

  __device__ Share(const CombineParams& p, std::int64_t of_row, int of_piece, int warp)
      : first(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x)),
        step(static_cast<int>(gridDim.x) * kWarps),
        end(p.num_tokens),
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

/// Reads terms of this warp's tokens.
struct TermReader {
  const CombineParams& p;
  const Source* sources;
  const Share& share;
  int lane;

  /// Looks at nothing that it reads: whoever reads ahead must not wait here. Terms behind the last mean nothing.
  __device__ Terms read(int token, int base = 0) const {
    Terms terms{token, 0, base, Term{}};
    if (token >= share.end) return terms;
    terms.count = p.num_terms[token];
    if (base + lane < p.num_topk) terms.term = p.terms[std::int64_t{token} * p.num_topk + base + lane];
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

#if EP_BULK_COPY
/// A warp's ring of stages in shared memory. It is filled by bulk loads, ahead of the sums by as many as there are
/// stages; the terms of the token after the one that is loaded are read meanwhile.
template <int kVectors>
class Feed {
 public:
  static constexpr int kPiece = kVectors * 32 * 16;
  static constexpr int kStages = kRingBytes / kPiece;
  static constexpr std::size_t kBytes = std::size_t{kStages} * kPiece;  // of one warp
  static constexpr int kBarriers = kStages;

  __device__ Feed(const TermReader& reader, std::byte* ring, std::uint64_t* full)
      : reader_(reader),
        ring_(ring),
        full_(full),
        ahead_(reader.read(reader.share.first)),
        next_(reader.read(reader.share.first + reader.share.step)) {
    skip_empty();
    for (int i = 0; i < kStages; ++i) load();
  }
  /// The lane's vectors of the oldest load, once it is there. What lies beyond a row's end means nothing.
  __device__ const uint4* await(const Terms&, int, int) const {
    ptx::barrier_wait(full_ + emptying_, parity_);
    return reinterpret_cast<const uint4*>(ring_ + emptying_ * kPiece) + reader_.lane;
  }
  __device__ static uint4 read(const uint4* vectors, int i, int) { return vectors[32 * i]; }
  /// All lanes have read it: its stage is filled again.
  __device__ void release() {
    if (++emptying_ == kStages) emptying_ = 0, parity_ ^= 1;
    __syncwarp();
    load();
  }

 private:
  __device__ void load() {
    if (ahead_.token >= reader_.share.end) return;
    if (reader_.reach(ahead_, index_)) row_ = reader_.row(ahead_);
    const std::byte* const row = TermReader::row_of(row_, index_);
    if (reader_.lane == 0)
      ptx::bulk_load(ring_ + filling_ * kPiece, row + reader_.share.piece_at(piece_),
                     static_cast<std::uint32_t>(reader_.share.bytes(piece_)), full_ + filling_);
    if (++filling_ == kStages) filling_ = 0;
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

  const TermReader& reader_;
  std::byte* const ring_;
  std::uint64_t* const full_;
  Terms ahead_, next_;
  const std::byte* row_ = nullptr;  // of the lane's term in ahead_
  int piece_ = 0, index_ = 0;       // of the next load
  int filling_ = 0, emptying_ = 0;
  std::uint32_t parity_ = 0;
};
#else
/// Without bulk copies rows are read where they lie.
template <int kVectors>
class Feed {
 public:
  static constexpr int kPiece = kVectors * 32 * 16;
  static constexpr std::size_t kBytes = 0;
  static constexpr int kBarriers = 1;

  __device__ Feed(const TermReader& reader, std::byte*, std::uint64_t*) : reader_(reader) {}
  __device__ const uint4* await(const Terms& terms, int number, int piece) const {
    const std::byte* const row = TermReader::row_of(reader_.row(terms), number);
    return reinterpret_cast<const uint4*>(row + reader_.share.piece_at(piece)) + reader_.lane;
  }
  __device__ uint4 read(const uint4* vectors, int i, int bytes) const {
    return (32 * i + reader_.lane) * 16 < bytes ? vectors[32 * i] : uint4{};
  }
  __device__ void release() {}

 private:
  const TermReader& reader_;
};
#endif

}  // namespace
}  // namespace deep_ep::cuda
