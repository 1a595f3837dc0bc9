// SPDX-License-Identifier: MIT
// Low-latency dispatch. Rows are cut into pieces; a warp reads a piece of a token, quantises it if asked, and writes it
// to every rank that the token goes to, at the place of its number, without asking anybody. Meanwhile one block for
// each destination counts, and tells it which tokens come and where their rows belong. All that travels are lines,
// which say themselves that they have come (plan/lines.h). A warp of the receiver waits for a piece and puts it at each
// of its experts. Far ranks get messages through the proxy thread (low_latency_dispatch_far.cuh). Phases: open, route |
// send ... hear, gather, place.
#include "cuda/low_latency_dispatch_far.cuh"

namespace deep_ep::cuda {

namespace {

// Phases open, route, send. False: not all was sent.
template <Rows kRows>
__device__ bool send(const Now& now, const Params& p, const Shared& shared, const Place& at) {
  const int ranks = p.common.num_ranks;
  const int units = p.num_tokens * p.pieces;
  int unit = at.number(ranks);  // blocks that route take rows last
  int token = 0, piece = 0, rank = -1;
  typename PieceOf<kRows>::Type loaded;
  const auto look = [&] {  // starts the loads of a unit
    token = unit / p.pieces, piece = unit - token * p.pieces;
    loaded.load(p, token, piece, at.lane);
    rank =
        at.lane < p.num_topk ? replica_of(p, expert_of(p, std::int64_t{token} * p.num_topk + at.lane), token).rank : -1;
  };
  if (unit < units) look();
  shared.peers.load(p.common);
  // All that can be read is read before anybody may be written to.
  RouteAhead ahead;
  if (at.block < ranks) {
    ahead = RouteAhead(p, at.block, at);
    RouteCounters(shared, p.max_slots).clear(route_warps(p.max_slots));
  }
  if (!open_operation(now, p.window, p.ticket, at, (p.phases & kReceive) != 0)) return false;
  const auto route = [&](int dst, const RouteAhead& first) {
    if (shared.peers.near(dst)) return route_to(now, p, shared, dst, first, at);
    if (shared.peers.active(dst)) send_far<kRows>(now, p, shared, dst, first, at);
  };
  if (at.block < ranks) route(at.block, ahead);
  for (int dst = at.block + at.blocks; dst < ranks; dst += at.blocks) {  // fewer blocks than ranks
    __syncthreads();
    RouteCounters(shared, p.max_slots).clear(route_warps(p.max_slots));
    route(dst, RouteAhead(p, dst, at));
  }
  while (unit < units) {
    send_piece<kRows>(now, p, shared, loaded, rank, token, piece, at.lane);
    unit += at.warps();
    if (unit < units) look();
  }
  return true;
}

// Phases hear, gather, place. False: not all has come.
__device__ bool receive(const Now& now, const Params& p, const Shared& shared, const Place& at) {
  const Gathered g = gathered_of(p, shared);
  bool good = !at.speaks() || hear(now, shared.peers, at);
  if (!gather(now, p, shared, g, at)) return false;
  if (at.speaks()) write_tables(p, g);
  const int ranks = p.common.num_ranks;
  const Messages messages(now, p, p.window);
  int tokens = 0, heard = -1;
  for (int src = 0; src < ranks; ++src) tokens += g.tokens[src];
  for (int unit = at.number(); good && unit < tokens * p.pieces; unit += at.warps()) {
    int src = 0, token = unit / p.pieces;
    const int piece = unit - token * p.pieces;
    while (token >= g.tokens[src]) token -= g.tokens[src++];
    good = shared.peers.far(src) ? receive_far_piece(now, p, g, {src, token, piece}, heard, at.lane)
                                 : receive_piece(now, p, g, messages.of(src, token), src, token, piece, at.lane);
  }
  clear_unwritten(p, g, at);
  return good;
}

}  // namespace

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
