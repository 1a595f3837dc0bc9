// SPDX-License-Identifier: MIT
// Dispatch: the warps that write rows, as they are or quantised.
#pragma once

#include "cuda/dispatch_quantize.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// The rows of a mover warp: tokens first, first + step, ...; a token again for each 32 of its selections, in pieces.
struct Job {
  int token, chunk, piece;
};
struct Jobs {
  const DispatchParams& p;
  int first, step;
  __device__ Job begin() const { return {first, 0, 0}; }
  __device__ bool has(const Job& job) const { return job.token < p.num_tokens; }
  // Step by step: a division for each job costs more than moving a short row.
  __device__ void advance(Job& job) const {
    if (++job.piece < p.pieces) return;
    job.piece = 0;
    skip_pieces(job);
  }
  __device__ void skip_pieces(Job& job) const {
    if (++job.chunk < p.chunks) return;
    job.chunk = 0;
    job.token += step;
  }
};

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

__device__ Jobs jobs_of(const DispatchParams& p, int warp) {
  const int block = static_cast<int>(blockIdx.x);
  const bool far = block < p.roles.far;
  const int blocks = far ? p.roles.far : p.roles.moving - p.roles.far, in_role = far ? block : block - p.roles.far;
  const int first = in_role < blocks ? in_role + warp * blocks : p.num_tokens;
  return {p, first, blocks * p.mover_warps};
}

// A mover warp's targets in the order of its jobs: lists in shared memory, for as many tokens at once as the warp has
// lanes for their selections. The routes of the next tokens are read while the rows of these move. All lanes.
class Targets {
 public:
  // `entries`: room for 32.
  __device__ Targets(const DispatchParams& p, const Destination* to, const Jobs& jobs, Target* entries, int lane)
      : p_(p),
        to_(to),
        jobs_(jobs),
        entries_(entries),
        lane_(lane),
        lanes_(min(p.num_topk, 32)),
        tokens_(p.chunks > 1 ? 1 : 32 / lanes_),
        listed_(tokens_),
        ahead_(jobs.begin()) {
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
  __device__ int token_here() const { return lane_ / lanes_; }
  __device__ int token() const { return ahead_.token + token_here() * jobs_.step; }
  __device__ unsigned lanes_of(int token_here) const {
    return (lanes_ == 32 ? kAllLanes : (1u << lanes_) - 1) << (token_here * lanes_);
  }
  __device__ void read_routes() {
    route_ = {-1, 0, 0};
    if (token_here() < tokens_) route_ = read_route(p_, token(), ahead_.chunk * 32 + lane_ % lanes_);
  }
  __device__ void list_tokens() {
    const Target target = resolve();
    given_ = __ballot_sync(kAllLanes, target.row != nullptr);
    __syncwarp();  // the last tokens' have been read
    if (target.row != nullptr)
      entries_[token_here() * lanes_ + __popc(given_ & lanes_of(token_here()) & ((1u << lane_) - 1))] = target;
    __syncwarp();
    if (p_.chunks > 1) {
      jobs_.skip_pieces(ahead_);
    } else {
      ahead_.token += tokens_ * jobs_.step;
    }
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
            there.at.scale_column_stride};
  }

  const DispatchParams& p_;
  const Destination* to_;
  const Jobs jobs_;
  Target* const entries_;
  const int lane_, lanes_, tokens_;  // of a token; at once
  int listed_;                       // the present one, among those
  Job ahead_;
  Route route_;
  unsigned given_ = 0;
  const Target* list_ = nullptr;
  int size_ = 0;
};

// How the caller's rows are cut.
struct Cut {
  std::int64_t row_bytes;
  int piece_bytes;
  __device__ int bytes(int piece) const {
    const std::int64_t left = row_bytes - std::int64_t{piece} * piece_bytes;
    return left < piece_bytes ? static_cast<int>(left) : piece_bytes;
  }
};

#if EP_BULK_COPY
// The pieces of a mover warp's jobs on their way in: a ring of stages in shared memory, each filled by one bulk load.
template <int kStages>
class Intake {
 public:
  __device__ Intake(const DispatchParams& p, const Jobs& jobs, const Cut& cut, const Stages& stages, int lane)
      : p_(p), jobs_(jobs), cut_(cut), stages_(stages), lane_(lane), ahead_(jobs.begin()) {}
  // The next job's piece, once a stage is free for it.
  __device__ void load() {
    if (!jobs_.has(ahead_)) return;
    if (lane_ == 0)
      ptx::bulk_load(stages_.ring + filling_.at * p_.stage_bytes,
                     p_.x + ahead_.token * cut_.row_bytes + std::int64_t{ahead_.piece} * cut_.piece_bytes,
                     static_cast<std::uint32_t>(cut_.bytes(ahead_.piece)), stages_.full + filling_.at);
    jobs_.advance(ahead_);
    filling_.advance();
  }
  // The oldest piece, once it is there.
  __device__ const std::byte* await(const Job&) const {
    ptx::barrier_wait(stages_.full + emptying_.at, emptying_.parity);
    return stages_.ring + emptying_.at * p_.stage_bytes;
  }
  __device__ void drop() { emptying_.advance(); }

 private:
  const DispatchParams& p_;
  const Jobs jobs_;
  const Cut cut_;
  const Stages stages_;
  const int lane_;
  Job ahead_;
  Ring<kStages> filling_, emptying_;
};
#else
// Without bulk copies pieces are read where they lie.
template <int kStages>
class Intake {
 public:
  __device__ Intake(const DispatchParams& p, const Jobs&, const Cut& cut, const Stages&, int) : p_(p), cut_(cut) {}
  __device__ void load() {}
  __device__ const std::byte* await(const Job& job) const {
    return p_.x + job.token * cut_.row_bytes + std::int64_t{job.piece} * cut_.piece_bytes;
  }
  __device__ void drop() {}

 private:
  const DispatchParams& p_;
  const Cut cut_;
};
#endif

// Movers of rows as they are.
__device__ void move_rows(const DispatchParams& p, const Destination* to, const Stages& stages, int warp, int lane) {
  const Jobs jobs = jobs_of(p, warp);
  const Cut cut{static_cast<std::int64_t>(p.shape.row_bytes), p.piece_bytes};
  Intake<kMoveStages> intake(p, jobs, cut, stages, lane);
#if EP_BULK_COPY
  // Each lane with a destination empties a stage by one bulk store. A stage is filled again once the stores of the job
  // before the last have read it.
  for (int i = 0; i < kMoveStages - 1; ++i) intake.load();
  Targets targets(p, to, jobs, stages.targets, lane);
  std::byte* dst = nullptr;
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job)) {
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
    __syncwarp();
    intake.load();
  }
  ptx::bulk_wait_all();
#else
  constexpr int kAhead = 4;
  Targets targets(p, to, jobs, stages.targets, lane);
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job)) {
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
__device__ void send_codes(const MyBatch& batch, const Stages& stages, const Targets& targets, int first, int bytes,
                           int lane) {
#if EP_BULK_COPY
  ptx::bulk_wait_read<0>();  // the stores of the batch before have read theirs
  __syncwarp();
  batch.stage(stages.codes + channel_of_lane(lane));
  ptx::fence_shared_for_bulk();
  __syncwarp();
  if (lane < targets.size())
    ptx::bulk_store(targets.list()[lane].row + first, stages.codes, static_cast<std::uint32_t>(bytes));
  ptx::bulk_commit();
#else
  for (int i = 0; i < targets.size(); ++i)
    batch.store(targets.list()[i].row + first + channel_of_lane(lane), bytes, lane);
#endif
}

// Mover warps that quantise: a piece is one batch, which a warp's registers hold while its stage is filled again.
template <class Number>
__device__ void quantize_rows(const DispatchParams& p, const Destination* to, const Stages& stages, int warp,
                              int lane) {
  using MyBatch = Batch<Number, kPassesOf<Number>>;
  const Jobs jobs = jobs_of(p, warp);
  Intake<kQuantizeStages> intake(p, jobs, {p.hidden * Number::kBytes, p.piece_bytes * Number::kBytes}, stages, lane);
  for (int i = 0; i < kQuantizeStages; ++i) intake.load();
  Targets targets(p, to, jobs, stages.targets, lane);
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job)) {
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
    const ScaleWord scale = scale_word(p, scaling.scale, first / kPassChannels + pass,
                                       MyBatch::answers(lane) && pass * kPassChannels < left, lane);
    batch.encode(scaling.factor);
    send_codes(batch, stages, targets, first, left, lane);
    for (int i = 0; i < targets.size(); ++i) {
      const Target& target = targets.list()[i];
      if (scale.mine) target.scales[scale.at * target.scale_stride] = scale.word;
    }
  }
#if EP_BULK_COPY
  ptx::bulk_wait_all();
#endif
}

}  // namespace
}  // namespace deep_ep::cuda
