// SPDX-License-Identifier: MIT
// Low-latency combine with homes that share no memory with us: one block for each of them writes its rows into pinned
// memory, laid out as the slots there, and hands them to the proxy thread row by row. The home waits until all of a
// rank's are there.
#pragma once

#include "cuda/low_latency_combine_parts.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A warp: the rows of one arrival that go home, and what comes with each. Returns how many puts that took, in lane 0.
template <class Number, class Wire>
__device__ std::uint32_t send_far_arrival(const Now& now, const Params& p, const Slots& slots, int home,
                                          const Arrival& from, int lane) {
  const unsigned selected = __ballot_sync(kAllLanes, from.row >= 0);
  if (selected == 0) return 0;
  if (p.row_bytes > 0) write_part<Number, Wire>(p, slots, from, selected, 0, p.row_bytes, lane);
  if (p.x_weights != nullptr) send_weights(p, slots, from.token, from.arrival, selected, from.row, lane);
  __syncwarp();  // what the lanes wrote comes before lane 0's release in push()
  if (lane != 0) return 0;
  std::uint32_t puts = 0;
  const int ticket = ticket_of(now);
  for (unsigned rest = one_row_per_rank(p) ? 1u << (31 - __clz(selected)) : selected; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    if (p.row_bytes > 0) {
      put_low_latency(now, home, ticket, slots.row_at(from.token, k), p.slot_bytes);
      ++puts;
    }
    if (p.x_weights != nullptr) {
      put_low_latency(now, home, ticket, slots.weights_at(from.token, k), plan::combine_weights_stride(p.num_topk));
      ++puts;
    }
  }
  return puts;
}

// A block: our call, and all rows, to one far home.
template <class Number, class Wire>
__device__ void send_far(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                         int home, const Place& at) {
  __shared__ std::uint32_t puts;
  if (threadIdx.x == 0) puts = 0;
  if (at.warp == kLowLatencyWarps - 1) write_signature(now, peers.window(home), at.lane);
  __syncthreads();
  if (threadIdx.x == 0) publish_to(now, home, net::Flag::kAnnounced, kSame, plan::WindowLayout::kAnnouncementHead);
  const Slots slots(p, staging_of(p.common, home, ticket_of(now)));
  for (int arrival = first_arrival[home] + at.warp; arrival < first_arrival[home + 1]; arrival += kLowLatencyWarps) {
    const Arrival from(p, arrival, 0, at.lane);
    const std::uint32_t of_arrival = send_far_arrival<Number, Wire>(now, p, slots, home, from, at.lane);
    if (at.lane == 0) atomicAdd(&puts, of_arrival);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  count_puts(now, puts);
  publish_to(now, home, net::Flag::kArrived, kSame, 0, puts);
}

}  // namespace
}  // namespace deep_ep::cuda
