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

// What a rank has sent before it adds.
struct Sent {
  bool all = true;
  int pieces = 0;   // lines: up to the last that another rank got
  int senders = 0;  // parts: warps of the block
};

// Phases open, announce, send.
template <class Number, class Form>
__device__ Sent send(const Now& now, const Params& p, const Peers& peers, std::int32_t* first_arrival,
                     const Flags& flags, const Place& at) {
  const int ranks = p.common.num_ranks, me = p.common.rank;
  for (int i = static_cast<int>(threadIdx.x); i <= ranks; i += kLowLatencyThreads)
    first_arrival[i] = p.first_arrival[i];
  peers.load(p.common);
  const auto open = [&] {
    const bool is_open = open_operation(now, have_room(now, p.window, at), at, (p.phases & kReceive) != 0);
    if (threadIdx.x == kLowLatencyThreads - 1) count_on(now, p.ticket);
    for (int peer = at.warp; is_open && at.speaks() && peer < ranks; peer += kLowLatencyWarps) {
      if (!peers.near(peer)) continue;
      write_call(now, peers.window(peer), at.lane);
      __syncwarp();
      if (at.lane == 0) publish(now, &words_in(now, peers.window(peer), me).announced, kSame);
    }
    return is_open;
  };
  Sent sent;
  if constexpr (kLines<Form>) {
    sent.all = send_by_lines<Number>(now, p, peers, first_arrival, open, at);
    const int last = p.own_row != nullptr && me + 1 == ranks ? me : ranks;
    sent.pieces = first_arrival[last] * (p.pieces > 0 ? p.pieces : 1);
  } else {
    const auto open_and_send_far = [&] {
      if (!open()) return false;
      for (int home = at.block; p.common.far.end != nullptr && home < ranks; home += at.blocks) {
        if (!peers.far(home) || !peers.active(home)) continue;
        send_far<Number, Form>(now, p, peers, first_arrival, home, at);
        __syncthreads();  // the next home counts anew
      }
      return true;
    };
    sent.senders = send_in_parts<Number, Form>(now, p, peers, first_arrival, flags, open_and_send_far, at);
    sent.all = sent.senders >= 0;
  }
  return sent;
}

// Sum
// ---------------------------------------------------------------------------------------------------------------------

// Phases hear, sum. False: not all has come.
template <class Number, bool kLevels, class Form>
__device__ bool receive(const Now& now, const Params& p, const Peers& peers, const Sent& sent, const Place& at) {
  const bool good = !at.speaks() || hear(now, p.window, peers, at);
  if constexpr (kLines<Form>)
    return sum_lines<Number, kLevels>(now, p, peers, sent.pieces, at) && good;
  else
    return sum_parts<Number, kLevels, Form>(now, p, peers, sent.senders, at) && good;
}

}  // namespace

namespace low_latency {  // the name by which profilers show it

template <class Number, bool kLevels, class Form>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) combine(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ std::uint32_t* to_raise[2][kLowLatencyWarps];
  fetch_parameters(p);
  ptx::await_kernel_before();
  const Place at;
  const Peers peers{reinterpret_cast<Peer*>(memory)};
  auto* const first_arrival = reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  Sent sent;
  if (sends) {
    sent = send<Number, Form>(now, p, peers, first_arrival, {to_raise}, at);
  } else {
    open_receiving(now, at);
    peers.load(p.common);
    __syncthreads();
  }
  bool good = sent.all;
  if (good && (p.phases & kReceive) != 0) good = receive<Number, kLevels, Form>(now, p, peers, sent, at);
  if (!good) abandon_operation(now);
}

}  // namespace low_latency

template <class Number, class Form>
const void* low_latency_combine_instance(bool levels) {
  return levels ? reinterpret_cast<const void*>(&low_latency::combine<Number, true, Form>)
                : reinterpret_cast<const void*>(&low_latency::combine<Number, false, Form>);
}

}  // namespace deep_ep::cuda
