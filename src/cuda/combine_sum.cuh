// SPDX-License-Identifier: MIT
// Combine: the terms of a token's sum, and how a warp adds them, level by level.
#pragma once

#include "cuda/combine_feed.cuh"
#include "cuda/encode.cuh"
#include "plan/sum_order.h"

namespace deep_ep::cuda {
namespace {  // a part of the kernels whose files include it

// Vectors of sixteen bytes that a lane sums at a time: as many as registers hold. Seven cut 7168 channels of 16 bits
// into four even pieces.
template <bool kLevels>
constexpr int kVectorsOf = kLevels ? 2 : 7;

// One thread: a token's terms, in the order of the plan, the same table as on the host. Where a node's sum came instead
// of its rows one term has it, and closes all levels below the last: alone in them it stays as it is. takes_part(rank);
// joined(rank): its node's sum came; row(k) and weight(k) of selection k.
template <class TakesPart, class Joined, class Row, class Weight>
__device__ int plan_terms(const plan::SumPlanInput& in, plan::SumStep* steps, Term* terms, const TakesPart& takes_part,
                          const Joined& joined, const Row& row, const Weight& weight) {
  const int count = plan::make_sum_steps(in, steps, takes_part);
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    const plan::SumStep s = steps[i];
    if (!joined(s.rank)) {
      terms[kept++] = {row(s.k), s.rank, weight(s.k),
                       (s.closes_rank ? Term::kRank : 0) | (s.closes_node ? Term::kNode : 0)};
    } else if (i == 0 || in.node_of_rank[steps[i - 1].rank] != in.node_of_rank[s.rank]) {
      terms[kept++] = {row(s.k), s.rank, 1.0f, (in.order.round_per_rank ? Term::kRank : 0) | Term::kNode};
    }
  }
  return kept;
}

// A lane's part of a sum.
template <class Number, int kVectors>
struct Sum {
  static constexpr int kElements = 16 / Number::kBytes;
  float x[kVectors][kElements] = {};

  template <bool kWeighted>
  __device__ void add(int i, uint4 vector, float weight) {
    float value[kElements];
    Number::widen_sixteen(vector, value);
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      x[i][j] = kWeighted ? plan::fma_rn(weight, value[j], x[i][j]) : plan::add_rn(x[i][j], value[j]);
  }
  __device__ uint4 narrow(int i) const { return Number::narrow_sixteen(x[i]); }
  // A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
  __device__ void close_into(Sum& above) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) above.template add<false>(i, narrow(i), 1);
    *this = Sum{};
  }
};

// One piece: every term in order, level by level.
template <class Number, bool kLevels, bool kWeighted, int kVectors, class Table>
__device__ void add_terms(const SumOrder& order, const TermReader<Table>& reader, Terms& terms, int piece,
                          Feed<kVectors, Table>& feed, Sum<Number, kVectors>& of_all) {
  const int bytes = reader.share.bytes(piece);
  Sum<Number, kLevels ? kVectors : 1> of_rank, of_node;
  for (int number = 0; number < terms.count; ++number) {
    reader.reach(terms, number);
    const float weight = kWeighted ? terms.weight_of(number) : 1;
    const uint4* const vectors = feed.await(terms, number, piece);
    if constexpr (!kLevels) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) of_all.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
    } else {
      if (order.round_per_rank) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) of_rank.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
      } else {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) of_node.template add<kWeighted>(i, feed.read(vectors, i, bytes), weight);
      }
      const int closes = terms.closes_of(number);
      if ((closes & Term::kRank) != 0 && order.round_per_node) of_rank.close_into(of_node);
      if ((closes & Term::kRank) != 0 && !order.round_per_node) of_rank.close_into(of_all);
      if ((closes & Term::kNode) != 0) of_node.close_into(of_all);
    }
    feed.release();
  }
}

}  // namespace
}  // namespace deep_ep::cuda
