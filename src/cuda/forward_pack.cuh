// SPDX-License-Identifier: MIT
// Dispatch to far nodes, our end as a source: a block packs its run of the tokens, node after node, into chunks in
// pinned memory, as slots at the node's rail are free. A warp packs a token.
#pragma once

#include "cuda/chunks.cuh"
#include "cuda/dispatch_quantize.cuh"
#include "cuda/forward_dispatch.h"
#include "cuda/rails.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

constexpr int kForwardWarps = 16;
constexpr int kForwardThreads = kForwardWarps * 32;

// A node as a destination: which of a token's selections it has.
struct FarNode {
  int node, rail, first_rank;
};

// A warp: the token's row as it travels.
__device__ void pack_row_as_it_is(const DispatchParams& p, std::byte* unit, int token, int lane) {
  constexpr int kAtOnce = 4;
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const std::byte* const row = p.x + token * row_bytes;
  for (std::int64_t first = 16 * lane; first - 16 * lane < row_bytes; first += 512 * kAtOnce) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + 512 * i < row_bytes) v[i] = ptx::load_streaming(row + first + 512 * i);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + 512 * i < row_bytes) *reinterpret_cast<uint4*>(unit + first + 512 * i) = v[i];
  }
}

template <class Number>
__device__ void pack_row_quantised(const DispatchParams& p, std::byte* unit, std::int32_t* scales, int token,
                                   int lane) {
  using MyBatch = Batch<Number, kPassesOf<Number>>;
  const Target target{unit, scales, 1};
  for (int first = 0; first < p.hidden; first += MyBatch::kChannels) {
    const int left = min(static_cast<int>(p.hidden) - first, MyBatch::kChannels);
    const std::byte* const piece = p.x + (token * p.hidden + first) * Number::kBytes;
    MyBatch batch;
    batch.load(piece, left, lane);
    const std::uint32_t peak = batch.peak(lane);
    if (!__all_sync(kAllLanes, peak < kLargestQuick)) {
      write_any_batch<Number>(p, &target, 1, {piece, first, MyBatch::kChannels}, lane);
      continue;
    }
    const plan::Fp8Scaling scaling = quick_scaling(static_cast<std::int32_t>(peak), p.scale_kind);
    const int pass = MyBatch::pass_of_lane(lane);
    const ScaleWord scale = scale_word(p.scale_kind, scaling.scale, {first, pass, left, MyBatch::answers(lane)}, lane);
    batch.encode(scaling.factor, [&](int pass_done, const Codes& codes) {
      if (MyBatch::in_row(pass_done, left, lane))
        ptx::store_streaming(unit + first + pass_done * kPassChannels + channel_of_lane(lane), codes.whole());
    });
    if (scale.mine) scales[scale.at] = scale.word;
  }
}

// A warp: everything but the row.
__device__ void pack_beside(const ForwardDispatchParams& f, const Nodes& nodes, const FarNode& to, std::byte* unit,
                            int token, int lane) {
  const DispatchParams& p = f.dispatch;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  auto* const selections = reinterpret_cast<plan::Selection*>(unit + f.unit.selections_at);
  for (int k = lane; k < p.num_topk; k += 32) {
    const std::int64_t at = std::int64_t{token} * p.num_topk + k;
    const int dst = p.routes.dst_rank[at];
    const bool there = dst >= 0 && nodes.of(dst) == to.node && p.common.peers[dst].active != 0;
    const std::int32_t arrival = there ? p.routes.dst_arrival[at] : -1;
    plan::Selection selection;
    if (there)
      selection = {static_cast<std::int16_t>(dst - to.first_rank),
                   static_cast<std::uint16_t>(p.cached ? 0 : p.routes.slot[at]),
                   by_rank ? arrival : p.routes.dst_row[at]};
    selections[k] = selection;
    if (!by_rank) reinterpret_cast<std::int32_t*>(unit + f.unit.arrivals_at)[k] = arrival;
    if (p.shape.topk_weights) reinterpret_cast<float*>(unit + f.unit.weights_at)[k] = p.topk_weights[at];
  }
  if (lane == 0) *reinterpret_cast<std::int32_t*>(unit + f.unit.token_at) = token;
  auto* const scales = reinterpret_cast<std::int32_t*>(unit + f.unit.scales_at);
  for (int i = lane; p.scales != nullptr && i < p.shape.num_scales; i += 32)
    scales[i] = p.scales[token * p.scale_strides[0] + i * p.scale_strides[1]];
  for (int i = 0; i < p.shape.num_side; ++i) {
    const int words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* const from = reinterpret_cast<const std::int32_t*>(p.side[i] + token * p.shape.side_bytes[i]);
    auto* const side = reinterpret_cast<std::int32_t*>(unit + f.unit.side_at[i]);
    for (int word = lane; word < words; word += 32) side[word] = from[word];
  }
}

template <Rows kRows>
__device__ void pack_unit(const ForwardDispatchParams& f, const Nodes& nodes, const FarNode& to, std::byte* unit,
                          int token, int lane) {
  auto* const scales = reinterpret_cast<std::int32_t*>(unit + f.unit.scales_at);
  if constexpr (kRows == Rows::kAsTheyAre)
    pack_row_as_it_is(f.dispatch, unit, token, lane);
  else if constexpr (kRows == Rows::kBf16)
    pack_row_quantised<Bf16>(f.dispatch, unit, scales, token, lane);
  else if constexpr (kRows == Rows::kFp16)
    pack_row_quantised<Fp16>(f.dispatch, unit, scales, token, lane);
  else
    pack_row_quantised<Fp32>(f.dispatch, unit, scales, token, lane);
  pack_beside(f, nodes, to, unit, token, lane);
}

// How far a block is with its tokens, in shared memory; thread 0 changes it between barriers.
struct Packing {
  static constexpr int kListed = 2 * kForwardThreads;

  int turn;             // of the nodes; all of them: done
  FarNode to;           // the present one
  int next;             // token to look at for it
  int listed;           // tokens that go there, and are not packed
  int slot;             // of the chunk that is being packed
  std::uint64_t units;  // packed for this node
  std::int32_t tokens[kListed];
};

// A block's packing of its run of tokens.
template <Rows kRows>
class Packer {
 public:
  __device__ Packer(const Now& now, const ForwardDispatchParams& f, const Nodes& nodes, Packing& state)
      : now_(now),
        f_(f),
        nodes_(nodes),
        state_(state),
        begin_(run_begins(blockIdx.x)),
        end_(run_begins(blockIdx.x + 1)) {
    if (threadIdx.x == 0) {
      state_.turn = -1;
      next_node();
    }
    __syncthreads();
  }

  // The same in every thread, after a barrier.
  __device__ bool done() const { return state_.turn >= f_.num_nodes; }
  // For whose slot we wait.
  __device__ int rail() const { return state_.to.rail; }

  // Every thread: packs and sends one chunk, if there is a slot for it. False: there is none.
  __device__ bool pack_chunk() {
    if (threadIdx.x == 0) state_.slot = take_slot(f_.dispatch.common, state_.to.rail, plan::Stream::kTokens);
    __syncthreads();
    const int slot = state_.slot;
    if (slot < 0) return false;
    const int wanted =
        static_cast<int>(f_.chunking.per_chunk < kForwardThreads ? f_.chunking.per_chunk : kForwardThreads);
    while (state_.listed < wanted && state_.next < end_) list_tokens();
    const int units = min(state_.listed, wanted);
    std::byte* const chunk = chunk_to(f_.dispatch.common, state_.to.rail, slot);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    for (int i = warp; i < units; i += kForwardWarps)
      pack_unit<kRows>(f_, nodes_, state_.to, chunk + f_.chunking.at(i), state_.tokens[i], lane);
    __syncthreads();
    const std::int32_t left = drop_listed(units);
    if (threadIdx.x == 0) send(slot, units, left == 0 && state_.next >= end_);
    __syncthreads();
    return true;
  }

 private:
  __device__ int run_begins(unsigned block) const {
    const std::int64_t tokens = f_.dispatch.num_tokens;
    return block >= static_cast<unsigned>(f_.packers) ? static_cast<int>(tokens)
                                                      : static_cast<int>(tokens * block / f_.packers);
  }

  // Thread 0: the next far node that has anybody, beginning with the one behind ours: not all send to the same at once.
  __device__ void next_node() {
    const Common& common = f_.dispatch.common;
    const int here = nodes_.here();
    state_.next = begin_;
    state_.listed = 0;
    state_.units = 0;
    while (++state_.turn < f_.num_nodes) {
      const int node = (here + state_.turn) % f_.num_nodes;
      if (node == here) continue;
      state_.to = {node, nodes_.rail(common.rank, node), nodes_.first_rank(node)};
      if (state_.to.rail >= 0) break;
    }
    if (static_cast<int>(blockIdx.x) >= f_.packers) state_.turn = f_.num_nodes;
  }

  // Whether a token has a selection in the present node.
  __device__ bool goes(int token) const {
    const DispatchParams& p = f_.dispatch;
    for (int k = 0; k < p.num_topk; ++k) {
      const int dst = p.routes.dst_rank[std::int64_t{token} * p.num_topk + k];
      if (dst >= 0 && nodes_.of(dst) == state_.to.node && p.common.peers[dst].active != 0) return true;
    }
    return false;
  }

  // Every thread: looks at as many tokens as there are threads, and lists those that go, in order.
  __device__ void list_tokens() {
    __shared__ int of_warp[kForwardWarps];
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int token = state_.next + static_cast<int>(threadIdx.x);
    const bool listed = token < end_ && goes(token);
    const unsigned votes = __ballot_sync(kAllLanes, listed);
    if (lane == 0) of_warp[warp] = __popc(votes);
    __syncthreads();
    int before = state_.listed, all = state_.listed;
    for (int w = 0; w < kForwardWarps; ++w) {
      if (w < warp) before += of_warp[w];
      all += of_warp[w];
    }
    if (listed) state_.tokens[before + __popc(votes & ((1u << lane) - 1))] = token;
    __syncthreads();
    if (threadIdx.x == 0) {
      state_.listed = all;
      state_.next += kForwardThreads;
    }
    __syncthreads();
  }

  // Every thread: the first of the list are packed. Returns how many are left.
  __device__ std::int32_t drop_listed(int units) {
    const int left = state_.listed - units;  // fewer than there are threads
    const std::int32_t token = static_cast<int>(threadIdx.x) < left ? state_.tokens[units + threadIdx.x] : 0;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < left) state_.tokens[threadIdx.x] = token;
    if (threadIdx.x == 0) state_.listed = left;
    return left;
  }

  // Thread 0.
  __device__ void send(int slot, int units, bool last) {
    plan::ChunkHead head;
    head.epoch = now_.epoch;
    head.stream = plan::Stream::kTokens;
    head.units = static_cast<std::uint32_t>(units);
    head.first_unit = state_.units;
    head.bytes = f_.chunking.chunk_bytes(units);
    head.of_streams = static_cast<std::uint32_t>(f_.packers);
    head.last = last;
    const int rail = state_.to.rail;
    state_.units += static_cast<std::uint64_t>(units);
    if (last) next_node();
    if (done() && blockIdx.x == 0) count_early_puts();
    put_chunk(now_, rail, slot, head);
  }

  // The last row is packed, and its chunk not yet handed over: what has left by now left while this kernel packed.
  __device__ void count_early_puts() const {
    const Common& common = f_.dispatch.common;
    const auto* const words = common.far.end->chunks_left;
    const std::uint64_t left = ptx::load_acquire_system(&words[now_.epoch % plan::kOperationsInFlight]);
    if (left >> 32 == now_.epoch) add_relaxed(common.counters.puts_while_packing, left & 0xffffffff);
  }

  const Now& now_;
  const ForwardDispatchParams& f_;
  const Nodes& nodes_;
  Packing& state_;
  const int begin_, end_;
};

}  // namespace
}  // namespace deep_ep::cuda
