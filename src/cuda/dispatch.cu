// SPDX-License-Identifier: MIT
// High-throughput dispatch: rows go from the caller's tensor to their final place in the receivers' windows. Phases:
// reply, await replies, send, receive. Each block has mover warps, which write rows, and companion warps, which write
// what travels beside them: ids, weights, scales, side tensors.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/quantize.cuh"
#include "cuda/wait.cuh"

namespace deep_ep::cuda {

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxMoverWarps = 16;
// Warps of one block. Quantising takes registers for two batches of channels: fewer warps, each with more.
struct Crew {
  int movers, companions;
  __host__ __device__ constexpr int threads() const { return (movers + companions) * 32; }
};
__host__ __device__ constexpr Crew crew_of(bool quantize) { return quantize ? Crew{14, 2} : Crew{kMaxMoverWarps, 8}; }
constexpr int kStages = 3;  // row pieces that one mover warp has in shared memory
// Passes of one batch of a quantising warp: as many as its registers hold.
template <class Number>
constexpr int kPassesOf = 16 / Number::kBytes;

// One receiver's output, seen from here.
struct Destination {
  std::byte* block;  // null: takes no part
  plan::OutputBlock at;
  std::int64_t first_arrival;
  const std::int32_t* first_rows;  // by slot
  bool writes_here;                // this block's movers write there
  unsigned rows_counted;           // where rows are more than arrivals: those that this block counted
};

// What this rank is going to receive: known to the host, or counted by notify.
struct Incoming {
  std::int64_t rows, arrivals;
  __device__ explicit Incoming(const DispatchParams& p)
      : rows(p.rows >= 0 ? p.rows : p.common.state->rows),
        arrivals(p.arrivals >= 0 ? p.arrivals : p.common.state->arrivals) {}
};

// Phase reply: a thread per source says where its rows begin. With a cached handle the call is announced here too.
__device__ void reply(const Now& now, const DispatchParams& p, const Incoming& incoming) {
  const int me = p.common.rank;
  for (int src = static_cast<int>(threadIdx.x / 32); src < p.common.num_ranks;
       src += static_cast<int>(blockDim.x / 32)) {
    if (!now.active(src)) continue;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (p.cached) {
      if (lane == 0) {
        await_room(now, src);
        Announcement& mine = now.announcement(src, me);
        for (int field = 0; field < Signature::kNumFields; ++field) mine.signature[field] = p.common.signature[field];
      }
    } else {
      for (int slot = lane; slot < p.num_slots; slot += 32)
        now.reply_first_rows(src, me)[slot] = p.first_row[std::int64_t{src} * p.num_slots + slot];
    }
    if (lane == 0) {
      Reply answer{p.verdict,
                   p.needed,
                   p.there,
                   p.block_at,
                   incoming.rows,
                   incoming.arrivals,
                   p.cached ? 0 : p.first_arrival[src]};
      if (p.max_rows > 0 && p.common.state->rows > p.max_rows && answer.verdict == Reply::kAccepted)
        answer.verdict = Reply::kMoreThanMaxRows, answer.needed = p.common.state->rows, answer.there = p.max_rows;
      if (!p.cached && p.common.state->full_slot_rows > 0 && answer.verdict == Reply::kAccepted) {
        answer.verdict = Reply::kSlotTooSmall;
        answer.needed = static_cast<std::uint64_t>(p.common.state->full_slot_rows);
        answer.there = static_cast<std::uint64_t>(p.shape.padded_slot_rows);
      }
      now.reply(src, me) = answer;
    }
    __threadfence_system();  // every lane's first rows, before lane 0's release
    __syncwarp();
    if (lane != 0) continue;
    plan::Words& words = now.words(src, me);
    if (p.cached) publish(now, &words.announced, kSame);
    publish(now, &words.replied, 0);
  }
}

// One thread per receiver. Every block waits for itself: the words lie in our own memory.
__device__ bool await_reply(const Now& now, const DispatchParams& p, int dst, Destination& to) {
  const int me = p.common.rank;
  to.block = nullptr;
  to.rows_counted = 0;
  if (!now.active(dst)) return true;
  if (p.cached && !await_same_call(now, dst)) return false;
  std::uint32_t value = 0;
  if (!await(now, &now.words(me, dst).replied, value, counted_once(dst))) {
    report(now, Fault::kTimeout, dst, 1, 0);
    return false;
  }
  const Reply answer = now.reply(me, dst);
  if (answer.verdict != Reply::kAccepted) {
    const Fault::Kind kind = answer.verdict == Reply::kMoreThanMaxRows ? Fault::kTooManyRows
                             : answer.verdict == Reply::kSlotTooSmall  ? Fault::kFullSlot
                                                                       : Fault::kNoRoom;
    report(now, kind, dst, static_cast<std::int64_t>(answer.needed), static_cast<std::int64_t>(answer.there));
    return false;
  }
  to.block = now.window(dst) + answer.block_at;
  to.at = plan::OutputBlock::place(p.shape, p.layout, answer.rows, answer.arrivals);
  to.first_arrival = answer.first_arrival;
  to.first_rows = now.reply_first_rows(me, dst);
  const bool far_block = static_cast<int>(blockIdx.x) < p.roles.far;
  to.writes_here = p.roles.far == 0 || far_block == (p.common.peers[dst].same_device == 0);
  return true;
}

// What the routes say of one selection. Until a handle is cached its numbers are relative to what the receivers reply.
struct Route {
  std::int32_t rank;  // -1: none
  std::int32_t row, slot;
};

// Selections `chunk * 32 ..` of a token, one per lane.
__device__ Route read_route(const DispatchParams& p, int token, int chunk, int lane) {
  const int k = chunk * 32 + lane;
  Route route{-1, 0, 0};
  if (token >= p.num_tokens || k >= p.num_topk) return route;
  const std::int64_t at = std::int64_t{token} * p.num_topk + k;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  route.rank = p.routes.dst_rank[at];
  route.row = p.cached ? (by_rank ? p.routes.dst_arrival : p.routes.dst_row)[at]
                       : (by_rank ? p.routes.relative_arrival : p.routes.relative_row)[at];
  if (!p.cached && !by_rank) route.slot = p.routes.slot[at];
  return route;
}

__device__ std::int64_t final_row(const DispatchParams& p, const Destination& to, const Route& route) {
  if (p.cached) return route.row;
  return route.row + (p.layout == OutputLayout::kByRank ? to.first_arrival : to.first_rows[route.slot]);
}

// Whether the lane's selection is its token's first to that rank: what goes once per rank goes with this one.
// `token_here` tells the tokens of one warp apart; `chunk` says which of its token's selections the warp has.
__device__ bool first_to_rank(const DispatchParams& p, int rank, int token, int token_here, int chunk, int lane) {
  const unsigned same = __match_any_sync(kAll, rank >= 0 ? rank * 32 + token_here : -1 - lane);
  bool first = rank >= 0 && lane == __ffs(same) - 1;
  for (int j = 0; first && j < chunk * 32; ++j) first = p.routes.dst_rank[std::int64_t{token} * p.num_topk + j] != rank;
  return first;
}

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
    const unsigned given = __ballot_sync(kAll, target.row != nullptr);
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
  return reinterpret_cast<T*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(mine), from));
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
    const unsigned lanes = __ballot_sync(kAll, dst != nullptr);
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
  for (int lanes = kLanesOfGroup; lanes < 32; lanes *= 2) word |= __shfl_xor_sync(kAll, word, lanes);
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
    if (__all_sync(kAll, peak < kLargestQuick)) {
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

// A row's place among a receiver's scales.
__device__ void store_scale(const Destination& to, std::int64_t row, int word, std::int32_t value) {
  auto* scales = reinterpret_cast<std::int32_t*>(to.block + to.at.scales_at) + to.at.first_scale(row);
  scales[word * to.at.scale_column_stride] = value;
}

// One selection as its companion lane sees it.
struct Companion {
  int token, k;
  std::int32_t rank, slot;  // rank -1: none, or nobody to write to
  bool first;               // the token's first to that rank
  std::int64_t arrival, row;
};

__device__ bool carries_ids_or_weights(const DispatchParams& p) {
  return !p.cached || (p.shape.topk_weights && p.layout == OutputLayout::kByRank);
}

// Entry k of what is told of a token once per rank.
__device__ void write_entry(const DispatchParams& p, const Destination& to, const Companion& c, int rank,
                            std::int64_t arrival) {
  const std::int64_t there = arrival * p.num_topk + c.k, here = std::int64_t{c.token} * p.num_topk + c.k;
  const bool by_rank = p.layout == OutputLayout::kByRank, for_it = c.rank == rank;
  if (!p.cached) {
    const std::int32_t slot = for_it ? c.slot : -1;
    std::byte* ids = to.block + to.at.topk_idx_at;
    if (p.shape.topk_idx_bytes == 8) {
      reinterpret_cast<std::int64_t*>(ids)[there] = slot;
    } else {
      reinterpret_cast<std::int32_t*>(ids)[there] = slot;
    }
    if (!by_rank)
      reinterpret_cast<std::int32_t*>(to.block + to.at.arrival_row_at)[there] =
          for_it ? static_cast<std::int32_t>(c.row) : -1;
  }
  if (p.shape.topk_weights && by_rank)
    reinterpret_cast<float*>(to.block + to.at.topk_weights_at)[there] =
        for_it || !p.mask_topk_weights ? p.topk_weights[here] : 0.0f;
}

// Side tensors, once per rank and token. All lanes.
__device__ void write_sides(const DispatchParams& p, const Destination& to, std::int64_t arrival, int token, int lane) {
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* src = reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words;
    auto* dst = reinterpret_cast<std::int32_t*>(to.block + to.at.side_at[i]) + arrival * words;
    for (int word = lane; word < words; word += 32) dst[word] = src[word];
  }
}

// The caller's scales, once per row. All lanes.
__device__ void write_given_scales(const DispatchParams& p, const Destination& to, std::int64_t row, int token,
                                   int lane) {
  for (int word = lane; p.scales != nullptr && word < p.shape.num_scales; word += 32)
    store_scale(to, row, word, p.scales[token * p.scale_strides[0] + word * p.scale_strides[1]]);
}

// Companion warps: everything beside the rows, and this rank's own record of where its tokens went. As many tokens at a
// time as a warp has lanes for, a lane for each selection.
class Companions {
 public:
  __device__ Companions(const DispatchParams& p, const Destination* to, int lane)
      : p_(p), to_(to), lane_(lane), lanes_(min(p.num_topk, 32)), token_here_(lane / lanes_), tokens_(32 / lanes_) {}

  __device__ void write_all(int warp, int warps) {
    const int step = static_cast<int>(gridDim.x) * warps * tokens_;
    const int first = (static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x)) * tokens_;
    for (int token = first; token < p_.num_tokens; token += step)
      for (int chunk = 0; chunk * 32 < p_.num_topk; ++chunk) write(read(token + token_here_, chunk));
  }

 private:
  __device__ Companion read(int token, int chunk) {
    Companion c{token, chunk * 32 + lane_ % lanes_, -1, -1, false, -1, -1};
    if (token_here_ < tokens_ && token < p_.num_tokens && c.k < p_.num_topk) look(c);
    c.first = first_to_rank(p_, c.rank, token, token_here_, chunk, lane_);
    return c;
  }
  // Everything but `first`.
  __device__ void look(Companion& c) const {
    const std::int64_t at = std::int64_t{c.token} * p_.num_topk + c.k;
    const bool by_rank = p_.layout == OutputLayout::kByRank;
    c.rank = p_.routes.dst_rank[at];
    c.arrival = (p_.cached ? p_.routes.dst_arrival : p_.routes.relative_arrival)[at];
    if (!by_rank) c.row = (p_.cached ? p_.routes.dst_row : p_.routes.relative_row)[at];
    if (!p_.cached) c.slot = p_.routes.slot[at];
    if (c.rank >= 0 && to_[c.rank].block == nullptr) c.rank = -1;
    if (c.rank >= 0 && !p_.cached) {
      c.arrival += to_[c.rank].first_arrival;
      if (!by_rank) c.row += to_[c.rank].first_rows[c.slot];
    }
    if (by_rank) c.row = c.arrival;
    if (p_.cached) return;
    p_.routes.dst_row[at] = c.rank >= 0 ? static_cast<std::int32_t>(c.row) : -1;
    p_.routes.dst_arrival[at] = c.rank >= 0 ? static_cast<std::int32_t>(c.arrival) : -1;
  }

  __device__ void write(const Companion& c) {
    const bool by_rank = p_.layout == OutputLayout::kByRank;
    if (carries_ids_or_weights(p_)) {
      if (!p_.cached && c.first)
        reinterpret_cast<std::int32_t*>(to_[c.rank].block + to_[c.rank].at.src_token_at)[c.arrival] = c.token;
      for (int i = 0; i < lanes_; ++i) {
        const int from = min(token_here_ * lanes_ + i, 31);
        const int rank = __shfl_sync(kAll, c.rank, from);
        const std::int64_t arrival = __shfl_sync(kAll, static_cast<long long>(c.arrival), from);
        const bool first = __shfl_sync(kAll, static_cast<int>(c.first), from) != 0;
        if (first && token_here_ < tokens_) write_entries(c, rank, arrival);
      }
    }
    if (p_.shape.topk_weights && !by_rank && c.rank >= 0)
      reinterpret_cast<float*>(to_[c.rank].block + to_[c.rank].at.topk_weights_at)[c.row] =
          p_.topk_weights[std::int64_t{c.token} * p_.num_topk + c.k];
    if (p_.shape.num_side == 0 && p_.scales == nullptr) return;
    for (unsigned rest = __ballot_sync(kAll, c.rank >= 0 && (c.first || !by_rank)); rest != 0; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      const Destination& to = to_[__shfl_sync(kAll, c.rank, from)];
      const int token = __shfl_sync(kAll, c.token, from);
      const std::int64_t arrival = __shfl_sync(kAll, static_cast<long long>(c.arrival), from);
      const std::int64_t row = __shfl_sync(kAll, static_cast<long long>(c.row), from);
      if (__shfl_sync(kAll, static_cast<int>(c.first), from) != 0) write_sides(p_, to, arrival, token, lane_);
      write_given_scales(p_, to, row, token, lane_);
    }
  }
  // The lane's entry; of a token with more selections than lanes also those of the other chunks.
  __device__ void write_entries(const Companion& c, int rank, std::int64_t arrival) {
    for (int k = c.k % 32; k < p_.num_topk; k += 32) {
      Companion other = c;
      if (k != c.k) {
        other.k = k, other.rank = -1;
        look(other);
      }
      write_entry(p_, to_[rank], other, rank, arrival);
    }
  }

  const DispatchParams& p_;
  const Destination* to_;
  const int lane_, lanes_, token_here_, tokens_;
};

__device__ bool has_companions(const DispatchParams& p) {
  return !p.cached || p.shape.topk_weights || p.shape.num_side > 0 || p.scales != nullptr;
}

// Rows that no source writes: padding between experts is zero, ids behind a bounded output's rows say "nobody".
__device__ void clear_unwritten(const DispatchParams& p, const Destination& mine, int warp, int of_block, int lane) {
  const int warps = static_cast<int>(gridDim.x) * of_block;
  const int number = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
  if (p.layout == OutputLayout::kByExpert) {
    for (int slot = number; slot < p.num_slots; slot += warps) {
      for (std::int64_t row = p.slot_first_row[slot] + p.slot_rows[slot]; row < p.slot_first_row[slot + 1]; ++row) {
        std::byte* x = mine.block + mine.at.x_at + row * static_cast<std::int64_t>(p.shape.row_bytes);
        for (std::int64_t byte = 16 * lane; byte < static_cast<std::int64_t>(p.shape.row_bytes); byte += 16 * 32)
          *reinterpret_cast<uint4*>(x + byte) = uint4{};
        for (int word = lane; word < p.shape.num_scales; word += 32) store_scale(mine, row, word, 0);
        if (p.shape.topk_weights && lane == 0) reinterpret_cast<float*>(mine.block + mine.at.topk_weights_at)[row] = 0;
      }
    }
  }
  if (p.cached || p.max_rows == 0) return;
  const std::int64_t words = p.shape.topk_idx_bytes / 4 * p.num_topk;
  auto* ids = reinterpret_cast<std::int32_t*>(mine.block + mine.at.topk_idx_at);
  for (std::int64_t i = p.common.state->arrivals * words + number * 32 + lane; i < p.arrivals * words; i += warps * 32)
    ids[i] = -1;
}

// For Statistics. Rows of kByRank are the arrivals, whose number is known; others are counted by the companion warps.
__device__ void count_rows_sent(const DispatchParams& p, Destination* to, int warp, int warps, int lane) {
  if (p.layout == OutputLayout::kByRank) return;
  const std::int64_t selections = std::int64_t{p.num_tokens} * p.num_topk;
  const std::int64_t step = std::int64_t{gridDim.x} * warps * 32;
  for (std::int64_t i = (std::int64_t{blockIdx.x} * warps + warp) * 32 + lane; i < selections; i += step) {
    const int rank = p.routes.dst_rank[i];
    if (rank >= 0) atomicAdd(&to[rank].rows_counted, 1u);
  }
}

// Every thread of a block, after its companions have counted.
__device__ void add_rows_sent(const DispatchParams& p, const Destination* to) {
  if (p.layout == OutputLayout::kByRank) return;
  __syncthreads();
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x))
    if (to[peer].block != nullptr) count_sent(p.common, peer, to[peer].rows_counted * p.shape.bytes_of_row(p.layout));
}

// The last block, once an exchange has ended well.
__device__ void count_exchange(const Now& now, const DispatchParams& p) {
  const std::uint64_t bytes =
      p.shape.bytes_of_arrival(p.layout) + (p.layout == OutputLayout::kByRank ? p.shape.bytes_of_row(p.layout) : 0);
  const std::int32_t* const tokens = p.tokens_between + p.common.rank * p.common.num_ranks;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += static_cast<int>(blockDim.x))
    if (now.active(peer)) count_sent(p.common, peer, static_cast<std::uint64_t>(tokens[peer]) * bytes);
  for (int slot = static_cast<int>(threadIdx.x); slot < p.num_slots; slot += static_cast<int>(blockDim.x))
    count_received(p.common, slot, p.slot_rows[slot]);
}

// Phase receive: the last block tells the peers that all is sent, and waits for theirs.
__device__ void receive(const Now& now, const DispatchParams& p) {
  const int me = p.common.rank;
  const bool failed = has_failed(now);
  for (int peer = static_cast<int>(threadIdx.x); !failed && peer < p.common.num_ranks;
       peer += static_cast<int>(blockDim.x)) {
    if (!now.active(peer)) continue;
    publish(now, &now.words(peer, me).arrived, 1);
    std::uint32_t value = 0;
    if (!await(now, &now.words(me, peer).arrived, value, peer)) report(now, Fault::kTimeout, peer, 1, 0);
  }
  if (!failed) count_exchange(now, p);
}

enum class Rows { kAsTheyAre, kBf16, kFp16, kFp32 };

}  // namespace

template <Rows kRows>
__global__ void __launch_bounds__(crew_of(kRows != Rows::kAsTheyAre).threads(), 1)
    dispatch(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ std::uint64_t barriers[kMaxMoverWarps * kStages];
  constexpr Crew crew = crew_of(kRows != Rows::kAsTheyAre);
  const Now now(p.common);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const auto destinations_bytes = (sizeof(Destination) * p.common.num_ranks + 127) / 128 * 128;
  auto* const to = reinterpret_cast<Destination*>(shared);
  std::byte* const stages = shared + destinations_bytes;

  bool good = __syncthreads_and(!has_failed(now));  // notify's verdict
  const Incoming incoming(p);
  // The host had to guess how much room this takes and was wrong: it launches this kernel again. Nobody is told yet.
  if (good && p.rows < 0 &&
      plan::OutputBlock::place(p.shape, p.layout, incoming.rows, incoming.arrivals).total_bytes > p.room)
    return;
  if (good && blockIdx.x == 0) reply(now, p, incoming);
  for (int dst = static_cast<int>(threadIdx.x); good && dst < p.common.num_ranks; dst += static_cast<int>(blockDim.x))
    good = await_reply(now, p, dst, to[dst]);
#if EP_BULK_COPY
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxMoverWarps * kStages; ++i) ptx::barrier_init(barriers + i, 1);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
    if (warp >= p.mover_warps) {
      if (has_companions(p)) Companions(p, to, lane).write_all(warp - p.mover_warps, crew.companions);
      clear_unwritten(p, to[p.common.rank], warp - p.mover_warps, crew.companions, lane);
      count_rows_sent(p, to, warp - p.mover_warps, crew.companions, lane);
    } else if constexpr (kRows == Rows::kAsTheyAre) {
      move_rows(p, to, stages, barriers, warp, lane);
    } else if constexpr (kRows == Rows::kBf16) {
      quantize_rows<Bf16>(p, to, stages, warp, lane);
    } else if constexpr (kRows == Rows::kFp16) {
      quantize_rows<Fp16>(p, to, stages, warp, lane);
    } else {
      quantize_rows<Fp32>(p, to, stages, warp, lane);
    }
    add_rows_sent(p, to);
  }
  if (!last_block(now)) return;
  receive(now, p);
  finish(now);
}

namespace {

constexpr std::size_t kLargestPiece = 14336;

// How rows as they are are cut, and how many warps move them: as many as shared memory has stages for.
void share_rows(DispatchParams& p, std::size_t room) {
  const std::size_t pieces = (p.shape.row_bytes + kLargestPiece - 1) / kLargestPiece;
  const std::size_t piece = plan::align_up((p.shape.row_bytes + pieces - 1) / pieces, 16);
  p.pieces = static_cast<int>(pieces);
  p.piece_bytes = static_cast<int>(piece);
  p.stage_bytes = static_cast<int>(plan::align_up(piece, 128));
  const auto fit = static_cast<int>(room / (static_cast<std::size_t>(p.stage_bytes) * kStages));
  p.mover_warps = std::clamp(fit, 1, crew_of(false).movers);
}

void share_quantised_rows(DispatchParams& p) {
  p.piece_bytes = kPassChannels * (p.x_dtype == DType::kFp32 ? kPassesOf<Fp32> : kPassesOf<Bf16>);
  p.pieces = static_cast<int>((p.shape.row_bytes + p.piece_bytes - 1) / p.piece_bytes);
  p.stage_bytes = 0;
  p.mover_warps = crew_of(true).movers;
}

const void* kernel_of(bool quantize, DType dtype) {
  if (!quantize) return reinterpret_cast<const void*>(&dispatch<Rows::kAsTheyAre>);
  if (dtype == DType::kBf16) return reinterpret_cast<const void*>(&dispatch<Rows::kBf16>);
  if (dtype == DType::kFp16) return reinterpret_cast<const void*>(&dispatch<Rows::kFp16>);
  return reinterpret_cast<const void*>(&dispatch<Rows::kFp32>);
}

}  // namespace

void launch_dispatch(DispatchParams params, bool quantize, int blocks, cudaStream_t stream, int shared_limit) {
  const std::size_t head = (sizeof(Destination) * params.common.num_ranks + 127) / 128 * 128;
  if (quantize) {
    share_quantised_rows(params);
  } else {
    share_rows(params, static_cast<std::size_t>(shared_limit) - head);
  }
  params.chunks = (params.num_topk + 31) / 32;
  const std::size_t of_warp = quantize ? 32 * sizeof(Target) : static_cast<std::size_t>(params.stage_bytes) * kStages;
  const std::size_t stages = params.mover_warps * of_warp;
  void* arguments[] = {&params};
  const dim3 threads(static_cast<unsigned>(params.mover_warps + crew_of(quantize).companions) * 32);
  cudaLaunchKernel(kernel_of(quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)), threads, arguments,
                   head + stages, stream);
}

const void* dispatch_kernel(bool quantize, DType dtype) { return kernel_of(quantize, dtype); }

}  // namespace deep_ep::cuda
