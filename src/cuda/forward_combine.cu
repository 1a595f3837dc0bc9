// SPDX-License-Identifier: MIT
// Combine between nodes: the kernel that exchanges rows with far ranks, before the one that adds. Phases: announce,
// await sources, exchange.
#include "cuda/combine_announce.cuh"
#include "cuda/forward_combine.h"
#include "cuda/forward_home.cuh"
#include "cuda/forward_serve.cuh"

namespace deep_ep::cuda {

namespace {

// One thread: what to do at the lane that requests have, both ways.
__device__ Turn look_at_requests(const Exchange& e, const Partner& with) {
  Serving* const serving = with.serving;
  const bool wants = serving == nullptr || batch_is_sent(*serving);
  if (wants && has_landed(e.now, with.rank, plan::kRequestSlot) && take_landed(e.now, with.rank, plan::kRequestSlot)) {
    const auto& head = *reinterpret_cast<const plan::ChunkHead*>(chunk_from(e.common(), with.rank, plan::kRequestSlot));
    const Turn turn{Turn::kTakeRequests, head, 0};
    if (requests_fit(e, with, turn.head)) return turn;
    return refuse_stray(e.now, with.rank, static_cast<std::int64_t>(turn.head.first_unit), with.requests);
  }
  // Relaxed: nobody reads anything by it.
  if (wants && serving != nullptr && serving->requests_here == with.requests)
    *static_cast<volatile std::uint32_t*>(&serving->done) = 1;
  if (!with.all_asked() && take_slot(e.common(), with.rank, plan::kRequestSlot)) return {Turn::kSendRequests, {}, 0};
  return {with.all_asked() && with.all_served() ? Turn::kLaneDone : Turn::kNothing, {}, 0};
}

// One thread: what to do at a lane that rows have, both ways. What came goes first: its source waits for the slot.
__device__ Turn look_at_rows(const Exchange& e, const Partner& with, int slot) {
  if (has_landed(e.now, with.rank, slot) && take_landed(e.now, with.rank, slot)) {
    const auto& head = *reinterpret_cast<const plan::ChunkHead*>(chunk_from(e.common(), with.rank, slot));
    const Turn turn{Turn::kTakeRows, head, 0};
    if (is_awaited(e, with, turn.head)) return turn;
    return refuse_stray(e.now, with.rank, static_cast<std::int64_t>(turn.head.first_unit),
                        with.asked != nullptr ? with.asked->units : 0);
  }
  if (with.serving != nullptr && has_chunk(*with.serving) && take_slot(e.common(), with.rank, slot)) {
    if (const int chunk = take_on_chunk(*with.serving); chunk >= 0) return {Turn::kSendRows, {}, chunk};
    leave_slot(e.common(), with.rank, slot);
  }
  return {with.all_here() && with.all_served() ? Turn::kLaneDone : Turn::kNothing, {}, 0};
}

// One thread. At a lane where nothing happens to the deadline its partner is whom we wait for: each rank serves all
// others without waiting for any.
__device__ Turn look_at(const Exchange& e, const Partner& with, int slot, int looks) {
  if (has_failed(e.now)) return {Turn::kGiveUp, {}, 0};
  const Turn turn = slot == plan::kRequestSlot ? look_at_requests(e, with) : look_at_rows(e, with, slot);
  if (turn.kind != Turn::kNothing || !is_over(e.now, looks)) return turn;
  const bool rows = !with.all_here();
  report(e.now, Fault::kTimeout, with.rank, rows ? with.asked->units : 1, rows ? with.asked->units_here : 0);
  return {Turn::kGiveUp, {}, 0};
}

// Every thread: this block's lanes in turn, until all are done. `turn` lies in shared memory.
template <class Number>
__device__ void exchange(const Exchange& e, Turn& turn, Ring& ring) {
  const int lanes = e.num_partners * plan::kForwardSlots;
  int looks = 0;
  for (bool all_done = false; !all_done;) {
    all_done = true;
    for (int lane = static_cast<int>(blockIdx.x); lane < lanes; lane += static_cast<int>(gridDim.x)) {
      const Partner& with = e.partners[lane / plan::kForwardSlots];
      const int slot = lane % plan::kForwardSlots;
      if (threadIdx.x == 0) turn = look_at(e, with, slot, ++looks);
      __syncthreads();
      const Turn mine = turn;
      __syncthreads();  // all have read it
      switch (mine.kind) {
        case Turn::kTakeRequests: take_requests(e, with, mine.head); break;
        case Turn::kSendRequests: send_requests(e, with); break;
        case Turn::kTakeRows: take_rows(e, with, slot, mine.head); break;
        case Turn::kSendRows: send_rows<Number>(e, with, slot, mine.chunk, ring); break;
        case Turn::kNothing:
        case Turn::kLaneDone: break;
        case Turn::kGiveUp: return;
      }
      all_done = all_done && mine.kind == Turn::kLaneDone;
    }
  }
}

using JoinFeed = Feed<kVectorsOf<true>>;

// Dynamic shared memory, behind the rings.
struct Kept {
  Turn* turn;
  Source* sources;
  Partner* partners;
  __device__ Kept(std::byte* at, int num_ranks)
      : turn(reinterpret_cast<Turn*>(at)),
        sources(reinterpret_cast<Source*>(turn + 1)),
        partners(reinterpret_cast<Partner*>(sources + num_ranks)) {}
  static std::size_t bytes(int num_ranks) { return sizeof(Turn) + (sizeof(Source) + sizeof(Partner)) * num_ranks; }
};

}  // namespace

template <class Number>
__global__ void __launch_bounds__(kThreads, 1) forward_combine(const __grid_constant__ ForwardCombineParams p) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ std::uint64_t full[kWarps][JoinFeed::kBarriers];
  const Now now(p.combine.common, Now::Kernel::kFirst);
  now.keep_deadline();
  const int num_ranks = p.combine.common.num_ranks;
  const Kept kept(shared + kWarps * JoinFeed::kBytes, num_ranks);
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (blockIdx.x == 0) announce(now, p.combine);
  bool good = true;
  for (int peer = static_cast<int>(threadIdx.x); good && peer < num_ranks; peer += kThreads)
    good = await_source(now, peer, kept.sources[peer]);
#if EP_BULK_COPY
  if (const auto lane = threadIdx.x % 32; lane < JoinFeed::kBarriers) {
    ptx::barrier_init(&full[warp][lane], 1);
    ptx::barrier_init_done();
  }
#endif
  if (!__syncthreads_and(good)) return;  // the kernel behind ends the operation
#if EP_BULK_COPY
  ptx::fence_for_bulk();  // the rows were acquired by ordinary loads of the announcements
#endif
  const Nodes nodes{p.combine.common, p.combine.node_of_rank};
  const int num_partners = find_partners(now, p, nodes, kept.partners);
  const Exchange e{p, now, kept.sources, kept.partners, num_partners, nodes.first_rank(nodes.here())};
  Ring ring{shared + warp * JoinFeed::kBytes, full[warp]};
  exchange<Number>(e, *kept.turn, ring);
}

const void* forward_combine_kernel(DType dtype) {
  if (dtype == DType::kBf16) return reinterpret_cast<const void*>(&forward_combine<Bf16>);
  if (dtype == DType::kFp16) return reinterpret_cast<const void*>(&forward_combine<Fp16>);
  return reinterpret_cast<const void*>(&forward_combine<Fp32>);
}

void launch_forward_combine(const ForwardCombineParams& params, int blocks, cudaStream_t stream) {
  ForwardCombineParams copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(forward_combine_kernel(params.combine.dtype), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                   arguments, kRingBytes * kWarps + Kept::bytes(params.combine.common.num_ranks), stream);
}

}  // namespace deep_ep::cuda
