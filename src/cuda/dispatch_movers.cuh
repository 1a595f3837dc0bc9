// SPDX-License-Identifier: MIT
// Dispatch: the warps that write rows, as they are or quantised.
#pragma once

#include "cuda/dispatch_order.cuh"
#include "cuda/dispatch_quantize.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// Position in a ring, and how often it went round.
template <int kLength>
struct Ring {
  int at = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++at < kLength) return;
    at = 0;
    parity ^= 1;
  }
};

// A mover warp's part of the shared memory.
struct Stages {
  Target* targets;
  std::byte* ring;
  std::uint64_t* full;  // a barrier for each stage
  std::byte* codes;     // of one batch on its way out; quantising warps only
};

// A mover warp's targets in the order of its jobs: lists in shared memory, for a list of tokens at once. The routes of
// the next list are read while the rows of this one move. All lanes.
template <class Order>
class Targets {
 public:
  // `entries`: room for 32.
  __device__ Targets(const DispatchParams& p, const Destination* to, const Order& order, Target* entries, int lane)
      : p_(p),
        to_(to),
        order_(order),
        entries_(entries),
        lane_(lane),
        lanes_(min(p.num_topk, 32)),
        most_(tokens_at_once(p)),
        tokens_(most_),
        listed_(most_),
        ahead_(order.begin()) {
    read_routes();
  }

  // The next token's, or those of its next 32 selections.
  __device__ void next() {
    if (++listed_ >= tokens_) {
      list_tokens();
      listed_ = 0;
    }
    list_ = entries_ + listed_ * lanes_;
    size_ = __popc(given_ & lanes_of(listed_));
  }
  __device__ const Target* list() const { return list_; }
  __device__ int size() const { return size_; }

 private:
  __device__ int token_here() const { return p_.lanes_of_token.quotient(lane_); }
  __device__ int token() const { return order_.token(ahead_, token_here()); }
  __device__ unsigned lanes_of(int token_here) const {
    return (lanes_ == 32 ? kAllLanes : (1u << lanes_) - 1) << (token_here * lanes_);
  }
  __device__ void read_routes() {
    route_ = {-1, 0, 0};
    if (token_here() < order_.list_size(ahead_, most_))
      route_ = read_route(p_, token(), ahead_.chunk * 32 + lane_ - token_here() * lanes_);
  }
  __device__ void list_tokens() {
    const Target target = resolve();
    tokens_ = order_.list_size(ahead_, most_);
    given_ = __ballot_sync(kAllLanes, target.row != nullptr);
    __syncwarp();  // the last tokens' have been read
    if (target.row != nullptr)
      entries_[token_here() * lanes_ + __popc(given_ & lanes_of(token_here()) & ((1u << lane_) - 1))] = target;
    __syncwarp();
    order_.advance_list(ahead_, most_);
    read_routes();
  }
  __device__ Target resolve() const {
    int rank = route_.rank;
    if (rank >= 0 && !(to_[rank].block != nullptr && to_[rank].writes_here)) rank = -1;
    if (p_.layout == OutputLayout::kByRank && !first_to_rank(p_, rank, token(), token_here(), ahead_.chunk, lane_))
      rank = -1;
    if (rank < 0) return {};
    const Destination& there = to_[rank];
    const std::int64_t row = final_row(p_, there, route_);
    return {there.block + there.at.x_at + row * static_cast<std::int64_t>(p_.shape.row_bytes),
            reinterpret_cast<std::int32_t*>(there.block + there.at.scales_at) + there.at.first_scale(row),
            static_cast<std::uint32_t>(there.at.scale_column_stride)};
  }

  const DispatchParams& p_;
  const Destination* to_;
  const Order& order_;
  Target* const entries_;
  const int lane_, lanes_, most_;  // of a token; tokens at once
  int tokens_, listed_;            // of the list; the present one, among those
  typename Order::Job ahead_;
  Route route_;
  unsigned given_ = 0;
  const Target* list_ = nullptr;
  int size_ = 0;
};

// How the caller's rows are cut.
struct Cut {
  std::int64_t row_bytes;
  int piece_bytes, pieces;
  __device__ int bytes(int piece) const {
    return piece + 1 < pieces ? piece_bytes : static_cast<int>(row_bytes - std::int64_t{piece} * piece_bytes);
  }
  __device__ std::int64_t at(int token, int piece) const {
    return token * row_bytes + std::int64_t{piece} * piece_bytes;
  }
};

#if EP_BULK_COPY
// The pieces of a mover warp's jobs on their way in: a ring of stages in shared memory, each filled by one bulk load.
template <class Order, int kStages>
class Intake {
 public:
  __device__ Intake(const DispatchParams& p, const Order& order, const Cut& cut, const Stages& stages, int lane)
      : p_(p), order_(order), cut_(cut), stages_(stages), lane_(lane), ahead_(order.begin()) {}
  // The next job's piece, once a stage is free for it; false where there is no such job, or none known yet.
  __device__ bool load() {
    if (!order_.has(ahead_)) return false;
    if (lane_ == 0)
      ptx::bulk_load(stages_.ring + filling_.at * p_.stage_bytes, p_.x + cut_.at(order_.token(ahead_), ahead_.piece),
                     static_cast<std::uint32_t>(cut_.bytes(ahead_.piece)), stages_.full + filling_.at);
    order_.advance(ahead_);
    filling_.advance();
    return true;
  }
  // The oldest piece, once it is there.
  __device__ const std::byte* await(const typename Order::Job&) const {
    ptx::barrier_wait(stages_.full + emptying_.at, emptying_.parity);
    return stages_.ring + emptying_.at * p_.stage_bytes;
  }
  __device__ void drop() { emptying_.advance(); }

 private:
  const DispatchParams& p_;
  const Order& order_;
  const Cut cut_;
  const Stages stages_;
  const int lane_;
  typename Order::Job ahead_;
  Ring<kStages> filling_, emptying_;
};
#else
// Without bulk copies pieces are read where they lie.
template <class Order, int kStages>
class Intake {
 public:
  __device__ Intake(const DispatchParams& p, const Order& order, const Cut& cut, const Stages&, int)
      : p_(p), order_(order), cut_(cut) {}
  __device__ bool load() { return false; }
  __device__ const std::byte* await(const typename Order::Job& job) const {
    return p_.x + cut_.at(order_.token(job), job.piece);
  }
  __device__ void drop() {}

 private:
  const DispatchParams& p_;
  const Order& order_;
  const Cut cut_;
};
#endif

// Movers of rows as they are.
__device__ void move_rows(const DispatchParams& p, const Destination* to, const Stages& stages, int warp, int lane) {
  Tickets order(p, place_of(p, warp), lane);
  const Cut cut{static_cast<std::int64_t>(p.shape.row_bytes), p.piece_bytes, p.pieces};
  Intake<Tickets, kMoveStages> intake(p, order, cut, stages, lane);
#if EP_BULK_COPY
  // Each lane with a destination empties a stage by one bulk store. A stage is filled again once the stores of the job
  // before the last have read it.
  int free = kMoveStages - 1;
  while (free > 0 && intake.load()) --free;
  Targets targets(p, to, order, stages.targets, lane);
  std::byte* dst = nullptr;
  for (Tickets::Job job = order.begin(); order.reach(job); order.advance(job)) {
    while (free > 0 && intake.load()) --free;  // of a list that is known since it was reached for
    if (job.piece == 0) {
      targets.next();
      dst = lane < targets.size() ? targets.list()[lane].row : nullptr;
    }
    const std::byte* const piece = intake.await(job);
    if (dst != nullptr)
      ptx::bulk_store(dst + std::int64_t{job.piece} * p.piece_bytes, piece,
                      static_cast<std::uint32_t>(cut.bytes(job.piece)));
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    intake.drop();
    ++free;
    __syncwarp();
    while (free > 0 && intake.load()) --free;
  }
  ptx::bulk_wait_all();
#else
  constexpr int kAhead = 4;
  Targets targets(p, to, order, stages.targets, lane);
  for (Tickets::Job job = order.begin(); order.reach(job); order.advance(job)) {
    if (job.piece == 0) targets.next();
    const std::byte* const src = intake.await(job);
    const std::int64_t piece_at = std::int64_t{job.piece} * p.piece_bytes;
    const int vectors = cut.bytes(job.piece) / 16;
    for (int first = lane; first - lane < vectors; first += 32 * kAhead) {
      uint4 v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + 32 * i < vectors) v[i] = ptx::load_streaming(src + 16 * (first + 32 * i));
      for (int t = 0; t < targets.size(); ++t) {
        std::byte* const at = targets.list()[t].row + piece_at;
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + 32 * i < vectors) ptx::store_streaming(at + 16 * (first + 32 * i), v[i]);
      }
    }
  }
#endif
}

// The codes of a batch leave for all targets. Through shared memory, where a bulk store each takes them: a warp's own
// stores would pass each byte once per target through the pipe by which it also loads.
template <class MyBatch>
__device__ void send_codes(const MyBatch& batch, float factor, const Stages& stages, const Targets<Shares>& targets,
                           const Channels& channels, int lane) {
#if EP_BULK_COPY
  ptx::bulk_wait_read<0>();  // the stores of the batch before have read theirs
  __syncwarp();
  batch.encode(factor, [&](int pass, const Codes& codes) {
    codes.stage(stages.codes + pass * kPassChannels + channel_of_lane(lane));
  });
  ptx::fence_shared_for_bulk();
  __syncwarp();
  if (lane < targets.size())
    ptx::bulk_store(targets.list()[lane].row + channels.first, stages.codes,
                    static_cast<std::uint32_t>(channels.count));
  ptx::bulk_commit();
#else
  batch.encode(factor, [&](int pass, const Codes& codes) {
    if (!MyBatch::in_row(pass, channels.count, lane)) return;
    const uint4 whole = codes.whole();
    for (int i = 0; i < targets.size(); ++i)
      ptx::store_streaming(targets.list()[i].row + channels.first + pass * kPassChannels + channel_of_lane(lane),
                           whole);
  });
#endif
}

// Mover warps that quantise: a piece is one batch, which a warp's registers hold while its stage is filled again.
template <class Number>
__device__ void quantize_rows(const DispatchParams& p, const Destination* to, const Stages& stages, int warp,
                              int lane) {
  using MyBatch = Batch<Number, kPassesOf<Number>>;
  const Shares order(p, place_of(p, warp));
  Intake<Shares, kQuantizeStages> intake(
      p, order, {p.hidden * Number::kBytes, p.piece_bytes * Number::kBytes, p.pieces}, stages, lane);
  for (int i = 0; i < kQuantizeStages; ++i) intake.load();
  Targets targets(p, to, order, stages.targets, lane);
  for (Shares::Job job = order.begin(); order.reach(job); order.advance(job)) {
    if (job.piece == 0) targets.next();
    const int first = job.piece * p.piece_bytes, left = min(static_cast<int>(p.hidden) - first, p.piece_bytes);
    const std::byte* const piece = intake.await(job);
    MyBatch batch;
    batch.load(piece, left, lane);
    const std::uint32_t peak = batch.peak(lane);
    const bool quick = __all_sync(kAllLanes, peak < kLargestQuick);
    if (!quick) write_any_batch<Number>(p, targets.list(), targets.size(), {piece, first, p.piece_bytes}, lane);
    intake.drop();
    __syncwarp();  // all lanes have read the stage
    intake.load();
    if (!quick) continue;
    const plan::Fp8Scaling scaling = quick_scaling(static_cast<std::int32_t>(peak), p.scale_kind);
    const int pass = MyBatch::pass_of_lane(lane);
    const ScaleWord scale = scale_word(p.scale_kind, scaling.scale, {first, pass, left, MyBatch::answers(lane)}, lane);
    send_codes(batch, scaling.factor, stages, targets, {piece, first, left}, lane);
    if (!scale.mine) continue;
#pragma unroll 2
    for (int i = 0; i < targets.size(); ++i) targets.list()[i].store_scale(scale);
  }
#if EP_BULK_COPY
  ptx::bulk_wait_all();
#endif
}

}  // namespace
}  // namespace deep_ep::cuda
