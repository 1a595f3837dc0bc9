// SPDX-License-Identifier: MIT
// Dispatch: the warps that write rows, as they are or quantised.
#pragma once

#include "cuda/dispatch_routes.cuh"
#include "cuda/quantize.cuh"

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

__device__ Jobs jobs_of(const DispatchParams& p, int warp) {
  const int block = static_cast<int>(blockIdx.x);
  const bool far = block < p.roles.far;
  const int blocks = far ? p.roles.far : p.roles.moving - p.roles.far, in_role = far ? block : block - p.roles.far;
  const int first = in_role < blocks ? in_role + warp * blocks : p.num_tokens;
  return {p, first, blocks * p.mover_warps};
}

__device__ int bytes_of_piece(const DispatchParams& p, int piece) {
  const std::int64_t left = static_cast<std::int64_t>(p.shape.row_bytes) - std::int64_t{piece} * p.piece_bytes;
  return left < p.piece_bytes ? static_cast<int>(left) : p.piece_bytes;
}

// Where a lane's selection is written by this block's movers.
struct Target {
  std::byte* row;        // null: nowhere
  std::int32_t* scales;  // of the row; quantised rows only
  std::int64_t scale_stride;
};

// A mover warp's targets in the order of its jobs, one per lane for each token and chunk. The routes of one are read
// while the rows of another move.
class Targets {
 public:
  __device__ Targets(const DispatchParams& p, const Destination* to, const Jobs& jobs, int lane)
      : p_(p), to_(to), jobs_(jobs), lane_(lane), at_(jobs.begin()), route_(read_route(p, at_.token, 0, lane)) {}

  __device__ Target next() {
    const Target now = resolve();
    jobs_.skip_pieces(at_);
    route_ = read_route(p_, at_.token, at_.chunk, lane_);
    return now;
  }

 private:
  __device__ Target resolve() const {
    int rank = route_.rank;
    if (rank >= 0 && !(to_[rank].block != nullptr && to_[rank].writes_here)) rank = -1;
    if (p_.layout == OutputLayout::kByRank && !first_to_rank(p_, rank, at_.token, 0, at_.chunk, lane_)) rank = -1;
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
  const int lane_;
  Job at_;
  Route route_;
};

// The targets of one token, one after the other in shared memory, where they cost no registers. All lanes.
class TargetList {
 public:
  __device__ explicit TargetList(Target* entries) : entries_(entries) {}
  __device__ void set(const Target& target, int lane) {
    const unsigned given = __ballot_sync(kAllLanes, target.row != nullptr);
    __syncwarp();  // the last token's have been read
    if (target.row != nullptr) entries_[__popc(given & ((1u << lane) - 1))] = target;
    count_ = __popc(given);
    __syncwarp();
  }
  __device__ int size() const { return count_; }
  __device__ const Target& operator[](int i) const { return entries_[i]; }

 private:
  Target* const entries_;
  int count_ = 0;
};

template <typename T>
__device__ T* of_lane(T* mine, int from) {
  return reinterpret_cast<T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), from));
}

// Movers of rows as they are.
__device__ void move_rows(const DispatchParams& p, const Destination* to, std::byte* stages, std::uint64_t* barriers,
                          int warp, int lane) {
  const Jobs jobs = jobs_of(p, warp);
#if EP_BULK_COPY
  // A ring of stages: one bulk load fills a stage, each lane with a destination empties it by one bulk store. A stage
  // is filled again once the stores of the job before the last have read it.
  std::byte* const ring = stages + std::int64_t{warp} * kStages * p.stage_bytes;
  std::uint64_t* const full = barriers + warp * kStages;
  Job ahead = jobs.begin();
  Ring<kStages> filling, emptying;
  const auto load = [&] {
    if (!jobs.has(ahead)) return;
    if (lane == 0)
      ptx::bulk_load(
          ring + filling.at * p.stage_bytes,
          p.x + ahead.token * static_cast<std::int64_t>(p.shape.row_bytes) + std::int64_t{ahead.piece} * p.piece_bytes,
          bytes_of_piece(p, ahead.piece), full + filling.at);
    jobs.advance(ahead);
    filling.advance();
  };
  for (int i = 0; i < kStages - 1; ++i) load();
  Targets targets(p, to, jobs, lane);
  std::byte* dst = nullptr;
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job), emptying.advance()) {
    if (job.piece == 0) dst = targets.next().row;
    ptx::barrier_wait(full + emptying.at, emptying.parity);
    if (dst != nullptr)
      ptx::bulk_store(dst + std::int64_t{job.piece} * p.piece_bytes, ring + emptying.at * p.stage_bytes,
                      bytes_of_piece(p, job.piece));
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    __syncwarp();
    load();
  }
  ptx::bulk_wait_all();
#else
  (void)stages, (void)barriers;
  constexpr int kAhead = 4;
  Targets targets(p, to, jobs, lane);
  std::byte* dst = nullptr;
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job)) {
    if (job.piece == 0) dst = targets.next().row;
    const std::int64_t piece_at = std::int64_t{job.piece} * p.piece_bytes;
    const std::byte* const src = p.x + job.token * static_cast<std::int64_t>(p.shape.row_bytes) + piece_at;
    const unsigned lanes = __ballot_sync(kAllLanes, dst != nullptr);
    const int vectors = bytes_of_piece(p, job.piece) / 16;
    for (int first = lane; first - lane < vectors; first += 32 * kAhead) {
      uint4 v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + 32 * i < vectors) v[i] = ptx::load_streaming(src + 16 * (first + 32 * i));
      for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
        std::byte* const at = of_lane(dst, __ffs(rest) - 1);
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + 32 * i < vectors) ptx::store_streaming(at + piece_at + 16 * (first + 32 * i), v[i]);
      }
    }
  }
#endif
}

// The stored words of a batch's scales: of passes first_pass .. + passes, the lane holding the scale of its group in
// pass lane % kLanesOfGroup. The exponents of a pass's four groups share a word.
struct ScaleWord {
  std::int32_t word;
  int at;     // among the row's
  bool mine;  // this lane stores it
};

__device__ ScaleWord scale_word(const DispatchParams& p, float scale, int first_pass, int passes, int lane) {
  const int pass = first_pass + lane % kLanesOfGroup, in_pass = lane / kLanesOfGroup;
  const int group = pass * kGroupsOfPass + in_pass;
  bool mine = lane % kLanesOfGroup < passes && group < static_cast<int>(plan::num_fp8_groups(p.hidden));
  if (p.scale_kind != plan::Fp8Scale::kUe8m0) return {__float_as_int(scale), group, mine};
  static_assert(plan::kUe8m0PerWord == kGroupsOfPass);
  std::uint32_t word = mine ? plan::ue8m0_in_word(scale, in_pass) : 0;
  for (int lanes = kLanesOfGroup; lanes < 32; lanes *= 2) word |= __shfl_xor_sync(kAllLanes, word, lanes);
  return {static_cast<std::int32_t>(word), pass, mine && in_pass == 0};
}

// A batch that holds a NaN, an infinity or what is nearly one. Not inlined: the quick path needs the registers.
template <class Number>
__device__ __noinline__ void write_any_batch(const DispatchParams& p, TargetList targets, Channels channels, int batch,
                                             int lane) {
  constexpr int kPasses = kPassesOf<Number>;
  for (int pass = 0; pass < kPasses && pass * kPassChannels < channels.left; ++pass) {
    const int ahead = pass * kPassChannels, left = channels.left - ahead - channel_of_lane(lane);
    const int row_at = (batch * kPasses + pass) * kPassChannels + channel_of_lane(lane);
    float of_group;
    const Codes codes = encode_any_pass<Number>(channels.at + ahead * Number::kBytes, left, p.scale_kind, &of_group);
    const ScaleWord scale = scale_word(p, of_group, batch * kPasses + pass, 1, lane);
    for (int i = 0; i < targets.size(); ++i) {
      const Target to = targets[i];
      if (scale.mine) to.scales[scale.at * to.scale_stride] = scale.word;
      for (int run = 0; run < 2; ++run)
        if (run * kRunsApart < left) ptx::store_streaming(to.row + row_at + run * kRunsApart, codes.run[run]);
    }
  }
}

// Mover warps that quantise. The next batch is loaded pair by pair, as the present one's registers become free.
// `shared`: room for 32 targets for each mover warp.
template <class Number>
__device__ void quantize_rows(const DispatchParams& p, const Destination* to, std::byte* shared, int warp, int lane) {
  constexpr int kPasses = kPassesOf<Number>;
  using MyBatch = Batch<Number, kPasses>;
  const Jobs jobs = jobs_of(p, warp);
  if (!jobs.has(jobs.begin())) return;
  const auto channels_of = [&](const Job& job) {
    const int first = job.piece * MyBatch::kChannels;
    return Channels{p.x + (job.token * p.hidden + first + channel_of_lane(lane)) * Number::kBytes,
                    static_cast<int>(p.hidden) - first};
  };
  Targets targets(p, to, jobs, lane);
  TargetList list(reinterpret_cast<Target*>(shared) + 32 * warp);
  Channels channels = channels_of(jobs.begin());
  MyBatch batch;
#pragma unroll
  for (int pair = 0; pair < MyBatch::kPairs; ++pair) batch.load_pair(pair, channels, lane);
  for (Job job = jobs.begin(); jobs.has(job);) {
    if (job.piece == 0) list.set(targets.next(), lane);
    const int number = job.piece;
    jobs.advance(job);
    const Channels next = jobs.has(job) ? channels_of(job) : channels;
    const std::uint32_t peak = batch.peak(lane);
    if (__all_sync(kAllLanes, peak < kLargestQuick)) {
      const plan::Fp8Scaling scaling = quick_scaling(static_cast<std::int32_t>(peak), p.scale_kind);
      const ScaleWord scale = scale_word(p, scaling.scale, number * kPasses, kPasses, lane);
      for (int i = 0; scale.mine && i < list.size(); ++i) list[i].scales[scale.at * list[i].scale_stride] = scale.word;
      const int row_at = number * MyBatch::kChannels + channel_of_lane(lane);
#pragma unroll
      for (int pair = 0; pair < MyBatch::kPairs; ++pair) {
        Codes codes[2];
        const bool there = MyBatch::has_pair(pair, channels.left);
        if (there) batch.encode_pair(pair, scaling.factor, codes);
        batch.load_pair(pair, next, lane);
        for (int i = 0; there && i < list.size(); ++i)
          MyBatch::store_pair(pair, list[i].row + row_at, codes, channels.left, lane);
      }
    } else {
      write_any_batch<Number>(p, list, channels, number, lane);
#pragma unroll
      for (int pair = 0; pair < MyBatch::kPairs; ++pair) batch.load_pair(pair, next, lane);
    }
    channels = next;
  }
}

}  // namespace
}  // namespace deep_ep::cuda
