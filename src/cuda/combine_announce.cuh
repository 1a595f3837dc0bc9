// SPDX-License-Identifier: MIT
// Combine: how ranks tell each other where their rows lie.
#pragma once

#include "cuda/combine_feed.cuh"
#include "cuda/far.cuh"

namespace deep_ep::cuda {
namespace {  // a part of the kernels whose files include it

// Phase announce: where our rows lie; far ranks hear what we are going to ask them for.
__device__ void announce(const Now& now, const CombineParams& p) {
  const int me = p.common.rank;
  for (int peer = static_cast<int>(threadIdx.x); peer < p.common.num_ranks; peer += kThreads) {
    if (!now.active(peer)) continue;
    await_room(now, peer);
    Announcement& mine = now.announcement(peer, me);
    for (int field = 0; field < Signature::kNumFields; ++field) mine.signature[field] = p.common.signature[field];
    mine.x_at = p.x_at;
    mine.weights_at = p.weights_at;
    mine.rows = p.num_rows;
    mine.order = p.order;
    mine.factors = p.weights != nullptr;
    mine.requests = 0;
    if (now.far(peer)) {
      const Asked& asked = p.forwarded.asked[p.node_of_rank[peer]];
      if (asked.rail == peer) mine.requests = asked.requests;
    }
    // Release: rows that earlier kernels of this stream wrote come before it too.
    publish_to(now, peer, net::Flag::kAnnounced, kSame, sizeof(Announcement));
  }
}

// Phase await sources, one thread for each of them: the rank makes the same call, and its rows lie here. Null where it
// takes no part, and for far ranks, whose windows we cannot see.
__device__ bool await_source(const Now& now, int peer, Source& source) {
  source = {};
  if (!now.active(peer)) return true;
  if (!await_same_call(now, peer)) return false;
  if (now.far(peer)) return true;
  const Announcement& theirs = now.announcement(now.common.rank, peer);
  source = {now.window(peer) + theirs.x_at, reinterpret_cast<const float*>(now.window(peer) + theirs.weights_at),
            &now.words(peer, now.common.rank).finished};
  return true;
}

}  // namespace
}  // namespace deep_ep::cuda
