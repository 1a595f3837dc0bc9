// SPDX-License-Identifier: MIT
// Dispatch from far nodes, our end as the one who passes on: a block takes a chunk out of its slot and writes each
// token at its final rows, in the windows of the ranks of our node. A warp delivers a token.
#pragma once

#include "cuda/dispatch_companions.cuh"
#include "cuda/dispatch_receive.cuh"
#include "cuda/forward_pack.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A token that has come, and the lane's selection of it.
struct InTransit {
  const std::byte* unit;
  int k;
  std::int32_t rank;  // -1: none here
  std::int32_t slot, row, arrival;
  bool first;  // the token's first to that rank, among those that the warp has looked at
};

// A row that the receiver's block does not have is nobody's: what came over a network is checked before it is used.
__device__ InTransit read_selection(const ForwardDispatchParams& f, const Nodes& nodes, const Destination* to,
                                    const std::byte* unit, int k) {
  const DispatchParams& p = f.dispatch;
  InTransit t{unit, k, -1, -1, -1, -1, false};
  if (k >= p.num_topk) return t;
  // Two words: selections lie at multiples of four bytes.
  const auto* const words = reinterpret_cast<const std::uint32_t*>(unit + f.unit.selections_at) + 2 * k;
  const std::uint32_t of_selection[2] = {__ldcg(words), __ldcg(words + 1)};
  plan::Selection selection;
  static_assert(sizeof selection == sizeof of_selection);
  memcpy(&selection, of_selection, sizeof selection);
  if (selection.member < 0) return t;
  const int rank = nodes.first_rank(nodes.here()) + selection.member;
  if (rank >= p.common.num_ranks || nodes.of(rank) != nodes.here() || to[rank].block == nullptr) return t;
  t.arrival = p.layout == OutputLayout::kByRank
                  ? selection.row
                  : __ldcg(reinterpret_cast<const std::int32_t*>(unit + f.unit.arrivals_at) + k);
  t.row = selection.row, t.slot = selection.slot;
  const bool sound = t.row >= 0 && t.row < to[rank].rows && t.arrival >= 0 && t.arrival < to[rank].arrivals;
  if (sound) t.rank = rank;
  return t;
}

// A warp: the row, to every target that a lane has; read once.
__device__ void deliver_row(const DispatchParams& p, const std::byte* unit, std::byte* target, int lane) {
  constexpr int kAtOnce = 4;
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const unsigned targets = __ballot_sync(kAllLanes, target != nullptr);
  if (targets == 0) return;
  for (std::int64_t first = 16 * lane; first - 16 * lane < row_bytes; first += 512 * kAtOnce) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + 512 * i < row_bytes) v[i] = __ldcg(reinterpret_cast<const uint4*>(unit + first + 512 * i));
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      auto* const row = reinterpret_cast<std::byte*>(
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(target), __ffs(rest) - 1));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + 512 * i < row_bytes) ptx::store_streaming(row + first + 512 * i, v[i]);
    }
  }
}

// A warp: what each rank is told once of the token. `t`: the lane's selection of those numbered `chunk` x 32 and on.
__device__ void deliver_entries(const ForwardDispatchParams& f, const Nodes& nodes, const Destination* to,
                                const InTransit& t, int lane) {
  const DispatchParams& p = f.dispatch;
  const auto* const weights = reinterpret_cast<const float*>(t.unit + f.unit.weights_at);
  const auto token = __ldcg(reinterpret_cast<const std::int32_t*>(t.unit + f.unit.token_at));
  for (unsigned rest = __ballot_sync(kAllLanes, t.first); rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const int rank = __shfl_sync(kAllLanes, t.rank, from);
    const std::int64_t arrival = __shfl_sync(kAllLanes, t.arrival, from);
    if (!p.cached && lane == 0)
      reinterpret_cast<std::int32_t*>(to[rank].block + to[rank].at.src_token_at)[arrival] = token;
    if (carries_ids_or_weights(p))
      for (int k = lane; k < p.num_topk; k += 32) {
        const InTransit other = k == t.k ? t : read_selection(f, nodes, to, t.unit, k);
        const float weight = p.shape.topk_weights ? __ldcg(weights + k) : 0;
        write_entry(p, to[rank], arrival, {k, other.rank == rank, other.slot, other.row, weight});
      }
    for (int i = 0; i < p.shape.num_side; ++i)
      write_side(p, to[rank], arrival, i, reinterpret_cast<const std::int32_t*>(t.unit + f.unit.side_at[i]), lane);
  }
}

// A warp: what comes with each row beside it.
__device__ void deliver_beside(const ForwardDispatchParams& f, const Destination* to, const InTransit& t,
                               bool takes_row, int lane) {
  const DispatchParams& p = f.dispatch;
  if (p.shape.topk_weights && p.layout != OutputLayout::kByRank && t.rank >= 0)
    reinterpret_cast<float*>(to[t.rank].block + to[t.rank].at.topk_weights_at)[t.row] =
        __ldcg(reinterpret_cast<const float*>(t.unit + f.unit.weights_at) + t.k);
  if (p.shape.num_scales == 0) return;
  const auto* const scales = reinterpret_cast<const std::int32_t*>(t.unit + f.unit.scales_at);
  for (unsigned rest = __ballot_sync(kAllLanes, takes_row); rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const Destination& there = to[__shfl_sync(kAllLanes, t.rank, from)];
    const std::int64_t row = __shfl_sync(kAllLanes, t.row, from);
    for (int word = lane; word < p.shape.num_scales; word += 32) store_scale(there, row, word, __ldcg(scales + word));
  }
}

// A warp: one token to all ranks of our node that it goes to.
__device__ void deliver_unit(const ForwardDispatchParams& f, const Nodes& nodes, const Destination* to,
                             const std::byte* unit, int lane) {
  const DispatchParams& p = f.dispatch;
  const bool by_rank = p.layout == OutputLayout::kByRank;
  for (int first = 0; first < p.num_topk || first == 0; first += 32) {
    InTransit t = read_selection(f, nodes, to, unit, first + lane);
    const unsigned same = __match_any_sync(kAllLanes, t.rank >= 0 ? t.rank : -1 - lane);
    t.first = t.rank >= 0 && lane == __ffs(same) - 1;
    for (int k = 0; t.first && k < first; ++k) t.first = read_selection(f, nodes, to, unit, k).rank != t.rank;
    const bool takes_row = by_rank ? t.first : t.rank >= 0;
    std::byte* const row =
        takes_row ? to[t.rank].block + to[t.rank].at.x_at + t.row * static_cast<std::int64_t>(p.shape.row_bytes)
                  : nullptr;
    deliver_row(p, unit, row, lane);
    deliver_beside(f, to, t, takes_row, lane);
    deliver_entries(f, nodes, to, t, lane);
  }
}

// What a block takes out: slots of far sources on our rail, in turn with the other blocks.
class Deliverer {
 public:
  __device__ Deliverer(const Now& now, const ForwardDispatchParams& f, const Nodes& nodes, const Destination* to)
      : now_(now), f_(f), nodes_(nodes), to_(to) {}

  // Every thread: delivers one chunk that has come. False: none has.
  __device__ bool deliver_chunk() {
    __shared__ int source, slot;
    if (threadIdx.x < 32) look(source, slot);
    __syncthreads();
    const int from = source, in = slot;
    __syncthreads();  // all have read what the next look changes
    if (from < 0) return false;
    const std::byte* const chunk = chunk_from(f_.dispatch.common, from, in);
    const plan::ChunkHead head = *reinterpret_cast<const plan::ChunkHead*>(chunk);
    const auto most = static_cast<std::uint32_t>(f_.chunking.per_chunk);
    const std::uint32_t units = head.stream == plan::Stream::kTokens && head.units <= most ? head.units : 0;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    for (std::uint32_t i = warp; i < units; i += kForwardWarps)
      deliver_unit(f_, nodes_, to_, chunk + f_.chunking.at(i), lane);
    __syncthreads();
    if (threadIdx.x == 0) {
      give_back(now_, from, in);
      note(from, head, units);
    }
    return true;
  }

  // One thread: everything of that source is delivered, or nothing comes through us.
  __device__ bool done_with(int source) const {
    const Common& common = f_.dispatch.common;
    if (!now_.active(source) || !now_.far(source) || nodes_.rail(source, nodes_.here()) != common.rank) return true;
    return ptx::load_acquire(&common.far.passed_on[source].all) != 0;
  }

 private:
  // A warp: a chunk that has come into one of this block's slots, each of which is one block's alone.
  __device__ void look(int& source, int& slot) const {
    const Common& common = f_.dispatch.common;
    const int lane = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
    if (lane == 0) source = -1;
    __syncwarp();
    for (int first = 0; first < common.num_ranks * plan::kForwardSlots; first += 32 * blocks) {
      const int at = first + lane * blocks + static_cast<int>(blockIdx.x);
      const int from = at / plan::kForwardSlots, in = at % plan::kForwardSlots;
      const bool landed = from < common.num_ranks && now_.far(from) && has_landed(now_, from, in);
      const unsigned found = __ballot_sync(kAllLanes, landed);
      if (found == 0) continue;
      if (lane == __ffs(found) - 1 && take_landed(now_, from, in)) source = from, slot = in;
      __syncwarp();
      return;
    }
  }

  // Thread 0: what a delivered chunk brings nearer. Several blocks deliver for one source; who finds that nothing is
  // missing tells our node.
  __device__ void note(int source, const plan::ChunkHead& head, std::uint32_t units) const {
    PassedOn& passed = f_.dispatch.common.far.passed_on[source];
    if (head.last) atomicAdd(&passed.awaited, static_cast<std::uint32_t>(head.first_unit) + units);
    // The rows, and what is awaited, before the counts by which others find out. Each thread's rows come before it by
    // the block barrier.
    __threadfence_system();
    if (head.last) atomicAdd(&passed.streams, 1u);
    atomicAdd(&passed.units, units);
    __threadfence();
    if (atomicAdd(&passed.streams, 0u) != head.of_streams) return;
    if (atomicAdd(&passed.units, 0u) != atomicAdd(&passed.awaited, 0u)) return;
    __threadfence_system();  // what the other blocks delivered, as their counts say, before our words
    if (atomicExch(&passed.all, 1u) != 0) return;
    for (int peer = 0; peer < f_.dispatch.common.num_ranks; ++peer)
      if (now_.active(peer) && !now_.far(peer)) publish(now_, arrived_of(now_, peer, source), 1);
  }

  const Now& now_;
  const ForwardDispatchParams& f_;
  const Nodes& nodes_;
  const Destination* to_;
};

}  // namespace
}  // namespace deep_ep::cuda
