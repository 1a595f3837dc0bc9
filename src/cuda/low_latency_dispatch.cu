// SPDX-License-Identifier: MIT
// Low-latency dispatch. Rows are cut into pieces; a warp reads a piece of a token, quantises it if asked, and writes it
// to every rank that the token goes to, at the place of its number, without asking anybody. Meanwhile one block for
// each destination counts, and tells it which tokens come and where their rows belong. All that travels are lines,
// which say themselves that they have come (plan/lines.h). A warp of the receiver waits for a piece and puts it at each
// of its experts. Far ranks get messages through the proxy thread (low_latency_dispatch_far.cuh). Phases: open, route |
// send ... hear, gather, place.
#include <algorithm>

#include "cuda/early_launch.h"
#include "cuda/low_latency_dispatch_far.cuh"

namespace deep_ep::cuda {

namespace {

// Phases open, route, send. False: not all was sent. `kFar`: there are far ranks.
template <Rows kRows, bool kFar>
__device__ bool send(const Now& now, const Params& p, const Shared& shared, const Place& at) {
  const int ranks = p.common.num_ranks;
  const int units = p.num_tokens * p.pieces;
  const bool room = have_room(now, p.window, at);  // first, by a warp that has rows last
  int unit = at.number(ranks);                     // blocks that route take rows last
  Leaving<kRows> leaving;
  if (unit < units) leaving = Leaving<kRows>(p, unit, at.lane);
  // All that can be read is read before anybody may be written to.
  RouteAhead ahead;
  if (at.block < ranks) {
    ahead = RouteAhead(p, at.block, at);
    RouteCounters(shared, ahead.slots).clear(ahead.batch.warps);
  }
  shared.peers.load(p.common);
  const bool open = open_operation(now, room, at, (p.phases & kReceive) != 0);
  for (int dst = at.block; open && dst < ranks; dst += at.blocks) {
    if (dst != at.block) {  // fewer blocks than ranks
      __syncthreads();
      ahead = RouteAhead(p, dst, at);
      RouteCounters(shared, ahead.slots).clear(ahead.batch.warps);
      __syncthreads();
    }
    if (!shared.peers.active(dst)) continue;
    if (kFar && shared.peers.far(dst))
      send_far<kRows>(now, p, shared, dst, ahead, at);
    else
      route_to(now, p, shared, dst, ahead, at);
  }
  // Behind the barriers of those that route, and by a warp that has neither rows, most times, nor words to say.
  if (threadIdx.x == 32 * (kLowLatencyWarps - 3)) count_on(now, p.ticket);
  if (!open) return false;
  while (unit < units) {
    send_piece(now, p, shared, leaving, at.lane);
    unit += at.warps();
    if (unit < units) leaving = Leaving<kRows>(p, unit, at.lane);
  }
  return true;
}

constexpr int kFewLooks = 5;  // warps of a block that look for rows before it is known which come

// Phases hear, gather, place. False: not all has come.
template <bool kFar>
__device__ bool receive(const Now& now, const Params& p, const Shared& shared, int* counted, const Place& at) {
  const Gathered g = gathered_of(p, shared);
  const Messages messages(now, p, p.window);
  const int ranks = p.common.num_ranks;
  const int most = ranks * p.max_tokens_per_rank * p.pieces;  // fits: all of them have lines, and these are memory
  // Blocks that have routed come late.
  int unit = at.number((p.phases & kSend) != 0 ? ranks : 0), heard = -1;
  // So few that looking for rows before it is known which come holds nobody up.
  const bool few = !kFar && most <= at.blocks * kFewLooks && unit < most;
  Incoming in(p, messages, min(unit, most - 1), at.lane);
  bool good = !at.speaks() || hear(now, p.window, shared.peers, at);
  good = take_counts(now, p, shared.peers, g) && good;
  if constexpr (kFar) good = take_far_counts(now, p, shared.peers, g, at) && good;
  bool looked = false;
  const int counting = counting_warps(p);
  if (idle_turn() < 32 * counting) {
    __syncwarp();
    if (at.lane == 0) atomicAdd(counted, 1);
  } else if (few) {  // the others, meanwhile
    const auto enough = [&] { return *static_cast<volatile int*>(counted) == counting; };
    in.look_until(p, number_of(now), enough, at.lane);
    looked = true;
  }
  if (!__syncthreads_and(good)) return false;
  if (unit < most && !looked) in.look(p, at.lane);  // when the counts are here, so are most rows
  if (!gather(now, p, g, at)) return false;
  if (at.speaks()) write_tables(p, g);
  int tokens = 0;
  for (int src = 0; src < ranks; ++src) tokens = max(tokens, g.tokens[src]);
  for (const int units = tokens * ranks * p.pieces; good && unit < units;) {
    if (in.token < g.tokens[in.src]) {
      if (kFar && shared.peers.far(in.src))
        good = receive_far_piece(now, p, g, {in.src, in.token, in.piece}, heard, at.lane);
      else
        good = receive_piece(now, p, g, in, at.lane);
    }
    unit += at.warps();
    if (unit >= units) break;
    in = Incoming(p, messages, unit, at.lane);
    in.look(p, at.lane);
  }
  clear_unwritten(p, g, at);
  return good;
}

}  // namespace

namespace low_latency {

template <Rows kRows, bool kFar>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) dispatch(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ int counted;  // warps that have taken counts: a hint for those that do other things meanwhile
  if (threadIdx.x == 0) counted = 0;
  fetch_parameters(p);
  ptx::await_kernel_before();
  const Place at;
  const Shared shared = shared_of(p, memory);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  bool good = true;
  if (sends) {
    good = send<kRows, kFar>(now, p, shared, at);
  } else {
    open_receiving(now, at);
    shared.peers.load(p.common);
    __syncthreads();
  }
  if ((p.phases & kReceive) != 0) {
    good = receive<kFar>(now, p, shared, &counted, at) && good;
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

// A kernel of its own where there are far ranks: what it does for them costs one that has none its registers.
const void* low_latency_dispatch_kernel(bool quantize, DType dtype, bool far) {
  return for_rows(quantize, dtype, [far](auto rows) {
    return far ? reinterpret_cast<const void*>(&low_latency::dispatch<decltype(rows)::value, true>)
               : reinterpret_cast<const void*>(&low_latency::dispatch<decltype(rows)::value, false>);
  });
}

const void* abandon_kernel() { return reinterpret_cast<const void*>(&abandon); }

RouteShape route_shape(int num_topk, int max_slots) {
  constexpr int kMostWords = 12 << 10;
  return {32 / num_topk, std::clamp(kMostWords / (max_slots + 1) - 1, 1, kLowLatencyWarps)};
}

std::size_t low_latency_shared_bytes(const Params& p) {
  return sizeof(Peer) * p.common.num_ranks +
         4 * (route_words(p.route.most_warps, p.max_slots) + gathered_words(p.common.num_ranks, p.num_slots));
}

void launch_low_latency_dispatch(const Params& params, int blocks, cudaStream_t stream) {
  Params copy = params;
  void* arguments[] = {&copy};
  launch_low_latency(low_latency_dispatch_kernel(params.quantize, params.x_dtype, params.common.far.end != nullptr),
                     blocks, arguments, low_latency_shared_bytes(params), stream);
}

void launch_low_latency(const void* kernel, int blocks, void** arguments, std::size_t shared, cudaStream_t stream) {
  launch_early(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLowLatencyThreads), arguments, shared, stream);
}

void launch_abandon(const AbandonParams& params, cudaStream_t stream) { abandon<<<1, 32, 0, stream>>>(params); }

}  // namespace deep_ep::cuda
