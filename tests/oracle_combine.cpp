// SPDX-License-Identifier: MIT
// The oracle's combine: parts, merged group by group in the order asked for.
#include <algorithm>
#include <cmath>
#include <map>

#include "oracle_numbers.h"

namespace deep_ep::oracle {

namespace {

// A partial sum on its way to the final one.
struct Part {
  int group = 0;  // rank, later node
  int place = 0;  // a selection, or the highest of a group's
  float weight = 1.0f;
  bool weighted = false;
  std::vector<float> values;
};

bool comes_before(SumOrder::Key key, const Part& a, const Part& b) {
  if (key == SumOrder::Key::kRank && a.group != b.group) return a.group < b.group;
  return a.place < b.place;
}

void add(std::vector<float>& sum, const Part& part) {
  for (std::size_t c = 0; c < sum.size(); ++c) {
    sum[c] = part.weighted ? std::fma(part.weight, part.values[c], sum[c]) : sum[c] + part.values[c];
  }
}

// Sums the parts of each group, in the order of `key`, and rounds. to_group maps a part's group to the coarser one.
std::vector<Part> merge(std::vector<Part> parts, SumOrder::Key key, DType dtype, const std::vector<int>& to_group) {
  std::sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) { return comes_before(key, a, b); });
  std::map<int, Part> merged;
  for (const Part& part : parts) {
    const int group = to_group[part.group];
    Part& sum = merged[group];
    sum.group = group;
    sum.place = std::max(sum.place, part.place);
    sum.values.resize(part.values.size(), 0.0f);
    add(sum.values, part);
  }
  std::vector<Part> result;
  for (auto& [group, part] : merged) {
    for (float& value : part.values) value = rounded(dtype, value);
    result.push_back(std::move(part));
  }
  return result;
}

class HomeSum {
 public:
  HomeSum(const Exchange& e, const std::vector<Dispatched>& dispatched, const std::vector<CombineRank>& ranks,
          const SumOrder& order, int home)
      : e_(e), dispatched_(dispatched), ranks_(ranks), order_(order), home_(home) {}

  Array rows() const {
    const Array& like = ranks_[home_].x;
    const std::int64_t hidden = like.shape.back();
    const std::size_t item = item_bytes(like.dtype);
    const std::int64_t tokens = dispatched_[home_].num_tokens;
    Array out(like.dtype, {tokens, hidden});
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::vector<float> sum = token(t, hidden);
      for (std::int64_t c = 0; c < hidden; ++c) encode(like.dtype, sum[c], out.row(t) + c * item);
    }
    return out;
  }

 private:
  std::vector<Part> contributions(std::int64_t t) const {
    std::vector<Part> parts;
    for (int k = 0; k < e_.num_topk; ++k) {
      const std::int64_t at = t * e_.num_topk + k;
      const int rank = dispatched_[home_].dst_rank[at];
      if (rank < 0) continue;
      if (e_.layout == OutputLayout::kByRank) {
        const auto same = std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return p.group == rank; });
        if (same != parts.end()) {
          same->place = k;
          continue;
        }
      }
      Part part;
      part.group = rank;
      part.place = k;
      part.weighted = ranks_[home_].weights.given();
      if (part.weighted) part.weight = ranks_[home_].weights.get<float>(at);
      part.values = row_values(rank, dispatched_[home_].dst_row[at]);
      parts.push_back(std::move(part));
    }
    return parts;
  }

  std::vector<float> row_values(int rank, std::int64_t row) const {
    const Array& x = ranks_[rank].x;
    const std::int64_t hidden = x.shape.back();
    const std::size_t item = item_bytes(x.dtype);
    std::vector<float> values(hidden);
    for (std::int64_t c = 0; c < hidden; ++c) values[c] = decode(x.dtype, x.bytes.data() + (row * hidden + c) * item);
    return after_crossing(ranks_[home_].wire, x.dtype, values);
  }

  std::vector<float> token(std::int64_t t, std::int64_t hidden) const {
    const DType dtype = ranks_[home_].x.dtype;
    std::vector<Part> parts = contributions(t);
    std::vector<int> each_rank(e_.num_ranks);
    for (int r = 0; r < e_.num_ranks; ++r) each_rank[r] = r;
    if (order_.round_per_rank) parts = merge(std::move(parts), order_.key, dtype, each_rank);
    if (order_.round_per_node) parts = merge(std::move(parts), order_.key, dtype, e_.node_of);
    std::sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) { return comes_before(order_.key, a, b); });

    std::vector<float> sum(hidden, 0.0f);
    if (order_.bias_first) add_biases(t, sum);
    for (const Part& part : parts) add(sum, part);
    if (!order_.bias_first) add_biases(t, sum);
    return sum;
  }

  void add_biases(std::int64_t t, std::vector<float>& sum) const {
    for (const Array& bias : ranks_[home_].bias) {
      if (!bias.given()) continue;
      for (std::size_t c = 0; c < sum.size(); ++c) {
        sum[c] += decode(bias.dtype, bias.row(t) + c * item_bytes(bias.dtype));
      }
    }
  }

  const Exchange& e_;
  const std::vector<Dispatched>& dispatched_;
  const std::vector<CombineRank>& ranks_;
  SumOrder order_;
  int home_;
};

Array weights_home(const Exchange& e, const std::vector<Dispatched>& dispatched, const std::vector<CombineRank>& ranks,
                   int home, WeightsHome how) {
  const Dispatched& mine = dispatched[home];
  Array out(DType::kFp32, {mine.num_tokens, e.num_topk});
  for (std::int64_t t = 0; t < mine.num_tokens; ++t) {
    for (int k = 0; k < e.num_topk; ++k) {
      const std::int64_t at = t * e.num_topk + k;
      const int owner = mine.dst_rank[at];
      if (owner < 0) continue;
      if (e.layout != OutputLayout::kByRank) {
        out.set(at, ranks[owner].topk_weights.get<float>(mine.dst_row[at]));
        continue;
      }
      std::map<int, std::int64_t> row_on;  // every rank that received the token
      for (int j = 0; j < e.num_topk; ++j) {
        const std::int64_t other = t * e.num_topk + j;
        if (mine.dst_rank[other] >= 0) row_on[mine.dst_rank[other]] = mine.dst_row[other];
      }
      float sum = 0.0f;
      for (const auto& [rank, row] : row_on) {
        if (how == WeightsHome::kFromOwner && rank != owner) continue;
        sum += ranks[rank].topk_weights.get<float>(row * e.num_topk + k);
      }
      out.set(at, sum);
    }
  }
  return out;
}

}  // namespace

std::vector<Combined> combine(const Exchange& e, const std::vector<Dispatched>& dispatched,
                              const std::vector<CombineRank>& ranks, const SumOrder& order, WeightsHome home) {
  std::vector<Combined> all(e.num_ranks);
  for (int rank = 0; rank < e.num_ranks; ++rank) {
    if (ranks[rank].x.given()) all[rank].x = HomeSum(e, dispatched, ranks, order, rank).rows();
    if (ranks[rank].topk_weights.given()) all[rank].topk_weights = weights_home(e, dispatched, ranks, rank, home);
  }
  return all;
}

}  // namespace deep_ep::oracle
