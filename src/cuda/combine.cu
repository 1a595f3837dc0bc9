// SPDX-License-Identifier: MIT
// High-throughput combine: rows stay where the experts' rank put them; each token's home reads and adds them in the
// plan's order. Pulling moves each row once over the link and writes sums only; pushing would write every row and read
// it again. Phases: announce, plan steps, await sources, sum, part.
#include "cuda/encode.cuh"
#include "cuda/kernels.h"
#include "cuda/wait.cuh"
#include "plan/sum_order.h"

namespace deep_ep::cuda {

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
// Fours of elements that a lane sums at a time: as many as registers hold. 14 cut 7168 channels into four even pieces.
template <class Number, bool kLevels>
constexpr int kFoursOf = kLevels               ? 4
                         : Number::kBytes == 4 ? 8
                                               : 14;

static_assert(sizeof(plan::SumStep) == 12);  // operations.cpp makes room for so much

struct Source {
  const std::byte* x;  // null: takes no part
  const float* weights;
};

// Phase announce: where our rows lie.
__device__ void announce(const Now& now, const CombineParams& p) {
  const int me = p.common.rank;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer)) continue;
    await_room(now, peer);
    Announcement& mine = now.announcement(peer, me);
    for (int field = 0; field < Signature::kNumFields; ++field) mine.signature[field] = p.common.signature[field];
    mine.x_at = p.x_at;
    mine.weights_at = p.weights_at;
    // Release: rows that earlier kernels of this stream wrote come before it too.
    publish(now, &now.words(peer, me).announced, kSame);
  }
}

// Phase plan steps: a thread per token, while the announcements travel. Same table as on the host.
__device__ void plan_steps(const CombineParams& p) {
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int token = static_cast<int>(blockIdx.x + threadIdx.x * gridDim.x); token < p.num_tokens; token += step) {
    const std::int64_t first = std::int64_t{token} * p.num_topk;
    auto* const steps = static_cast<plan::SumStep*>(p.steps) + first;
    const int count = plan::make_sum_steps(
        {p.order, p.layout == OutputLayout::kByRank, p.num_topk, p.dst_rank + first, p.node_of_rank}, steps);
    for (int i = 0; i < count; ++i)
      p.terms[first + i] = {p.dst_row[first + steps[i].k], steps[i].rank, steps[i].k,
                            (steps[i].closes_rank ? Term::kRank : 0) | (steps[i].closes_node ? Term::kNode : 0)};
    p.num_terms[token] = count;
  }
}

template <class Number, bool kWeighted>
__device__ void add_four(float (&sum)[4], typename Number::Four v, float weight) {
  float x[4];
  Number::widen(v, x);
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = kWeighted ? plan::fma_rn(weight, x[j], sum[j]) : plan::add_rn(sum[j], x[j]);
}

// Adds a lane's part of a piece that lies at `from`, in shared or in global memory.
template <class Number, bool kWeighted, int kFours>
__device__ void add_piece(float (&sum)[kFours][4], const typename Number::Four* from, int fours, float weight,
                          int lane) {
  if (fours == 32 * kFours) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) add_four<Number, kWeighted>(sum[i], from[32 * i + lane], weight);
  } else {
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (32 * i + lane < fours) add_four<Number, kWeighted>(sum[i], from[32 * i + lane], weight);
  }
}

// A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
template <class Number, int kFours>
__device__ void close(float (&sum)[kFours][4], float (&into)[kFours][4]) {
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    add_four<Number, false>(into[i], Number::narrow(sum[i]), 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0;
  }
}

// The terms of one token as a warp holds them: lane i has term base + i.
struct Terms {
  int token, count, base;
  Term term;
};

__device__ Terms load_terms(const CombineParams& p, int token, int base, int lane) {
  Terms t{token, 0, base, Term{}};
  if (token >= p.num_tokens) return t;
  t.count = p.num_terms[token];
  if (base + lane < p.num_topk) t.term = p.terms[std::int64_t{token} * p.num_topk + base + lane];
  return t;
}

constexpr int kRingBytes = 12288;  // of one warp
constexpr int kMostStages = 12;

// A warp's tokens in turn, each in pieces, each piece term by term: one row's piece after the other. With bulk copies a
// producer runs ahead of the sums by as many as the ring holds; it knows the next token's terms before it gets there.
template <class Number, int kFours>
struct Feed {
  using Four = typename Number::Four;
  static constexpr int kPiece = kFours * 32 * static_cast<int>(sizeof(Four));
  static constexpr int kStages = kRingBytes / kPiece;
  static_assert(kStages >= 2 && kStages <= kMostStages);

  const CombineParams& p;
  const Source* sources;
  int lane, step, pieces, last_bytes;
  std::byte* ring;
  std::uint64_t* full;

  Terms now, next;
  const std::byte* row = nullptr;  // of the lane's term in `now`
  int piece = 0, index = 0;
  int filling = 0, emptying = 0;
  std::uint32_t parity = 0;

  __device__ std::int64_t row_bytes() const { return p.hidden * Number::kBytes; }
  __device__ int bytes_of(int of_piece) const { return of_piece + 1 == pieces ? last_bytes : kPiece; }
  // Where the lane's own term of this chunk lies; null: its rank takes no part.
  __device__ const std::byte* row_of(const Terms& t) const {
    const bool valid = t.base + lane < t.count && sources[t.term.rank].x != nullptr;
    return valid ? sources[t.term.rank].x + t.term.row * row_bytes() : nullptr;
  }
  __device__ static const std::byte* of_lane(const std::byte* mine, int from) {
    return reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), from));
  }

#if EP_BULK_COPY
  __device__ void start(int first) {
    now = load_terms(p, first, 0, lane);
    next = load_terms(p, first + step, 0, lane);
    row = row_of(now);
    for (int i = 0; i < kStages; ++i) produce();
  }
  // Starts one more load, if there is one. All lanes; the stage must be free.
  __device__ void produce() {
    while (now.token < p.num_tokens && (now.count == 0 || piece == pieces)) {
      piece = index = 0;
      now = next;
      row = row_of(now);
      next = load_terms(p, now.token + step, 0, lane);
    }
    if (now.token >= p.num_tokens) return;
    if (now.count > 32 && index % 32 == 0) {
      now = load_terms(p, now.token, index, lane);
      row = row_of(now);
    }
    const std::byte* from = of_lane(row, index % 32);
    if (lane == 0) {
      if (from != nullptr) {
        ptx::bulk_load(ring + filling * kPiece, from + std::int64_t{piece} * kPiece,
                       static_cast<std::uint32_t>(bytes_of(piece)), full + filling);
      } else {
        ptx::barrier_arrive(full + filling);
      }
    }
    if (++filling == kStages) filling = 0;
    if (++index == now.count) index = 0, ++piece;
  }
  // The next piece in order, once it is there; release() fills its stage again.
  __device__ const Four* take(const std::byte*, int) {
    ptx::barrier_wait(full + emptying, parity);
    const auto* stage = reinterpret_cast<const Four*>(ring + emptying * kPiece);
    if (++emptying == kStages) emptying = 0, parity ^= 1;
    return stage;
  }
  __device__ void release() {
    __syncwarp();  // all lanes have read the stage
    produce();
  }
#else
  __device__ void start(int) {}
  __device__ const Four* take(const std::byte* from, int of_piece) {
    return reinterpret_cast<const Four*>(from + std::int64_t{of_piece} * kPiece);
  }
  __device__ void release() {}
#endif
};

// One token: piece by piece, every term in order, then the sum goes home.
template <class Number, bool kLevels, bool kWeighted, int kFours>
__device__ void sum_token(const CombineParams& p, Feed<Number, kFours>& feed, Terms terms) {
  using Four = typename Number::Four;
  const std::int64_t first = std::int64_t{terms.token} * p.num_topk;
  const int lane = feed.lane;
  const std::byte* row = feed.row_of(terms);
  float weight = 1;
  for (int piece = 0; piece < feed.pieces; ++piece) {
    const std::int64_t home = terms.token * feed.row_bytes() + std::int64_t{piece} * Feed<Number, kFours>::kPiece;
    const int fours = feed.bytes_of(piece) / static_cast<int>(sizeof(Four));
    float of_all[kFours][4] = {};
    float of_rank[kLevels ? kFours : 1][4] = {}, of_node[kLevels ? kFours : 1][4] = {};
    const auto add_biases = [&] {
      for (int i = 0; i < 2; ++i)
        if (p.bias[i] != nullptr)
          add_piece<Number, false>(of_all, reinterpret_cast<const Four*>(p.bias[i] + home), fours, 1, lane);
    };
    if (p.order.bias_first) add_biases();
    for (int i = 0; i < terms.count; ++i) {
      if (i % 32 == 0 && (terms.count > 32 || piece == 0)) {
        if (terms.count > 32) terms = load_terms(p, terms.token, i, lane), row = feed.row_of(terms);
        if (kWeighted && i + lane < terms.count) weight = p.weights[first + terms.term.k];
      }
      const std::byte* const from = feed.of_lane(row, i % 32);
      const float w = kWeighted ? __shfl_sync(kAllLanes, weight, i % 32) : 1;
      const Four* const values = feed.take(from, piece);
      if constexpr (!kLevels) {
        if (from != nullptr) add_piece<Number, kWeighted>(of_all, values, fours, w, lane);
      } else {
        if (from != nullptr) {
          if (p.order.round_per_rank) {
            add_piece<Number, kWeighted>(of_rank, values, fours, w, lane);
          } else {
            add_piece<Number, kWeighted>(of_node, values, fours, w, lane);
          }
        }
        const int closes = __shfl_sync(kAllLanes, terms.term.closes, i % 32);
        if ((closes & Term::kRank) != 0) {
          if (p.order.round_per_node) {
            close<Number>(of_rank, of_node);
          } else {
            close<Number>(of_rank, of_all);
          }
        }
        if ((closes & Term::kNode) != 0) close<Number>(of_node, of_all);
      }
      feed.release();
    }
    if (!p.order.bias_first) add_biases();
    Four out[kFours];
    Number::narrow_all(of_all, out);
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      if (32 * i + lane < fours) __stcs(reinterpret_cast<Four*>(p.out + home) + 32 * i + lane, out[i]);
  }
}

template <class Number, bool kLevels, bool kWeighted>
__device__ void sum_tokens(const CombineParams& p, const Source* sources, std::byte* rings, std::uint64_t* full,
                           int warp, int lane) {
  constexpr int kFours = kFoursOf<Number, kLevels>;
  using MyFeed = Feed<Number, kFours>;
  const int first = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
  const int step = static_cast<int>(gridDim.x) * kWarps;
  const std::int64_t row_bytes = p.hidden * Number::kBytes;
  const auto pieces = static_cast<int>((row_bytes + MyFeed::kPiece - 1) / MyFeed::kPiece);
  const auto last_bytes = static_cast<int>(row_bytes - std::int64_t{pieces - 1} * MyFeed::kPiece);
  MyFeed feed{p, sources, lane, step, pieces, last_bytes, rings + warp * kRingBytes, full + warp * kMostStages, {}, {}};
  feed.start(first);
  Terms next = load_terms(p, first, 0, lane);
  for (int token = first; token < p.num_tokens; token += step) {
    const Terms terms = next;
    next = load_terms(p, token + step, 0, lane);
    sum_token<Number, kLevels, kWeighted>(p, feed, terms);
  }
}

// Weights that travelled home beside the rows: a thread per entry.
__device__ float weight_from_home(const CombineParams& p, const Source* sources, int token, int k) {
  const std::int64_t first = std::int64_t{token} * p.num_topk;
  const std::int32_t* rank = p.dst_rank + first;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  if (rank[k] < 0 || sources[rank[k]].x == nullptr) return 0;
  if (!by_rank || p.weights_home == WeightsHome::kFromOwner) {
    const std::int64_t row = p.dst_row[first + k];
    return __ldcv(sources[rank[k]].weights + (by_rank ? row * p.num_topk + k : row));
  }
  float sum = 0;
  for (int r = 0; r < p.common.num_ranks; ++r) {
    int found = 0;
    while (found < p.num_topk && rank[found] != r) ++found;
    if (found == p.num_topk || sources[r].x == nullptr) continue;
    sum = plan::add_rn(sum, __ldcv(sources[r].weights + std::int64_t{p.dst_row[first + found]} * p.num_topk + k));
  }
  return sum;
}

__device__ void bring_weights_home(const CombineParams& p, const Source* sources) {
  const std::int64_t entries = std::int64_t{p.num_tokens} * p.num_topk;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < entries;
       i += std::int64_t{gridDim.x} * kThreads)
    p.weights_out[i] = weight_from_home(p, sources, static_cast<int>(i / p.num_topk), static_cast<int>(i % p.num_topk));
}

// Phase part: nobody leaves while another still reads its rows.
__device__ void part(const Now& now, const CombineParams& p) {
  const int me = p.common.rank;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer) || peer == me) continue;
    // A rank that has left already gave up on us; what we read of it since may be something else.
    if (ptx::load_acquire_system(&now.progress(me, peer).sent) >= now.epoch) report(now, Fault::kGaveUp, peer, 1, 0);
  }
  __syncthreads();
  if (has_failed(now)) return;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer)) continue;
    publish(now, &now.words(peer, me).finished, 1);
    std::uint32_t value = 0;
    if (!await(now, &now.words(me, peer).finished, value, peer)) report(now, Fault::kTimeout, peer, 1, 0);
  }
}

}  // namespace

template <class Number, bool kLevels>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ std::uint64_t full[kWarps * kMostStages];
  auto* const sources = reinterpret_cast<Source*>(shared + kWarps * kRingBytes);
  const Now now(p.common);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (blockIdx.x == 0) announce(now, p);
  if (p.hidden > 0) plan_steps(p);
  bool good = p.hidden == 0 || grid_barrier(now);
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    sources[peer] = {};
    if (!now.active(peer)) continue;
    if (!await_same_call(now, peer)) {
      good = false;
      continue;
    }
    const Announcement& theirs = now.announcement(p.common.rank, peer);
    sources[peer] = {now.window(peer) + theirs.x_at,
                     reinterpret_cast<const float*>(now.window(peer) + theirs.weights_at)};
  }
#if EP_BULK_COPY
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps * kMostStages; ++i) ptx::barrier_init(full + i, 1);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
#if EP_BULK_COPY
    ptx::fence_for_bulk();  // the rows were acquired by ordinary loads of the announcements
#endif
    if (p.hidden > 0 && p.weights != nullptr) sum_tokens<Number, kLevels, true>(p, sources, shared, full, warp, lane);
    if (p.hidden > 0 && p.weights == nullptr) sum_tokens<Number, kLevels, false>(p, sources, shared, full, warp, lane);
    if (p.weights_out != nullptr) bring_weights_home(p, sources);
  }
  if (!last_block(now)) return;
  part(now, p);
  finish(now);
}

const void* combine_kernel(DType dtype, bool levels) {
  if (dtype == DType::kBf16)
    return levels ? reinterpret_cast<const void*>(&combine<Bf16, true>)
                  : reinterpret_cast<const void*>(&combine<Bf16, false>);
  if (dtype == DType::kFp16)
    return levels ? reinterpret_cast<const void*>(&combine<Fp16, true>)
                  : reinterpret_cast<const void*>(&combine<Fp16, false>);
  return levels ? reinterpret_cast<const void*>(&combine<Fp32, true>)
                : reinterpret_cast<const void*>(&combine<Fp32, false>);
}

void launch_combine(const CombineParams& params, int blocks, cudaStream_t stream) {
  const bool levels = params.order.round_per_rank || params.order.round_per_node;
  CombineParams copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(combine_kernel(params.dtype, levels), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                   kWarps * kRingBytes + sizeof(Source) * params.common.num_ranks, stream);
}

}  // namespace deep_ep::cuda
