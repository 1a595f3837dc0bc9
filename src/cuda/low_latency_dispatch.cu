// SPDX-License-Identifier: MIT
// Low-latency dispatch. Rows are cut into pieces; a warp reads a piece of a token, quantises it if asked, and writes it
// to every rank that the token goes to, at the place of its number, without asking anybody. Meanwhile one block for
// each destination counts, and tells it which tokens come and where their rows belong. All that travels are lines,
// which say themselves that they have come (plan/lines.h). A warp of the receiver waits for a piece and puts it at each
// of its experts. Phases: open, route | send ... hear, gather, place.
#include "cuda/low_latency_place.cuh"
#include "cuda/low_latency_send.cuh"

namespace deep_ep::cuda {

namespace low_latency {

template <Rows kRows>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) dispatch(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  fetch_parameters(p);
  const Place at;
  const Shared shared = shared_of(p, memory);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  bool good = true;
  if (sends) {
    good = send<kRows>(now, p, shared, at);
  } else {
    open_receiving(now, at);
    shared.peers.load(p.common);
  }
  if ((p.phases & kReceive) != 0) {
    __syncthreads();
    good = receive(now, p, shared, at) && good;
  }
  if (!good) abandon_operation(now);
}

}  // namespace low_latency

__global__ void abandon(const __grid_constant__ AbandonParams p) {
  const Now now(p.common, *p.ticket);
  tell_peers(now, p.common.state->epoch, 0, static_cast<int>(threadIdx.x));
  if (threadIdx.x != 0) return;
  abandon_operation(now);
  p.common.state->ended[now.epoch % plan::kOperationsInFlight] = now.epoch;
}

const void* low_latency_dispatch_kernel(bool quantize, DType dtype) {
  if (!quantize) return reinterpret_cast<const void*>(&low_latency::dispatch<Rows::kAsTheyAre>);
  if (dtype == DType::kBf16) return reinterpret_cast<const void*>(&low_latency::dispatch<Rows::kBf16>);
  if (dtype == DType::kFp16) return reinterpret_cast<const void*>(&low_latency::dispatch<Rows::kFp16>);
  return reinterpret_cast<const void*>(&low_latency::dispatch<Rows::kFp32>);
}

const void* abandon_kernel() { return reinterpret_cast<const void*>(&abandon); }

std::size_t low_latency_shared_bytes(const Params& p) {
  const std::size_t routing = (static_cast<std::size_t>(route_warps(p.max_slots)) + 1) * (p.max_slots + 1);
  const std::size_t gathering = gathered_words(p.common.num_ranks, p.num_slots);
  return sizeof(Peer) * p.common.num_ranks + 4 * (routing > gathering ? routing : gathering);
}

void launch_low_latency_dispatch(const Params& params, int blocks, cudaStream_t stream) {
  Params copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(low_latency_dispatch_kernel(params.quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)),
                   dim3(kLowLatencyThreads), arguments, low_latency_shared_bytes(params), stream);
}

void launch_abandon(const AbandonParams& params, cudaStream_t stream) { abandon<<<1, 32, 0, stream>>>(params); }

}  // namespace deep_ep::cuda
