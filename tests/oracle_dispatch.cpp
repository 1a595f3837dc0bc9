// SPDX-License-Identifier: MIT
// The oracle's routing, dispatch and layout: who gets which token, at which row.
#include <algorithm>

#include "oracle_numbers.h"

namespace deep_ep::oracle {

namespace {

struct Home {
  int rank = -1;
  int slot = -1;
};

// Every copy of every expert, in rank order.
std::vector<std::vector<Home>> homes_of(const Exchange& e) {
  std::vector<std::vector<Home>> homes(e.num_experts);
  for (int rank = 0; rank < e.num_ranks; ++rank) {
    for (int slot = 0; slot < e.num_slots(rank); ++slot) homes[e.hosted[rank][slot]].push_back({rank, slot});
  }
  return homes;
}

Home choose(const Exchange& e, const std::vector<Home>& homes, int src, std::int64_t token) {
  std::vector<Home> candidates = homes;
  if (e.policy == Placement::Policy::kLocalFirst) {
    std::vector<Home> own, near;
    for (const Home& h : homes) {
      if (h.rank == src) own.push_back(h);
      if (e.node_of[h.rank] == e.node_of[src]) near.push_back(h);
    }
    if (!own.empty()) {
      candidates = own;
    } else if (!near.empty()) {
      candidates = near;
    }
  }
  return candidates[(src + token) % static_cast<std::int64_t>(candidates.size())];
}

// [rank][token * topk + k]
using Routes = std::vector<std::vector<Home>>;

Routes route(const Exchange& e, const std::vector<DispatchRank>& ranks) {
  const auto homes = homes_of(e);
  Routes routes(e.num_ranks);
  for (int src = 0; src < e.num_ranks; ++src) {
    const std::int64_t tokens = ranks[src].x.rows();
    routes[src].resize(tokens * e.num_topk);
    if (e.is_masked(src)) continue;
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int k = 0; k < e.num_topk; ++k) {
        const std::int64_t expert = ranks[src].expert(t, k, e.num_topk);
        if (expert < 0) continue;
        const Home home = choose(e, homes[expert], src, t);
        if (!e.is_masked(home.rank)) routes[src][t * e.num_topk + k] = home;
      }
    }
  }
  return routes;
}

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Arrival {
  int src = 0;
  std::int64_t token = 0;
};

// Allocates what one receiver gets and decides the row of each of its (arrival, k).
class Receiver {
 public:
  Receiver(const Exchange& e, const std::vector<DispatchRank>& ranks, const Routes& routes, int rank)
      : e_(e), ranks_(ranks), routes_(routes), rank_(rank) {}

  Dispatched run() {
    list_arrivals();
    count_slots();
    allocate();
    std::vector<std::int32_t> next(out_.slot_first_row.begin(), out_.slot_first_row.end());
    for (std::size_t a = 0; a < arrivals_.size(); ++a) place(static_cast<std::int64_t>(a), next);
    return std::move(out_);
  }

 private:
  const Home& home(const Arrival& a, int k) const { return routes_[a.src][a.token * e_.num_topk + k]; }

  void list_arrivals() {
    for (int src = 0; src < e_.num_ranks; ++src) {
      out_.first_arrival.push_back(static_cast<std::int32_t>(arrivals_.size()));
      for (std::int64_t t = 0; t < ranks_[src].x.rows(); ++t) {
        const Arrival arrival{src, t};
        for (int k = 0; k < e_.num_topk; ++k) {
          if (home(arrival, k).rank != rank_) continue;
          arrivals_.push_back(arrival);
          break;
        }
      }
    }
    out_.first_arrival.push_back(static_cast<std::int32_t>(arrivals_.size()));
    out_.num_arrivals = static_cast<std::int64_t>(arrivals_.size());
    for (const Arrival& a : arrivals_) out_.src_token.push_back(static_cast<std::int32_t>(a.token));
  }

  void count_slots() {
    out_.slot_rows.assign(e_.num_slots(rank_), 0);
    for (const Arrival& a : arrivals_) {
      for (int k = 0; k < e_.num_topk; ++k) {
        if (home(a, k).rank == rank_) ++out_.slot_rows[home(a, k).slot];
      }
    }
    std::int64_t row = 0;
    for (int s = 0; s < e_.num_slots(rank_); ++s) {
      out_.slot_first_row.push_back(static_cast<std::int32_t>(row));
      row += e_.layout == OutputLayout::kPadded ? std::int64_t{e_.num_ranks} * e_.max_tokens
                                                : round_up(out_.slot_rows[s], e_.alignment);
    }
    out_.slot_first_row.push_back(static_cast<std::int32_t>(row));
    out_.num_rows = e_.layout == OutputLayout::kByRank ? out_.num_arrivals : row;
  }

  std::vector<std::int64_t> row_shape(std::int64_t width) const {
    if (e_.layout != OutputLayout::kPadded) return {out_.num_rows, width};
    return {e_.num_slots(rank_), std::int64_t{e_.num_ranks} * e_.max_tokens, width};
  }

  void allocate() {
    const DispatchRank& like = ranks_[rank_];
    const std::int64_t hidden = like.x.shape[1];
    out_.x = Array(e_.fp8 ? DType::kFp8E4m3 : like.x.dtype, row_shape(hidden));
    if (e_.fp8) out_.scales = Array(e_.fp8->ue8m0 ? DType::kI32 : DType::kFp32, row_shape(fp8_words(*e_.fp8, hidden)));
    if (like.scales.given()) out_.scales = Array(like.scales.dtype, row_shape(like.scales.shape[1]));
    out_.topk_idx = Array(like.topk_idx.dtype, {out_.num_arrivals, e_.num_topk});
    if (like.topk_weights.given()) {
      if (e_.layout == OutputLayout::kByRank) {
        out_.topk_weights = Array(DType::kFp32, {out_.num_arrivals, e_.num_topk});
      } else {
        auto shape = row_shape(1);
        shape.pop_back();
        out_.topk_weights = Array(DType::kFp32, shape);
      }
    }
    for (const Array& side : like.side)
      out_.side.emplace_back(side.dtype, std::vector{out_.num_arrivals, side.shape[1]});
    out_.row_written.assign(out_.num_rows, e_.layout != OutputLayout::kPadded);
    out_.arrival_row.assign(out_.num_arrivals * e_.num_topk, -1);
  }

  void place(std::int64_t a, std::vector<std::int32_t>& next) {
    const Arrival& from = arrivals_[a];
    const DispatchRank& src = ranks_[from.src];
    const bool by_rank = e_.layout == OutputLayout::kByRank;
    if (by_rank) write_row(a, from);
    for (int k = 0; k < e_.num_topk; ++k) {
      const Home& to = home(from, k);
      const bool here = to.rank == rank_;
      const std::int64_t at = a * e_.num_topk + k;
      const float weight = src.topk_weights.given() ? src.topk_weights.get<float>(from.token * e_.num_topk + k) : 0.0f;
      set_id(at, here ? to.slot : -1);
      if (by_rank && src.topk_weights.given()) {
        out_.topk_weights.set(at, here || !e_.mask_topk_weights ? weight : 0.0f);
      }
      if (by_rank && here) out_.arrival_row[at] = static_cast<std::int32_t>(a);
      if (by_rank || !here) continue;
      const std::int32_t row = next[to.slot]++;
      out_.arrival_row[at] = row;
      write_row(row, from);
      if (src.topk_weights.given()) out_.topk_weights.set(row, weight);
    }
    for (std::size_t i = 0; i < src.side.size(); ++i) {
      std::memcpy(out_.side[i].row(a), src.side[i].row(from.token), src.side[i].row_bytes());
    }
  }

  void set_id(std::int64_t at, int slot) {
    if (out_.topk_idx.dtype == DType::kI64) {
      out_.topk_idx.set<std::int64_t>(at, slot);
    } else {
      out_.topk_idx.set<std::int32_t>(at, slot);
    }
  }

  void write_row(std::int64_t row, const Arrival& from) {
    const DispatchRank& src = ranks_[from.src];
    const std::size_t x_bytes = out_.x.shape.back() * item_bytes(out_.x.dtype);
    const std::size_t scale_bytes = out_.scales.given() ? out_.scales.shape.back() * 4 : 0;
    std::byte* x = out_.x.bytes.data() + row * x_bytes;
    std::byte* scales = out_.scales.bytes.data() + row * scale_bytes;
    if (e_.fp8) {
      quantize(*e_.fp8, src.x, from.token, x, scales);
    } else {
      std::memcpy(x, src.x.row(from.token), x_bytes);
      if (scale_bytes > 0) std::memcpy(scales, src.scales.row(from.token), scale_bytes);
    }
    out_.row_written[row] = true;
  }

  const Exchange& e_;
  const std::vector<DispatchRank>& ranks_;
  const Routes& routes_;
  int rank_;
  std::vector<Arrival> arrivals_;
  Dispatched out_;
};

}  // namespace

std::vector<Dispatched> dispatch(const Exchange& e, const std::vector<DispatchRank>& ranks) {
  const Routes routes = route(e, ranks);
  std::vector<Dispatched> all;
  for (int rank = 0; rank < e.num_ranks; ++rank) all.push_back(Receiver(e, ranks, routes, rank).run());

  std::vector<std::int32_t> between(std::size_t(e.num_ranks) * e.num_ranks);
  for (int dst = 0; dst < e.num_ranks; ++dst) {
    for (int src = 0; src < e.num_ranks; ++src) {
      between[src * e.num_ranks + dst] = all[dst].first_arrival[src + 1] - all[dst].first_arrival[src];
    }
  }
  // The way back: the row that each selection took, found by walking the receivers' arrivals.
  for (int src = 0; src < e.num_ranks; ++src) {
    Dispatched& mine = all[src];
    mine.tokens_between = between;
    mine.num_tokens = ranks[src].x.rows();
    for (const Home& home : routes[src]) mine.dst_rank.push_back(home.rank);
    mine.dst_row.assign(routes[src].size(), -1);
    mine.dst_arrival.assign(routes[src].size(), -1);
    for (const Dispatched& there : all) {
      const int dst = static_cast<int>(&there - all.data());
      for (std::int32_t a = there.first_arrival[src]; a < there.first_arrival[src + 1]; ++a) {
        for (int k = 0; k < e.num_topk; ++k) {
          const std::int64_t at = std::int64_t{there.src_token[a]} * e.num_topk + k;
          if (routes[src][at].rank != dst) continue;
          mine.dst_row[at] = there.arrival_row[std::int64_t{a} * e.num_topk + k];
          mine.dst_arrival[at] = a;
        }
      }
    }
  }
  return all;
}

Layout layout(const Exchange& e, const DispatchRank& tokens, int rank) {
  const auto homes = homes_of(e);
  Layout out;
  out.tokens_per_rank.assign(e.num_ranks, 0);
  out.tokens_per_node.assign(*std::max_element(e.node_of.begin(), e.node_of.end()) + 1, 0);
  out.tokens_per_expert.assign(e.num_experts, 0);
  out.is_token_in_rank.assign(tokens.topk_idx.rows() * e.num_ranks, 0);
  for (std::int64_t t = 0; t < tokens.topk_idx.rows(); ++t) {
    std::vector<bool> node_seen(out.tokens_per_node.size());
    for (int k = 0; k < e.num_topk; ++k) {
      const std::int64_t expert = tokens.expert(t, k, e.num_topk);
      if (expert < 0) continue;
      ++out.tokens_per_expert[expert];
      const int dst = choose(e, homes[expert], rank, t).rank;
      out.is_token_in_rank[t * e.num_ranks + dst] = 1;
      node_seen[e.node_of[dst]] = true;
    }
    for (int r = 0; r < e.num_ranks; ++r) out.tokens_per_rank[r] += out.is_token_in_rank[t * e.num_ranks + r];
    for (std::size_t n = 0; n < node_seen.size(); ++n) out.tokens_per_node[n] += node_seen[n] ? 1 : 0;
  }
  return out;
}

}  // namespace deep_ep::oracle
