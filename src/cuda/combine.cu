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

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kFours = 8;  // of each lane: a warp adds kFours * 128 elements of a token at a time

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
                            (steps[i].closes_rank ? 1 : 0) | (steps[i].closes_node ? 2 : 0)};
    p.num_terms[token] = count;
  }
}

template <class Number, bool kLevels>
struct Sums {
  float of_all[kFours][4];
  float of_rank[kLevels ? kFours : 1][4];
  float of_node[kLevels ? kFours : 1][4];
};

template <class Number>
__device__ void add_row(float (&sum)[kFours][4], const typename Number::Four (&v)[kFours], bool weighted, float weight) {
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    float x[4];
    Number::widen(v[i], x);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = weighted ? plan::fma_rn(weight, x[j], sum[i][j]) : plan::add_rn(sum[i][j], x[j]);
  }
}

// A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
template <class Number>
__device__ void close(float (&sum)[kFours][4], float (&into)[kFours][4]) {
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    float rounded[4];
    Number::widen(Number::narrow(sum[i]), rounded);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      into[i][j] = plan::add_rn(into[i][j], rounded[j]);
      sum[i][j] = 0;
    }
  }
}

template <class Number>
__device__ void load_piece(const std::byte* row, int fours, typename Number::Four (&v)[kFours], int lane) {
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    v[i] = {};
    const int at = 32 * i + lane;
    if (at < fours) v[i] = __ldcv(reinterpret_cast<const typename Number::Four*>(row) + at);
  }
}

// The terms of one token as a warp holds them: lane i has term base + i.
struct Terms {
  int token, count, base;
  Term term;
};

__device__ Terms load_terms(const CombineParams& p, int token, int base, int lane) {
  Terms t{token, 0, base, {}};
  if (token >= p.num_tokens) return t;
  t.count = p.num_terms[token];
  if (base + lane < p.num_topk) t.term = p.terms[std::int64_t{token} * p.num_topk + base + lane];
  return t;
}

template <class Number>
constexpr int kPieceBytes = kFours * 128 * Number::kBytes;
constexpr int kRingBytes = 12288;  // of one warp
template <class Number>
constexpr int kRingStages = kRingBytes / kPieceBytes<Number>;
constexpr int kMostStages = kRingBytes / (kFours * 128 * 2);

// A warp's tokens in turn, each in pieces, each piece term by term: one row's piece after the other. With bulk copies a
// producer runs ahead of the sums by as many as the ring holds; it knows the next token's terms before it gets there.
template <class Number>
struct Feed {
  const CombineParams& p;
  const Source* sources;
  int lane, step, pieces;
  std::byte* ring;
  std::uint64_t* full;

  Terms now, next;
  int piece = 0, index = 0;
  int filling = 0, emptying = 0;
  std::uint32_t parity = 0;

  __device__ std::int64_t row_bytes() const { return p.hidden * Number::kBytes; }
  __device__ int bytes_of(int of_piece) const {
    const std::int64_t left = row_bytes() - std::int64_t{of_piece} * kPieceBytes<Number>;
    return left < kPieceBytes<Number> ? static_cast<int>(left) : kPieceBytes<Number>;
  }
  // Where the lane's own term of this chunk lies; null: its rank takes no part.
  __device__ const std::byte* row_of(const Terms& t) const {
    const bool valid = t.base + lane < t.count && sources[t.term.rank].x != nullptr;
    return valid ? sources[t.term.rank].x + t.term.row * row_bytes() : nullptr;
  }

#if EP_BULK_COPY
  __device__ void start(int first) {
    now = load_terms(p, first, 0, lane);
    next = load_terms(p, first + step, 0, lane);
    for (int i = 0; i < kRingStages<Number>; ++i) produce();
  }
  // Starts one more load, if there is one. All lanes; the stage must be free.
  __device__ void produce() {
    while (now.token < p.num_tokens && (now.count == 0 || piece == pieces)) {
      piece = index = 0;
      now = next;
      next = load_terms(p, now.token + step, 0, lane);
    }
    if (now.token >= p.num_tokens) return;
    if (now.count > 32 && index % 32 == 0) now = load_terms(p, now.token, index, lane);
    const std::byte* row = row_of(now);
    row = reinterpret_cast<const std::byte*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), index % 32));
    if (lane == 0) {
      if (row != nullptr) {
        ptx::bulk_load(ring + filling * kPieceBytes<Number>, row + std::int64_t{piece} * kPieceBytes<Number>,
                       static_cast<std::uint32_t>(bytes_of(piece)), full + filling);
      } else {
        ptx::barrier_arrive(full + filling);
      }
    }
    if (++filling == kRingStages<Number>) filling = 0;
    if (++index == now.count) index = 0, ++piece;
  }
  // The next piece in order; its stage is filled again at once.
  __device__ void take(const std::byte*, int of_piece, typename Number::Four (&v)[kFours]) {
    ptx::barrier_wait(full + emptying, parity);
    const auto* stage = reinterpret_cast<const typename Number::Four*>(ring + emptying * kPieceBytes<Number>);
    const int fours = bytes_of(of_piece) / static_cast<int>(sizeof(typename Number::Four));
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      v[i] = {};
      if (32 * i + lane < fours) v[i] = stage[32 * i + lane];
    }
    if (++emptying == kRingStages<Number>) emptying = 0, parity ^= 1;
    __syncwarp();  // all lanes have read the stage
    produce();
  }
#else
  __device__ void start(int) {}
  __device__ void take(const std::byte* row, int of_piece, typename Number::Four (&v)[kFours]) {
    const int fours = bytes_of(of_piece) / static_cast<int>(sizeof(typename Number::Four));
    load_piece<Number>(row + std::int64_t{of_piece} * kPieceBytes<Number>, row != nullptr ? fours : 0, v, lane);
  }
#endif
};

// One token: piece by piece, every term in order, then the sum goes home.
template <class Number, bool kLevels>
__device__ void sum_token(const CombineParams& p, Feed<Number>& feed, Terms terms) {
  const std::int64_t first = std::int64_t{terms.token} * p.num_topk;
  const int lane = feed.lane;
  float weight = 1;
  for (int piece = 0; piece < feed.pieces; ++piece) {
    const std::int64_t home = terms.token * feed.row_bytes() + std::int64_t{piece} * kPieceBytes<Number>;
    const int fours = feed.bytes_of(piece) / static_cast<int>(sizeof(typename Number::Four));
    Sums<Number, kLevels> sums = {};
    typename Number::Four v[kFours];
    const auto add_biases = [&] {
      for (int i = 0; i < 2; ++i) {
        if (p.bias[i] == nullptr) continue;
        load_piece<Number>(p.bias[i] + home, fours, v, lane);
        add_row<Number>(sums.of_all, v, false, 1);
      }
    };
    if (p.order.bias_first) add_biases();
    for (int i = 0; i < terms.count; ++i) {
      if (i % 32 == 0) {
        if (terms.count > 32) terms = load_terms(p, terms.token, i, lane);
        if (p.weights != nullptr && i + lane < terms.count) weight = p.weights[first + terms.term.k];
      }
      const auto* row = reinterpret_cast<const std::byte*>(
          __shfl_sync(kAll, reinterpret_cast<unsigned long long>(feed.row_of(terms)), i % 32));
      feed.take(row, piece, v);
      const int closes = __shfl_sync(kAll, terms.term.closes, i % 32);
      const float w = __shfl_sync(kAll, weight, i % 32);
      if constexpr (!kLevels) {
        if (row != nullptr) add_row<Number>(sums.of_all, v, p.weights != nullptr, w);
      } else {
        if (row != nullptr)
          add_row<Number>(p.order.round_per_rank ? sums.of_rank : sums.of_node, v, p.weights != nullptr, w);
        if ((closes & 1) != 0) close<Number>(sums.of_rank, p.order.round_per_node ? sums.of_node : sums.of_all);
        if ((closes & 2) != 0) close<Number>(sums.of_node, sums.of_all);
      }
    }
    if (!p.order.bias_first) add_biases();
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int at = 32 * i + lane;
      if (at < fours)
        __stcs(reinterpret_cast<typename Number::Four*>(p.out + home) + at, Number::narrow(sums.of_all[i]));
    }
  }
}

template <class Number, bool kLevels>
__device__ void sum_tokens(const CombineParams& p, const Source* sources, std::byte* rings, std::uint64_t* full, int warp,
                           int lane) {
  const int first = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
  const int step = static_cast<int>(gridDim.x) * kWarps;
  const auto pieces = static_cast<int>((p.hidden * Number::kBytes + kPieceBytes<Number> - 1) / kPieceBytes<Number>);
  Feed<Number> feed{p, sources, lane, step, pieces, rings + warp * kRingBytes, full + warp * kMostStages, {}, {}};
  feed.start(first);
  Terms next = load_terms(p, first, 0, lane);
  for (int token = first; token < p.num_tokens; token += step) {
    const Terms terms = next;
    next = load_terms(p, token + step, 0, lane);
    sum_token<Number, kLevels>(p, feed, terms);
  }
}

// Weights that travelled home beside the rows: a thread per entry.
__device__ float weight_from_home(const CombineParams& p, const Source* sources, int token, int k) {
  const std::int64_t first = std::int64_t{token} * p.num_topk;
  const std::int32_t* rank = p.dst_rank + first;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  if (!by_rank || p.weights_home == WeightsHome::kFromOwner) {
    if (rank[k] < 0 || sources[rank[k]].x == nullptr) return 0;
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
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < entries; i += std::int64_t{gridDim.x} * kThreads)
    p.weights_out[i] =
        weight_from_home(p, sources, static_cast<int>(i / p.num_topk), static_cast<int>(i % p.num_topk));
}

// Phase part: nobody leaves while another still reads its rows.
__device__ void part(const Now& now, const CombineParams& p) {
  const int me = p.common.rank;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer) || peer == me) continue;
    // A rank that has left already gave up on us; what we read of it since may be something else.
    if (ptx::load_acquire_system(now.released(me, peer)) >= now.epoch) report(now, Fault::kGaveUp, peer, 1, 0);
  }
  __syncthreads();
  if (ptx::load_acquire(&p.common.state->failed) != 0) return;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer)) continue;
    publish(now, &now.words(peer, me).finished, 1);
    std::uint32_t value = 0;
    if (!await(now, &now.words(me, peer).finished, value)) report(now, Fault::kTimeout, peer, 1, 0);
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
  bool good = p.hidden == 0 || grid_barrier(now, 0);
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    sources[peer] = {};
    if (!now.active(peer)) continue;
    if (!await_same_call(now, peer)) {
      good = false;
      continue;
    }
    const Announcement& theirs = now.announcement(p.common.rank, peer);
    sources[peer] = {now.window(peer) + theirs.x_at, reinterpret_cast<const float*>(now.window(peer) + theirs.weights_at)};
  }
#if EP_BULK_COPY
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps * kMostStages; ++i) ptx::barrier_init(full + i);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
#if EP_BULK_COPY
    ptx::fence_for_bulk();  // the rows were acquired by ordinary loads of the announcements
#endif
    if (p.hidden > 0) sum_tokens<Number, kLevels>(p, sources, shared, full, warp, lane);
    if (p.weights_out != nullptr) bring_weights_home(p, sources);
  }
  if (!last_block(now)) return;
  part(now, p);
  finish(now);
}

const void* combine_kernel(DType dtype, bool levels) {
  if (dtype == DType::kBf16)
    return levels ? reinterpret_cast<const void*>(&combine<Bf16, true>) : reinterpret_cast<const void*>(&combine<Bf16, false>);
  if (dtype == DType::kFp16)
    return levels ? reinterpret_cast<const void*>(&combine<Fp16, true>) : reinterpret_cast<const void*>(&combine<Fp16, false>);
  return levels ? reinterpret_cast<const void*>(&combine<Fp32, true>) : reinterpret_cast<const void*>(&combine<Fp32, false>);
}

void launch_combine(const CombineParams& params, int blocks, cudaStream_t stream) {
  const bool levels = params.order.round_per_rank || params.order.round_per_node;
  CombineParams copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(combine_kernel(params.dtype, levels), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                   kWarps * kRingBytes + sizeof(Source) * params.common.num_ranks, stream);
}

}  // namespace deep_ep::cuda
