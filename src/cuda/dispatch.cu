// SPDX-License-Identifier: MIT
// High-throughput dispatch: rows go from the caller's tensor to their final place in the receivers' windows. Phases:
// reply, await replies, send, receive. Each block has mover warps, which write rows, and companion warps, which write
// what travels beside them: ids, weights, scales, side tensors.
#include "cuda/encode.cuh"
#include "cuda/kernels.h"
#include "cuda/wait.cuh"

namespace deep_ep::cuda {

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxMoverWarps = 16;
// Warps of one block. Quantising takes registers for the channels that are on their way: fewer warps, each with more.
struct Crew {
  int movers, companions;
};
__host__ __device__ constexpr Crew crew_of(bool quantize) { return quantize ? Crew{12, 4} : Crew{kMaxMoverWarps, 8}; }
constexpr int kStages = 3;       // row pieces that one mover warp has in shared memory
constexpr int kGroupsAhead = 8;  // groups of channels that a quantising warp holds in registers

// One receiver's output, seen from here.
struct Destination {
  std::byte* block;  // null: takes no part
  plan::OutputBlock at;
  std::int64_t first_arrival;
  const std::int32_t* first_rows;  // by slot
  bool writes_here;                // this block's movers write there
  unsigned rows_counted;           // where rows are more than arrivals: those that this block counted
};

// Phase reply: a thread per source says where its rows begin. With a cached handle the call is announced here too.
__device__ void reply(const Now& now, const DispatchParams& p) {
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
      Reply answer{p.verdict, p.needed, p.there, p.block_at, p.rows, p.arrivals, p.cached ? 0 : p.first_arrival[src]};
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
  const bool remote_block = static_cast<int>(blockIdx.x) < p.remote_blocks;
  to.writes_here = p.remote_blocks == 0 || remote_block == (p.common.peers[dst].same_device == 0);
  return true;
}

// One selection of a token, as the lane that looks at it sees it.
struct Selection {
  int rank;    // -1: none, or nobody to write to
  bool first;  // the token's first to that rank: what goes once per rank goes with this one
  std::int64_t arrival, row;
};

__device__ std::int64_t arrival_of(const DispatchParams& p, const Destination& to, std::int64_t at) {
  return p.cached ? p.routes.dst_arrival[at] : p.routes.relative_arrival[at] + to.first_arrival;
}

__device__ std::int64_t row_of(const DispatchParams& p, const Destination& to, std::int64_t at, std::int64_t arrival) {
  if (p.cached) return p.routes.dst_row[at];
  return p.layout == OutputLayout::kByRank ? arrival : p.routes.relative_row[at] + to.first_rows[p.routes.slot[at]];
}

// Selections `chunk * 32 ..` of a token, one per lane.
__device__ Selection select(const DispatchParams& p, const Destination* to, int token, int chunk, int lane) {
  const std::int64_t first = std::int64_t{token} * p.num_topk;
  const int k = chunk * 32 + lane;
  Selection s{-1, false, 0, 0};
  if (k < p.num_topk) s.rank = p.routes.dst_rank[first + k];
  if (s.rank >= 0 && to[s.rank].block == nullptr) s.rank = -1;
  const unsigned same = __match_any_sync(kAll, s.rank);
  s.first = s.rank >= 0 && lane == __ffs(same) - 1;
  for (int j = 0; s.first && j < chunk * 32; ++j) s.first = p.routes.dst_rank[first + j] != s.rank;
  if (s.rank >= 0) {
    s.arrival = arrival_of(p, to[s.rank], first + k);
    s.row = row_of(p, to[s.rank], first + k, s.arrival);
  }
  return s;
}

// Where a lane's selection is written by this block's movers; null: nowhere.
__device__ std::byte* row_address(const DispatchParams& p, const Destination* to, const Selection& s) {
  const bool writes = s.rank >= 0 && to[s.rank].writes_here && (s.first || p.layout != OutputLayout::kByRank);
  return writes ? to[s.rank].block + to[s.rank].at.x_at + s.row * static_cast<std::int64_t>(p.shape.row_bytes)
                : nullptr;
}

// The rows of a mover warp: tokens first, first + step, ...; a token again for each 32 of its selections, in pieces.
struct Job {
  int token, chunk, piece;
};
struct Jobs {
  int first, step, num_tokens, chunks, pieces;
  __device__ Job begin() const { return {first, 0, 0}; }
  __device__ bool has(const Job& job) const { return job.token < num_tokens; }
  // Step by step: a division for each job costs more than moving a short row.
  __device__ void advance(Job& job) const {
    if (++job.piece < pieces) return;
    job.piece = 0;
    if (++job.chunk < chunks) return;
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
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const bool split = p.remote_blocks > 0, remote = block < p.remote_blocks;
  const int of_role = !split ? blocks : remote ? p.remote_blocks : blocks - p.remote_blocks;
  const int in_role = split && !remote ? block - p.remote_blocks : block;
  const auto pieces = static_cast<int>((p.shape.row_bytes + p.piece_bytes - 1) / p.piece_bytes);
  return {in_role + warp * of_role, of_role * p.mover_warps, p.num_tokens, (p.num_topk + 31) / 32, pieces};
}

__device__ int bytes_of_piece(const DispatchParams& p, int piece) {
  const std::int64_t left = static_cast<std::int64_t>(p.shape.row_bytes) - std::int64_t{piece} * p.piece_bytes;
  return left < p.piece_bytes ? static_cast<int>(left) : p.piece_bytes;
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
  std::byte* dst = nullptr;
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job), emptying.advance()) {
    if (job.piece == 0) dst = row_address(p, to, select(p, to, job.token, job.chunk, lane));
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
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job)) {
    std::byte* const dst = row_address(p, to, select(p, to, job.token, job.chunk, lane));
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
        auto* at =
            reinterpret_cast<std::byte*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(dst), __ffs(rest) - 1));
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (first + 32 * i < vectors) ptx::store_streaming(at + piece_at + 16 * (first + 32 * i), v[i]);
      }
    }
  }
#endif
}

// A lane's place among a row's scales, for one receiver's row.
__device__ void store_scale(const DispatchParams& p, const Destination& to, std::int64_t row, int word,
                            std::int32_t value) {
  auto* scales = reinterpret_cast<std::int32_t*>(to.block + to.at.scales_at) + to.at.first_scale(row);
  scales[word * to.at.scale_column_stride] = value;
}

// The stored words of `count` scales, lane g holding group first + g; exponents of four groups share a word.
// `row_scales`: where the scales of the lane's row begin, null for a lane that writes nowhere.
__device__ void store_scales(const DispatchParams& p, std::int32_t* row_scales, std::int64_t stride, float scale,
                             int first, int count, int lane) {
  const bool packed = p.scale_kind == plan::Fp8Scale::kUe8m0;
  std::uint32_t word = packed ? plan::ue8m0_in_word(scale, lane) : __float_as_uint(scale);
  if (packed) {
    if (lane >= count) word = 0;
    word |= __shfl_xor_sync(kAll, word, 1);
    word |= __shfl_xor_sync(kAll, word, 2);
  }
  const bool mine = lane < count && (!packed || lane % plan::kUe8m0PerWord == 0);
  const int at = packed ? (first + lane) / plan::kUe8m0PerWord : first + lane;
  for (unsigned rest = __ballot_sync(kAll, row_scales != nullptr); rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    auto* scales =
        reinterpret_cast<std::int32_t*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(row_scales), from));
    const std::int64_t column = __shfl_sync(kAll, static_cast<long long>(stride), from);
    if (mine) scales[at * column] = static_cast<std::int32_t>(word);
  }
}

// Loads the lane's four channels of up to kGroupsAhead groups; zeros beyond the row.
template <class Number>
__device__ void load_groups(const std::byte* row, std::int64_t hidden, int first_group,
                            typename Number::Four (&v)[kGroupsAhead], int lane) {
#pragma unroll
  for (int g = 0; g < kGroupsAhead; ++g) {
    const std::int64_t channel = (first_group + std::int64_t{g}) * plan::kFp8Group + 4 * lane;
    v[g] = {};
    if (channel < hidden) v[g] = __ldcs(reinterpret_cast<const typename Number::Four*>(row + channel * Number::kBytes));
  }
}

// Movers that quantise: a warp reads a row eight groups at a time, one lane works out one group's scale, and the codes
// of a piece are gathered in shared memory for the bulk stores.
template <class Number>
__device__ void quantize_rows(const DispatchParams& p, const Destination* to, std::byte* stages, int warp, int lane) {
  const Jobs jobs = jobs_of(p, warp);
  const int groups_of_piece = p.piece_bytes / plan::kFp8Group;
  const int groups = static_cast<int>(plan::num_fp8_groups(p.hidden));
  constexpr int kBuffers = 2;
  std::byte* const buffers = stages + std::int64_t{warp} * kBuffers * p.stage_bytes;
  typename Number::Four ahead[kGroupsAhead];
  const auto source = [&](const Job& job) { return p.x + job.token * p.hidden * Number::kBytes; };
  if (jobs.has(jobs.begin())) load_groups<Number>(source(jobs.begin()), p.hidden, 0, ahead, lane);
  std::byte* dst = nullptr;
  std::int32_t* row_scales = nullptr;
  std::int64_t scale_stride = 1;
  Ring<kBuffers> turn;
  for (Job job = jobs.begin(); jobs.has(job); jobs.advance(job), turn.advance()) {
    if (job.piece == 0) {
      const Selection s = select(p, to, job.token, job.chunk, lane);
      dst = row_address(p, to, s);
      row_scales = nullptr;
      if (dst != nullptr) {
        const Destination& there = to[s.rank];
        row_scales = reinterpret_cast<std::int32_t*>(there.block + there.at.scales_at) + there.at.first_scale(s.row);
        scale_stride = there.at.scale_column_stride;
      }
    }
    std::byte* const buffer = buffers + turn.at * p.stage_bytes;
#if EP_BULK_COPY
    ptx::bulk_wait_read<kBuffers - 1>();
    __syncwarp();
#endif
    const int first_group = job.piece * groups_of_piece;
    const int end_group = min(first_group + groups_of_piece, groups);
    for (int group = first_group; group < end_group; group += kGroupsAhead) {
      typename Number::Four v[kGroupsAhead];
#pragma unroll
      for (int g = 0; g < kGroupsAhead; ++g) v[g] = ahead[g];
      if (group + kGroupsAhead < end_group) {
        load_groups<Number>(source(job), p.hidden, group + kGroupsAhead, ahead, lane);
      } else {
        Job next = job;
        jobs.advance(next);
        if (jobs.has(next)) load_groups<Number>(source(next), p.hidden, next.piece * groups_of_piece, ahead, lane);
      }
      std::uint32_t largest = 0;  // lane g: of group g
#pragma unroll
      for (int g = 0; g < kGroupsAhead; ++g) {
        const std::uint32_t of_group = __reduce_max_sync(kAll, Number::largest_bits(v[g]));
        if (lane == g) largest = of_group;
      }
      const bool all_plain = __all_sync(kAll, largest < static_cast<std::uint32_t>(plan::kFloatInfBits));
      if (!all_plain) {
#pragma unroll
        for (int g = 0; g < kGroupsAhead; ++g) {
          float x[4];
          Number::widen(v[g], x);
          const std::uint32_t of_group = __reduce_max_sync(kAll, largest_number(x));
          if (lane == g) largest = of_group;
        }
      }
      const plan::Fp8Scaling scaling = plan::fp8_scaling(static_cast<std::int32_t>(largest), p.scale_kind);
      store_scales(p, row_scales, scale_stride, scaling.scale, group, min(kGroupsAhead, end_group - group), lane);
#pragma unroll
      for (int g = 0; g < kGroupsAhead; ++g) {
        float x[4];
        Number::widen(v[g], x);
        const float factor = __shfl_sync(kAll, scaling.factor, g);
        const std::uint32_t codes = encode4(x, factor, all_plain);
        const std::int64_t channel = (group + std::int64_t{g}) * plan::kFp8Group + 4 * lane;
        if (group + g < end_group && channel < p.hidden)
          *reinterpret_cast<std::uint32_t*>(buffer + (channel - std::int64_t{first_group} * plan::kFp8Group)) = codes;
      }
    }
    const std::int64_t piece_at = std::int64_t{job.piece} * p.piece_bytes;
#if EP_BULK_COPY
    ptx::fence_shared_for_bulk();  // each lane's codes, before the copies that other lanes start
    __syncwarp();
    if (dst != nullptr) ptx::bulk_store(dst + piece_at, buffer, bytes_of_piece(p, job.piece));
    ptx::bulk_commit();
#else
    __syncwarp();
    for (unsigned rest = __ballot_sync(kAll, dst != nullptr); rest != 0; rest &= rest - 1) {
      auto* at =
          reinterpret_cast<std::byte*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(dst), __ffs(rest) - 1));
      for (int byte = 16 * lane; byte < bytes_of_piece(p, job.piece); byte += 16 * 32)
        ptx::store_streaming(at + piece_at + byte, *reinterpret_cast<const uint4*>(buffer + byte));
    }
    __syncwarp();
#endif
  }
#if EP_BULK_COPY
  ptx::bulk_wait_all();
#endif
}

// What is told of a token once per rank: ids, weights, where it came from, side tensors. All lanes, one receiver.
__device__ void write_arrival(const DispatchParams& p, const Destination& to, int rank, std::int64_t arrival, int token,
                              int lane) {
  const std::int64_t first = std::int64_t{token} * p.num_topk, there = arrival * p.num_topk;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  for (int k = lane; k < p.num_topk; k += 32) {
    const bool here = p.routes.dst_rank[first + k] == rank;
    if (!p.cached) {
      const std::int32_t slot = here ? p.routes.slot[first + k] : -1;
      std::byte* ids = to.block + to.at.topk_idx_at;
      if (p.shape.topk_idx_bytes == 8) {
        reinterpret_cast<std::int64_t*>(ids)[there + k] = slot;
      } else {
        reinterpret_cast<std::int32_t*>(ids)[there + k] = slot;
      }
      if (!by_rank)
        reinterpret_cast<std::int32_t*>(to.block + to.at.arrival_row_at)[there + k] =
            here ? static_cast<std::int32_t>(row_of(p, to, first + k, arrival)) : -1;
    }
    if (p.shape.topk_weights && by_rank)
      reinterpret_cast<float*>(to.block + to.at.topk_weights_at)[there + k] =
          here || !p.mask_topk_weights ? p.topk_weights[first + k] : 0.0f;
  }
  if (!p.cached && lane == 0) reinterpret_cast<std::int32_t*>(to.block + to.at.src_token_at)[arrival] = token;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* src = reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words;
    auto* dst = reinterpret_cast<std::int32_t*>(to.block + to.at.side_at[i]) + arrival * words;
    for (int word = lane; word < words; word += 32) dst[word] = src[word];
  }
}

// What goes beside each row: its weight where a row is one selection's, and the caller's scales. All lanes, one row.
__device__ void write_beside_row(const DispatchParams& p, const Destination& to, std::int64_t row,
                                 std::int64_t selection, int lane) {
  if (p.shape.topk_weights && p.layout != OutputLayout::kByRank && lane == 0)
    reinterpret_cast<float*>(to.block + to.at.topk_weights_at)[row] = p.topk_weights[selection];
  if (p.scales == nullptr) return;
  const std::int64_t token = selection / p.num_topk;
  for (int word = lane; word < p.shape.num_scales; word += 32)
    store_scale(p, to, row, word, p.scales[token * p.scale_strides[0] + word * p.scale_strides[1]]);
}

__device__ bool has_companions(const DispatchParams& p) {
  return !p.cached || p.shape.topk_weights || p.shape.num_side > 0 || p.scales != nullptr;
}

// Companion warps: everything beside the rows, and this rank's own record of where its tokens went.
__device__ void write_companions(const DispatchParams& p, const Destination* to, int warp, int warps, int lane) {
  if (!has_companions(p)) return;
  const int step = static_cast<int>(gridDim.x) * warps;
  for (int token = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x); token < p.num_tokens;
       token += step) {
    for (int chunk = 0; chunk * 32 < p.num_topk; ++chunk) {
      const Selection s = select(p, to, token, chunk, lane);
      const std::int64_t first = std::int64_t{token} * p.num_topk + chunk * 32;
      if (!p.cached && chunk * 32 + lane < p.num_topk) {
        p.routes.dst_row[first + lane] = s.rank >= 0 ? static_cast<std::int32_t>(s.row) : -1;
        p.routes.dst_arrival[first + lane] = s.rank >= 0 ? static_cast<std::int32_t>(s.arrival) : -1;
      }
      const bool one_per_rank = p.layout == OutputLayout::kByRank;
      for (unsigned rest = __ballot_sync(kAll, s.rank >= 0 && (s.first || !one_per_rank)); rest != 0;
           rest &= rest - 1) {
        const int from = __ffs(rest) - 1;
        const int rank = __shfl_sync(kAll, s.rank, from);
        const std::int64_t row = __shfl_sync(kAll, static_cast<long long>(s.row), from);
        const std::int64_t arrival = __shfl_sync(kAll, static_cast<long long>(s.arrival), from);
        if (__shfl_sync(kAll, static_cast<int>(s.first), from)) write_arrival(p, to[rank], rank, arrival, token, lane);
        write_beside_row(p, to[rank], row, first + from, lane);
      }
    }
  }
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
        for (int word = lane; word < p.shape.num_scales; word += 32) store_scale(p, mine, row, word, 0);
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
__global__ void __launch_bounds__(
    (crew_of(kRows != Rows::kAsTheyAre).movers + crew_of(kRows != Rows::kAsTheyAre).companions) * 32, 1)
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
  if (good && blockIdx.x == 0) reply(now, p);
  for (int dst = static_cast<int>(threadIdx.x); good && dst < p.common.num_ranks; dst += static_cast<int>(blockDim.x))
    good = await_reply(now, p, dst, to[dst]);
#if EP_BULK_COPY
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxMoverWarps * kStages; ++i) ptx::barrier_init(barriers + i);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
    if (warp >= p.mover_warps) {
      write_companions(p, to, warp - p.mover_warps, crew.companions, lane);
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

// How the rows are cut, and how many warps move them: as many as shared memory has stages for.
void share_work(DispatchParams& p, bool quantize, std::size_t room) {
  const std::size_t unit = quantize ? std::size_t{plan::kFp8Group} * kGroupsAhead : 16;
  const std::size_t pieces = (p.shape.row_bytes + kLargestPiece - 1) / kLargestPiece;
  const std::size_t piece = plan::align_up((p.shape.row_bytes + pieces - 1) / pieces, unit);
  p.piece_bytes = static_cast<int>(piece);
  p.stage_bytes = static_cast<int>(plan::align_up(piece, 128));
  const auto of_warp = static_cast<std::size_t>(p.stage_bytes) * (quantize ? 2 : kStages);
  const auto fit = static_cast<int>(room / of_warp);
  const int most = crew_of(quantize).movers;
  p.mover_warps = fit < 1 ? 1 : fit > most ? most : fit;
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
  share_work(params, quantize, static_cast<std::size_t>(shared_limit) - head);
  const std::size_t stages =
      static_cast<std::size_t>(params.mover_warps) * params.stage_bytes * (quantize ? 2 : kStages);
  void* arguments[] = {&params};
  const dim3 threads(static_cast<unsigned>(params.mover_warps + crew_of(quantize).companions) * 32);
  cudaLaunchKernel(kernel_of(quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)), threads, arguments,
                   head + stages, stream);
}

const void* dispatch_kernel(bool quantize, DType dtype) { return kernel_of(quantize, dtype); }

}  // namespace deep_ep::cuda
