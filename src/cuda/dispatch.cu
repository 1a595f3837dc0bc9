// SPDX-License-Identifier: MIT
// High-throughput dispatch: rows go from the caller's tensor to their final place in the receivers' windows. Phases:
// reply, await replies, send, receive. Each block has mover warps, which write rows, and companion warps, which write
// what travels beside them: ids, weights, scales, side tensors.
#include <algorithm>

#include "cuda/dispatch_companions.cuh"
#include "cuda/dispatch_movers.cuh"
#include "cuda/dispatch_receive.cuh"
#include "cuda/early_launch.h"

namespace deep_ep::cuda {

namespace {

// A block's shared memory: destinations; of each mover warp, targets; of each mover warp, stages and codes.
struct Parts {
  std::size_t targets_at, warps_at;
  __host__ __device__ Parts(int num_ranks, int movers)
      : targets_at((sizeof(Destination) * num_ranks + 127) / 128 * 128),
        warps_at(targets_at + 32 * sizeof(Target) * movers) {}
};
__host__ __device__ std::int64_t bytes_of_warp(const DispatchParams& p, bool quantize) {
  return std::int64_t{stages_of(quantize)} * p.stage_bytes + p.code_bytes;
}

}  // namespace

template <Rows kRows>
__global__ void __launch_bounds__(crew_of(kRows != Rows::kAsTheyAre).threads(), 1)
    dispatch(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) std::byte shared[];
  constexpr bool kQuantize = kRows != Rows::kAsTheyAre;
  constexpr Crew crew = crew_of(kQuantize);
  constexpr int kBarriers = crew.movers * stages_of(kQuantize);
  __shared__ std::uint64_t barriers[kBarriers];
  ptx::await_kernel_before();
  const Now now(p.common, p.cached ? Now::Kernel::kFirst : Now::Kernel::kLater);
  if (p.cached) now.keep_deadline();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const Parts parts(p.common.num_ranks, p.mover_warps);
  auto* const to = reinterpret_cast<Destination*>(shared);
  std::byte* const of_warp = shared + parts.warps_at + warp * bytes_of_warp(p, kQuantize);
  const Stages stages{reinterpret_cast<Target*>(shared + parts.targets_at) + 32 * warp, of_warp,
                      barriers + warp * stages_of(kQuantize), of_warp + stages_of(kQuantize) * p.stage_bytes};

  bool good = p.cached || __syncthreads_and(!has_failed(now));  // notify's verdict
  const Incoming incoming(p);
  // The host had to guess how much room this takes and was wrong: it launches this kernel again. Nobody is told yet.
  if (good && p.rows < 0 &&
      plan::OutputBlock::place(p.shape, p.layout, incoming.rows, incoming.arrivals).total_bytes > p.room)
    return;
  if (good && blockIdx.x == 0) reply(now, p, incoming);
  for (int dst = static_cast<int>(threadIdx.x); good && dst < p.common.num_ranks; dst += static_cast<int>(blockDim.x))
    good = await_reply(now, p, dst, to[dst]);
#if EP_BULK_COPY
  if (threadIdx.x < kBarriers) {
    ptx::barrier_init(barriers + threadIdx.x, 1);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
    if (warp >= p.mover_warps) {
      if (has_companions(p)) Companions(p, to, lane).write_all(warp - p.mover_warps, crew.companions);
      clear_unwritten(p, to[p.common.rank], warp - p.mover_warps, crew.companions, lane);
      count_rows_sent(p, to, warp - p.mover_warps, crew.companions, lane);
    } else if constexpr (kRows == Rows::kAsTheyAre) {
      move_rows(p, to, stages, warp, lane);
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
  if (p.common.far.end != nullptr) {  // the kernel behind this one sends to far ranks, and ends the operation
    if (threadIdx.x == 0) p.common.state->barrier = p.common.state->blocks_done = 0;
    return;
  }
  receive(now, p, to);
  finish(now);
}

namespace {

constexpr std::size_t kLargestPiece = 14336;

// How rows as they are are cut.
void share_rows(DispatchParams& p) {
  const std::size_t pieces = (p.shape.row_bytes + kLargestPiece - 1) / kLargestPiece;
  const std::size_t piece = plan::align_up((p.shape.row_bytes + pieces - 1) / pieces, 16);
  p.pieces = static_cast<int>(pieces);
  p.piece_bytes = static_cast<int>(piece);
  p.stage_bytes = static_cast<int>(plan::align_up(piece, 128));
}

// Pieces of whole passes, as even as can be.
template <class Number>
void share_quantised_rows(DispatchParams& p) {
  const auto passes = static_cast<int>((p.hidden + kPassChannels - 1) / kPassChannels);
  const int pieces = std::max(1, (passes + kPassesOf<Number> - 1) / kPassesOf<Number>);
  p.piece_bytes = std::max(1, (passes + pieces - 1) / pieces) * kPassChannels;
  p.pieces = std::max(1, static_cast<int>((p.hidden + p.piece_bytes - 1) / p.piece_bytes));
  p.stage_bytes = p.piece_bytes * Number::kBytes;
  p.code_bytes = kPassesOf<Number> * kPassChannels;
}

// And how many warps move them: as many as shared memory has room for.
void share(DispatchParams& p, bool quantize, std::size_t room) {
  if (!quantize) {
    share_rows(p);
  } else if (p.x_dtype == DType::kFp32) {
    share_quantised_rows<Fp32>(p);
  } else {
    share_quantised_rows<Bf16>(p);
  }
  const auto fit = static_cast<int>(room / static_cast<std::size_t>(bytes_of_warp(p, quantize)));
  p.mover_warps = std::clamp(fit, 1, crew_of(quantize).movers);
}

const void* kernel_of(bool quantize, DType dtype) {
  return for_rows(quantize, dtype,
                  [](auto rows) { return reinterpret_cast<const void*>(&dispatch<decltype(rows)::value>); });
}

}  // namespace

void launch_dispatch(DispatchParams params, bool quantize, int blocks, cudaStream_t stream, int shared_limit) {
  share(params, quantize,
        static_cast<std::size_t>(shared_limit) - Parts(params.common.num_ranks, crew_of(quantize).movers).warps_at);
  params.chunks = (params.num_topk + 31) / 32;
  params.lanes_of_token = plan::Divisor(std::min(params.num_topk, 32));
  const Parts parts(params.common.num_ranks, params.mover_warps);
  const std::size_t of_warps =
      static_cast<std::size_t>(params.mover_warps) * static_cast<std::size_t>(bytes_of_warp(params, quantize));
  void* arguments[] = {&params};
  const dim3 threads(static_cast<unsigned>(params.mover_warps + crew_of(quantize).companions) * 32);
  launch_early(kernel_of(quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)), threads, arguments,
               parts.warps_at + of_warps, stream);
}

const void* dispatch_kernel(bool quantize, DType dtype) { return kernel_of(quantize, dtype); }

}  // namespace deep_ep::cuda
