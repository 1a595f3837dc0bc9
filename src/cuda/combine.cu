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
  auto* const steps = static_cast<plan::SumStep*>(p.steps);
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int token = static_cast<int>(blockIdx.x + threadIdx.x * gridDim.x); token < p.num_tokens; token += step) {
    const std::int64_t first = std::int64_t{token} * p.num_topk;
    p.num_steps[token] =
        plan::make_sum_steps({p.order, p.layout == OutputLayout::kByRank, p.num_topk, p.dst_rank + first, p.node_of_rank},
                             steps + first);
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

// One piece of one token. Rows of peers are read past L1, which does not see what they write.
template <class Number, bool kLevels>
__device__ void sum_piece(const CombineParams& p, const Source* sources, int token, int piece, int lane) {
  constexpr int kElements = kFours * 128;
  const std::int64_t piece_at = std::int64_t{piece} * kElements, row_bytes = p.hidden * Number::kBytes;
  const auto fours = static_cast<int>((p.hidden - piece_at < kElements ? p.hidden - piece_at : kElements) / 4);
  const std::int64_t first = std::int64_t{token} * p.num_topk, home = token * row_bytes + piece_at * Number::kBytes;
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
  const int count = p.num_steps[token];
  for (int base = 0; base < count; base += 32) {
    plan::SumStep step{};
    const std::byte* row = nullptr;
    float weight = 1;
    if (base + lane < count) {
      step = static_cast<const plan::SumStep*>(p.steps)[first + base + lane];
      if (sources[step.rank].x != nullptr)
        row = sources[step.rank].x + p.dst_row[first + step.k] * row_bytes + piece_at * Number::kBytes;
      if (p.weights != nullptr) weight = p.weights[first + step.k];
    }
    const int here = min(32, count - base);
    typename Number::Four next[kFours];
    const auto fetch = [&](int i) {
      const auto* at =
          reinterpret_cast<const std::byte*>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), i));
      load_piece<Number>(at, at != nullptr ? fours : 0, next, lane);
    };
    fetch(0);
    for (int i = 0; i < here; ++i) {
#pragma unroll
      for (int j = 0; j < kFours; ++j) v[j] = next[j];
      if (i + 1 < here) fetch(i + 1);
      const float w = __shfl_sync(kAll, weight, i);
      if constexpr (!kLevels) {
        add_row<Number>(sums.of_all, v, p.weights != nullptr, w);
      } else {
        const bool closes_rank = __shfl_sync(kAll, static_cast<int>(step.closes_rank), i);
        const bool closes_node = __shfl_sync(kAll, static_cast<int>(step.closes_node), i);
        add_row<Number>(p.order.round_per_rank ? sums.of_rank : sums.of_node, v, p.weights != nullptr, w);
        if (closes_rank) close<Number>(sums.of_rank, p.order.round_per_node ? sums.of_node : sums.of_all);
        if (closes_node) close<Number>(sums.of_node, sums.of_all);
      }
    }
  }
  if (!p.order.bias_first) add_biases();
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int at = 32 * i + lane;
    if (at < fours) __stcs(reinterpret_cast<typename Number::Four*>(p.out + home) + at, Number::narrow(sums.of_all[i]));
  }
}

template <class Number, bool kLevels>
__device__ void sum_tokens(const CombineParams& p, const Source* sources, int warp, int lane) {
  constexpr int kElements = kFours * 128;
  const auto pieces = static_cast<int>((p.hidden + kElements - 1) / kElements);
  const std::int64_t jobs = std::int64_t{p.num_tokens} * pieces;
  const std::int64_t step = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t job = blockIdx.x + std::int64_t{warp} * gridDim.x; job < jobs; job += step)
    sum_piece<Number, kLevels>(p, sources, static_cast<int>(job / pieces), static_cast<int>(job % pieces), lane);
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
  extern __shared__ Source sources[];
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
  if (__syncthreads_and(good)) {
    if (p.hidden > 0) sum_tokens<Number, kLevels>(p, sources, warp, lane);
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
                   sizeof(Source) * params.common.num_ranks, stream);
}

}  // namespace deep_ep::cuda
