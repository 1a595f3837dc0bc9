// SPDX-License-Identifier: MIT
// High-throughput dispatch: rows go from the caller's tensor to their final place in the receivers' windows. Phases:
// reply, await replies, send, receive. Each block has mover warps, which write rows, and companion warps, which write
// what travels beside them: ids, weights, scales, side tensors.
#include <algorithm>

#include "cuda/dispatch_companions.cuh"
#include "cuda/dispatch_movers.cuh"

namespace deep_ep::cuda {

namespace {

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
__global__ void __launch_bounds__(crew_of(kRows != Rows::kAsTheyAre).threads(), 1)
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
  const Incoming incoming(p);
  // The host had to guess how much room this takes and was wrong: it launches this kernel again. Nobody is told yet.
  if (good && p.rows < 0 &&
      plan::OutputBlock::place(p.shape, p.layout, incoming.rows, incoming.arrivals).total_bytes > p.room)
    return;
  if (good && blockIdx.x == 0) reply(now, p, incoming);
  for (int dst = static_cast<int>(threadIdx.x); good && dst < p.common.num_ranks; dst += static_cast<int>(blockDim.x))
    good = await_reply(now, p, dst, to[dst]);
#if EP_BULK_COPY
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxMoverWarps * kStages; ++i) ptx::barrier_init(barriers + i, 1);
    ptx::barrier_init_done();
  }
#endif
  if (__syncthreads_and(good)) {
    if (warp >= p.mover_warps) {
      if (has_companions(p)) Companions(p, to, lane).write_all(warp - p.mover_warps, crew.companions);
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

// How rows as they are are cut, and how many warps move them: as many as shared memory has stages for.
void share_rows(DispatchParams& p, std::size_t room) {
  const std::size_t pieces = (p.shape.row_bytes + kLargestPiece - 1) / kLargestPiece;
  const std::size_t piece = plan::align_up((p.shape.row_bytes + pieces - 1) / pieces, 16);
  p.pieces = static_cast<int>(pieces);
  p.piece_bytes = static_cast<int>(piece);
  p.stage_bytes = static_cast<int>(plan::align_up(piece, 128));
  const auto fit = static_cast<int>(room / (static_cast<std::size_t>(p.stage_bytes) * kStages));
  p.mover_warps = std::clamp(fit, 1, crew_of(false).movers);
}

void share_quantised_rows(DispatchParams& p) {
  p.piece_bytes = kPassChannels * (p.x_dtype == DType::kFp32 ? kPassesOf<Fp32> : kPassesOf<Bf16>);
  p.pieces = static_cast<int>((p.shape.row_bytes + p.piece_bytes - 1) / p.piece_bytes);
  p.stage_bytes = 0;
  p.mover_warps = crew_of(true).movers;
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
  if (quantize) {
    share_quantised_rows(params);
  } else {
    share_rows(params, static_cast<std::size_t>(shared_limit) - head);
  }
  params.chunks = (params.num_topk + 31) / 32;
  const std::size_t of_warp = quantize ? 32 * sizeof(Target) : static_cast<std::size_t>(params.stage_bytes) * kStages;
  const std::size_t stages = params.mover_warps * of_warp;
  void* arguments[] = {&params};
  const dim3 threads(static_cast<unsigned>(params.mover_warps + crew_of(quantize).companions) * 32);
  cudaLaunchKernel(kernel_of(quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)), threads, arguments,
                   head + stages, stream);
}

const void* dispatch_kernel(bool quantize, DType dtype) { return kernel_of(quantize, dtype); }

}  // namespace deep_ep::cuda
