// SPDX-License-Identifier: MIT
// High-throughput combine: rows stay where the experts' rank put them; each token's home reads and adds them in the
// plan's order. Pulling moves each row once over the link and writes sums only; pushing would write every row and read
// it again. Phases: announce, plan steps, await sources, sum, part.
#include "cuda/combine_feed.cuh"
#include "cuda/encode.cuh"
#include "cuda/progress.cuh"
#include "plan/sum_order.h"

namespace deep_ep::cuda {

namespace {

// Vectors of sixteen bytes that a lane sums at a time: as many as registers hold. Seven cut 7168 channels of 16 bits
// into four even pieces.
template <bool kLevels>
constexpr int kVectorsOf = kLevels ? 2 : 7;

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

// Phase plan steps: a thread per token, while the announcements travel. Same table as on the host, without the rows of
// ranks that take no part: a sum that was complete after such a row is so after the row before it, if that is in it.
// The tokens are those that this block sums.
__device__ void plan_steps(const CombineParams& p) {
  plan::SumStep local[kMostLocalSteps];
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int token = static_cast<int>(blockIdx.x + threadIdx.x * gridDim.x); token < p.num_tokens; token += step) {
    const std::int64_t first = std::int64_t{token} * p.num_topk;
    plan::SumStep* const steps = p.steps != nullptr ? p.steps + first : local;
    Term* const terms = p.terms + first;
    const int count = plan::make_sum_steps(
        {p.order, p.layout == OutputLayout::kByRank, p.num_topk, p.dst_rank + first, p.node_of_rank}, steps);
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const plan::SumStep s = steps[i];
      if (p.common.peers[s.rank].active != 0) {
        terms[kept++] = {p.dst_row[first + s.k], s.rank, p.weights != nullptr ? p.weights[first + s.k] : 1.0f,
                         (s.closes_rank ? Term::kRank : 0) | (s.closes_node ? Term::kNode : 0)};
      } else if (s.closes_node && kept > 0 && p.node_of_rank[terms[kept - 1].rank] == p.node_of_rank[s.rank]) {
        terms[kept - 1].closes |= Term::kNode;
      }
    }
    p.num_terms[token] = kept;
  }
}

// A lane's part of a sum.
template <class Number, int kVectors>
struct Sum {
  static constexpr int kElements = 16 / Number::kBytes;
  float x[kVectors][kElements] = {};

  template <bool kWeighted>
  __device__ void add(int i, uint4 vector, float weight) {
    float value[kElements];
    Number::widen_sixteen(vector, value);
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      x[i][j] = kWeighted ? plan::fma_rn(weight, value[j], x[i][j]) : plan::add_rn(x[i][j], value[j]);
  }
  __device__ uint4 narrow(int i) const { return Number::narrow_sixteen(x[i]); }
  // A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
  __device__ void close_into(Sum& above) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) above.template add<false>(i, narrow(i), 1);
    *this = Sum{};
  }
};

// One piece of one token.
struct PieceAt {
  std::int64_t home;  // bytes from the beginning of the output
  int bytes, lane;
  __device__ bool has(int i) const { return (32 * i + lane) * 16 < bytes; }
};

template <class Number, int kVectors>
__device__ void add_biases(const CombineParams& p, const PieceAt& at, Sum<Number, kVectors>& sum) {
  for (const std::byte* const bias : p.bias) {
    if (bias == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (at.has(i)) sum.template add<false>(i, reinterpret_cast<const uint4*>(bias + at.home)[32 * i + at.lane], 1);
  }
}

// One piece: every term in order, level by level.
template <class Number, bool kLevels, bool kWeighted, int kVectors>
__device__ void add_terms(const CombineParams& p, const TermReader& reader, Terms& terms, int piece,
                          Feed<kVectors>& feed, Sum<Number, kVectors>& of_all) {
  const int bytes = reader.share.bytes(piece);
  Sum<Number, kLevels ? kVectors : 1> of_rank, of_node;
  for (int number = 0; number < terms.count; ++number) {
    reader.reach(terms, number);
    const float weight = kWeighted ? terms.weight_of(number) : 1;
    const uint4* const vectors = feed.await(terms, number, piece);
    if constexpr (!kLevels) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) of_all.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
    } else {
      if (p.order.round_per_rank) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) of_rank.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
      } else {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) of_node.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
      }
      const int closes = terms.closes_of(number);
      if ((closes & Term::kRank) != 0 && p.order.round_per_node) of_rank.close_into(of_node);
      if ((closes & Term::kRank) != 0 && !p.order.round_per_node) of_rank.close_into(of_all);
      if ((closes & Term::kNode) != 0) of_node.close_into(of_all);
    }
    feed.release();
  }
}

template <class Number, bool kLevels, bool kWeighted>
__device__ void sum_tokens(const CombineParams& p, const TermReader& reader, std::byte* ring, std::uint64_t* full) {
  constexpr int kVectors = kVectorsOf<kLevels>;
  const Share& share = reader.share;
  Feed<kVectors> feed(reader, ring, full);
  Terms next = reader.read(share.first);
  for (int token = share.first; token < share.end; token += share.step) {
    Terms terms = next;
    next = reader.read(token + share.step);
    for (int piece = 0; piece < share.pieces; ++piece) {
      const PieceAt at{token * share.row_bytes + share.piece_at(piece), share.bytes(piece), reader.lane};
      Sum<Number, kVectors> sum;
      if (p.order.bias_first) add_biases(p, at, sum);
      add_terms<Number, kLevels, kWeighted>(p, reader, terms, piece, feed, sum);
      if (!p.order.bias_first) add_biases(p, at, sum);
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (at.has(i)) __stcs(reinterpret_cast<uint4*>(p.out + at.home) + 32 * i + at.lane, sum.narrow(i));
    }
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
  using MyFeed = Feed<kVectorsOf<kLevels>>;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ std::uint64_t full[kWarps][MyFeed::kBarriers];
  auto* const sources = reinterpret_cast<Source*>(shared + kWarps * MyFeed::kBytes);
  const Now now(p.common);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (blockIdx.x == 0) announce(now, p);
  if (p.hidden > 0) plan_steps(p);
  bool good = true;
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
  if (lane < MyFeed::kBarriers) {
    ptx::barrier_init(&full[warp][lane], 1);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
#if EP_BULK_COPY
    ptx::fence_for_bulk();  // the rows were acquired by ordinary loads of the announcements
#endif
    const Share share(p, p.hidden * Number::kBytes, MyFeed::kPiece, warp);
    const TermReader reader{p, sources, share, lane};
    std::byte* const ring = shared + warp * MyFeed::kBytes;
    if (p.hidden > 0 && p.weights != nullptr) sum_tokens<Number, kLevels, true>(p, reader, ring, full[warp]);
    if (p.hidden > 0 && p.weights == nullptr) sum_tokens<Number, kLevels, false>(p, reader, ring, full[warp]);
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
                   kRingBytes * kWarps + sizeof(Source) * params.common.num_ranks, stream);
}

}  // namespace deep_ep::cuda
