// SPDX-License-Identifier: MIT
// High-throughput combine: rows stay where the experts' rank put them; each token's home reads and adds them in the
// plan's order. Pulling moves each row once over the link and writes sums only; pushing would write every row and read
// it again. Phases: announce, plan steps, await sources, sum, part. Where there are far ranks another kernel comes
// before (forward_combine.h): it announces, and fetches their rows.
#include "cuda/combine_announce.cuh"
#include "cuda/combine_plan.cuh"
#include "cuda/progress.cuh"

namespace deep_ep::cuda {

namespace {

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

template <class Number, bool kLevels, bool kWeighted>
__device__ void sum_tokens(const CombineParams& p, const TermReader<CombineParams>& reader, const Ring& ring) {
  constexpr int kVectors = kVectorsOf<kLevels>;
  const Share& share = reader.share;
  Feed<kVectors> feed(reader, ring);
  Terms next = reader.read(share.first);
  for (int token = share.first; token < share.end; token += share.step) {
    Terms terms = next;
    next = reader.read(token + share.step);
    for (int piece = 0; piece < share.pieces; ++piece) {
      const PieceAt at{token * share.row_bytes + share.piece_at(piece), share.bytes(piece), reader.lane};
      Sum<Number, kVectors> sum;
      if (p.order.bias_first) add_biases(p, at, sum);
      add_terms<Number, kLevels, kWeighted>(p.order, reader, terms, piece, feed, sum);
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
    const std::int64_t row = p.weights_row[first + k];
    return __ldcv(sources[rank[k]].weights + (by_rank ? row * p.num_topk + k : row));
  }
  float sum = 0;
  for (int r = 0; r < p.common.num_ranks; ++r) {
    int found = 0;
    while (found < p.num_topk && rank[found] != r) ++found;
    if (found == p.num_topk || sources[r].x == nullptr) continue;
    sum = plan::add_rn(sum, __ldcv(sources[r].weights + std::int64_t{p.weights_row[first + found]} * p.num_topk + k));
  }
  return sum;
}

__device__ void bring_weights_home(const CombineParams& p, const Source* sources) {
  const std::int64_t entries = std::int64_t{p.num_tokens} * p.num_topk;
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < entries;
       i += std::int64_t{gridDim.x} * kThreads)
    p.weights_out[i] = weight_from_home(p, sources, static_cast<int>(i / p.num_topk), static_cast<int>(i % p.num_topk));
}

// What the kernel before brought of a far rank's rows.
__device__ Source fetched_from(const Now& now, const CombineParams& p, int peer) {
  if (!now.active(peer)) return {};
  const std::int64_t first = p.forwarded.asked[p.node_of_rank[peer]].first;
  return {p.forwarded.x + first * static_cast<std::int64_t>(p.row_bytes),
          p.forwarded.weights + first * p.forwarded.weights_of_unit, nullptr};
}

// Phase part: nobody leaves while another still reads its rows. Far ranks read none of them themselves.
__device__ void part(const Now& now, const CombineParams& p, const Source* sources) {
  const int me = p.common.rank;
  bool failed = has_failed_relaxed(now);  // last_block() has acquired what other blocks reported
  const auto reads_ours = [&](int peer) { return !failed && sources[peer].finished != nullptr; };
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    const std::uint64_t sent =
        reads_ours(peer) && peer != me ? ptx::load_relaxed_system(&now.progress(me, peer).sent) : 0;
    // An acquire of what was read, and a release of our reads of rows: they end before the peer may leave.
    ptx::fence_system();
    // A rank that has left already gave up on us; what we read of it since may be something else.
    if (sent < now.epoch) continue;
    report(now, Fault::kGaveUp, peer, 1, 0);
    failed = true;
  }
  if (__syncthreads_or(failed)) return;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!reads_ours(peer)) continue;
    publish_fenced(now, sources[peer].finished, 1);
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
  const bool forwarded = p.forwarded.asked != nullptr;
  const Now now(p.common, forwarded ? Now::Kernel::kLater : Now::Kernel::kFirst);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (!forwarded && blockIdx.x == 0) {
    announce(now, p);
    __syncthreads();  // before the block writes terms, for which the announcement's release would wait
  }
  bool good = !forwarded || !has_failed(now);
  if (good && p.hidden > 0) plan_steps(now, p);
  for (int peer = static_cast<int>(threadIdx.x); good && peer < p.common.num_ranks; peer += kThreads) {
    if (now.far(peer))
      sources[peer] = fetched_from(now, p, peer);
    else
      good = await_source(now, peer, sources[peer]);
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
    const Share share(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x),
                      static_cast<int>(gridDim.x) * kWarps, p.num_tokens, p.hidden * Number::kBytes, MyFeed::kPiece);
    const TermReader<CombineParams> reader{p, sources, share, lane};
    const Ring ring{shared + warp * MyFeed::kBytes, full[warp]};
    if (p.hidden > 0 && p.weights != nullptr) sum_tokens<Number, kLevels, true>(p, reader, ring);
    if (p.hidden > 0 && p.weights == nullptr) sum_tokens<Number, kLevels, false>(p, reader, ring);
    if (p.weights_out != nullptr) bring_weights_home(p, sources);
  }
  if (!last_block(now)) return;
  part(now, p, sources);
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
