// SPDX-License-Identifier: MIT
// Combine, phase plan steps: which rows a token's sum has, in which order. A block plans the tokens that it sums.
#pragma once

#include "cuda/combine_sum.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// Several tokens of one warp: a lane for each of their selections.
struct PlanLanes {
  int lanes, tokens;  // of a token; at once
  int token_here, k;  // of this lane
  __device__ PlanLanes(int num_topk, int lane)
      : lanes(num_topk), tokens(32 / num_topk), token_here(lane / num_topk), k(lane % num_topk) {}
  __device__ int first() const { return token_here * lanes; }
  // Of the lanes in `mask` that belong to this lane's token.
  __device__ unsigned of_token(unsigned mask) const {
    return lanes == 32 ? mask : mask >> first() & ((1u << lanes) - 1);
  }
};

// A selection that a token's sum may have: where it stands, and what comes after it.
struct Place {
  int before = 0;  // terms
  int next = -1;   // lane of the next term
};

// All lanes. `key`: of the lane's term in the order of the plan, the largest number where it has none.
__device__ Place place_among(const PlanLanes& at, std::uint64_t key) {
  Place place;
  std::uint64_t next = ~std::uint64_t{0};
  for (int k = 0; k < at.lanes; ++k) {
    const int from = min(at.first() + k, 31);
    const std::uint64_t other = __shfl_sync(kAllLanes, static_cast<unsigned long long>(key), from);
    if (other < key) ++place.before;
    if (other > key && other < next) next = other, place.next = from;
  }
  return place;
}

// What memory says of a lane's selection.
struct Selection {
  int token, rank;  // rank -1: none
  std::int32_t row;
  float weight;
};

__device__ Selection read_selection(const CombineParams& p, const PlanLanes& at, int token) {
  Selection s{token, -1, 0, 1};
  if (at.token_here >= at.tokens || token >= p.num_tokens) return s;
  const std::int64_t entry = std::int64_t{token} * p.num_topk + at.k;
  s.rank = p.dst_rank[entry];
  s.row = p.row[entry];
  if (p.weights != nullptr) s.weight = p.weights[entry];
  return s;
}

// All lanes: as plan_terms, of the warp's tokens.
__device__ void plan_by_lanes(const Now& now, const CombineParams& p, const PlanLanes& at, const Selection& s) {
  const int rank = s.rank >= 0 && now.active(s.rank) ? s.rank : -1;
  const int node = rank >= 0 ? p.node_of_rank[rank] : -1;
  const auto highest = [&](int number) {
    const unsigned same = at.of_token(__match_any_sync(kAllLanes, number < 0 ? -1 : number * 32 + at.token_here));
    return 31 - __clz(static_cast<int>(same));
  };
  const plan::SumGroup of_rank{rank, highest(rank)};
  const plan::SumGroup of_node{node, p.order.round_per_node ? highest(node) : at.k};
  const bool has_row = rank >= 0 && (p.layout != OutputLayout::kByRank || of_rank.highest == at.k);
  const Place place = place_among(at, has_row ? plan::sum_key(p.order, at.k, of_rank, of_node) : ~std::uint64_t{0});
  const int next_rank = __shfl_sync(kAllLanes, rank, max(place.next, 0));
  const int next_node = __shfl_sync(kAllLanes, node, max(place.next, 0));
  const int count = __popc(at.of_token(__ballot_sync(kAllLanes, has_row)));
  if (at.token_here >= at.tokens || s.token >= p.num_tokens) return;
  if (at.k == 0) p.num_terms[s.token] = count;
  if (!has_row) return;
  const bool last = place.next < 0;
  const bool closes_rank = p.order.round_per_rank && (last || next_rank != rank);
  const bool closes_node = p.order.round_per_node && (last || next_node != node);
  p.terms[std::int64_t{s.token} * p.num_topk + place.before] = {
      s.row, rank, s.weight, (closes_rank ? Term::kRank : 0) | (closes_node ? Term::kNode : 0)};
}

// A thread per token.
__device__ void plan_by_threads(const Now& now, const CombineParams& p) {
  plan::SumStep local[kMostLocalSteps];
  const int step = static_cast<int>(gridDim.x) * kThreads;
  for (int token = static_cast<int>(blockIdx.x + threadIdx.x * gridDim.x); token < p.num_tokens; token += step) {
    const std::int64_t first = std::int64_t{token} * p.num_topk;
    p.num_terms[token] = plan_terms(
        {p.order, p.layout == OutputLayout::kByRank, p.num_topk, p.dst_rank + first, p.node_of_rank},
        p.steps != nullptr ? p.steps + first : local, p.terms + first, [&](int rank) { return now.active(rank); },
        [&](int rank) { return p.forwarded.joined && now.far(rank); }, [&](int k) { return p.row[first + k]; },
        [&](int k) { return p.weights != nullptr ? p.weights[first + k] : 1.0f; });
  }
}

// Lanes where they are enough and every term is a row; a thread that walks its token's selections alone waits for
// memory at each of them.
__device__ void plan_steps(const Now& now, const CombineParams& p) {
  if (p.num_topk > 32 || p.forwarded.joined) return plan_by_threads(now, p);
  const PlanLanes at(p.num_topk, static_cast<int>(threadIdx.x % 32));
  const int warp = static_cast<int>(threadIdx.x / 32), grid = static_cast<int>(gridDim.x);
  const int step = kWarps * at.tokens * grid, of_lane = at.token_here * grid;
  int token = static_cast<int>(blockIdx.x) + warp * at.tokens * grid;  // the warp's first
  Selection next = read_selection(p, at, token + of_lane);
  for (; token < p.num_tokens; token += step) {
    const Selection selection = next;
    next = read_selection(p, at, token + step + of_lane);  // on its way while this one is planned
    plan_by_lanes(now, p, at, selection);
  }
}

}  // namespace
}  // namespace deep_ep::cuda
