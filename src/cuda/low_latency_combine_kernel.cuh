// SPDX-License-Identifier: MIT
// The kernel of low-latency combine, in all forms. Every row goes back into the slot of its selection at its token's
// home; with pre_reduce the rows of a token are weighed and added first, and one goes back. Home, a warp waits for what
// it adds, and adds it in the plan's order. Phases: open, announce | send ... hear, sum.
#pragma once

#include <type_traits>

#include "cuda/low_latency_combine_far.cuh"
#include "cuda/low_latency_combine_lines.cuh"

namespace deep_ep::cuda {

// A form in which rows cross: as lines, or in parts and then one of wire.cuh.
struct Lines {};
template <class Form>
inline constexpr bool kLines = std::is_same_v<Form, Lines>;

namespace {  // a part of the files that have its instances

// Phases open, announce, send. False: not all was sent.
template <class Number, class Form>
__device__ bool send(const Now& now, const Params& p, const Peers& peers, std::int32_t* first_arrival,
                     const Flags& flags, const Place& at) {
  const int ranks = p.common.num_ranks;
  const int parts = kLines<Form> ? (p.pieces > 0 ? p.pieces : 1) : p.parts.count;
  // Fits: all of them have flags or lines, and these are memory.
  const int most = ranks * p.max_tokens_per_rank * parts;
  int unit = at.number();
  Arrival from{};
  const auto look = [&] {  // may be behind the last arrival: the tables have room for the most that can come
    from.arrival = unit / parts;
    from.part = unit % parts;
    from.row = at.lane < p.num_topk ? p.arrival_row[from.arrival * p.num_topk + at.lane] : -1;
    from.token = p.src_token[from.arrival];
  };
  if (unit < most) look();
  for (int i = static_cast<int>(threadIdx.x); i <= ranks; i += kLowLatencyThreads)
    first_arrival[i] = p.first_arrival[i];
  peers.load(p.common);
  flags.clear();
  if (!open_operation(now, p.window, p.ticket, at, (p.phases & kReceive) != 0)) return false;
  if (at.speaks())
    for (int peer = at.warp; peer < ranks; peer += kLowLatencyWarps) {
      if (!peers.near(peer)) continue;
      write_signature(now, peers.window(peer), at.lane);
      __syncwarp();
      if (at.lane == 0) publish(now, &words_in(now, peers.window(peer), p.common.rank).announced, kSame);
    }
  const int units = first_arrival[ranks] * parts;
  if constexpr (kLines<Form>) {
    for (; unit < units; unit += at.warps()) {
      if (from.part < 0) look();
      send_piece<Number>(now, p, peers, first_arrival, from, at.lane);
      from.part = -1;
    }
  } else {
    for (int home = at.block; p.common.far.end != nullptr && home < ranks; home += at.blocks) {
      if (!peers.far(home) || !peers.active(home)) continue;
      send_far<Number, Form>(now, p, peers, first_arrival, home, at);
      __syncthreads();  // the next home counts anew
    }
    const int of_round = at.warps() * Flags::kUnits;
    for (int begun = 0; begun < units; begun += of_round, flags.raise(now, at))
      for (int i = 0; i < Flags::kUnits && unit < units; ++i) {
        send_part<Number, Form>(now, p, peers, first_arrival, flags, from, at.lane);
        unit += at.warps();
        if (unit < units) look();
      }
  }
  return true;
}

// Sum
// ---------------------------------------------------------------------------------------------------------------------

// Phases hear, sum. False: not all has come.
template <class Number, bool kLevels, class Form>
__device__ bool receive(const Now& now, const Params& p, const Peers& peers, const Place& at) {
  const bool good = !at.speaks() || hear(now, peers, at);
  if constexpr (kLines<Form>)
    return sum_lines<Number, kLevels>(now, p, peers, at) && good;
  else
    return sum_parts<Number, kLevels, Form>(now, p, peers, at) && good;
}

}  // namespace

namespace low_latency {  // the name by which profilers show it

template <class Number, bool kLevels, class Form>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) combine(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ std::uint32_t* to_raise[Flags::kMost];
  __shared__ int num_to_raise;
  fetch_parameters(p);
  const Place at;
  const Peers peers{reinterpret_cast<Peer*>(memory)};
  auto* const first_arrival = reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  bool good = true;
  if (sends) {
    good = send<Number, Form>(now, p, peers, first_arrival, {to_raise, &num_to_raise}, at);
  } else {
    open_receiving(now, at);
    peers.load(p.common);
    __syncthreads();
  }
  if ((p.phases & kReceive) != 0) good = receive<Number, kLevels, Form>(now, p, peers, at) && good;
  if (!good) abandon_operation(now);
}

}  // namespace low_latency

template <class Number, class Form>
const void* low_latency_combine_instance(bool levels) {
  return levels ? reinterpret_cast<const void*>(&low_latency::combine<Number, true, Form>)
                : reinterpret_cast<const void*>(&low_latency::combine<Number, false, Form>);
}

}  // namespace deep_ep::cuda
