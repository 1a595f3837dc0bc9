// SPDX-License-Identifier: MIT
// The oracle: number formats, then routing, then dispatch, then combine.
#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>

namespace deep_ep::oracle {
namespace {

std::size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kU8:
    case DType::kFp8E4m3:
    case DType::kBool: return 1;
    case DType::kBf16:
    case DType::kFp16: return 2;
    case DType::kFp32:
    case DType::kI32: return 4;
    case DType::kI64: return 8;
  }
  return 0;
}

// A binary floating-point format: sign, exponent field, mantissa field.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // e4m3 has none: only the all-ones code is special
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int field_mask() const { return (1 << exponent_bits) - 1; }
  int mantissa_mask() const { return (1 << mantissa_bits) - 1; }
};

constexpr Format kBf16Format{8, 7, true};
constexpr Format kFp16Format{5, 10, true};
constexpr Format kE4m3Format{4, 3, false};

float decode_bits(const Format& f, int code) {
  const int sign_bit = 1 << (f.exponent_bits + f.mantissa_bits);
  const float sign = (code & sign_bit) != 0 ? -1.0f : 1.0f;
  const int field = (code >> f.mantissa_bits) & f.field_mask();
  const int mantissa = code & f.mantissa_mask();
  if (field == f.field_mask() && f.has_infinity) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  if (!f.has_infinity && field == f.field_mask() && mantissa == f.mantissa_mask()) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (field == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - f.bias() - f.mantissa_bits);
  return sign * std::ldexp(static_cast<float>(mantissa + (1 << f.mantissa_bits)), field - f.bias() - f.mantissa_bits);
}

int encode_bits(const Format& f, float value) {
  const int largest_field = f.field_mask();
  if (std::isnan(value)) {
    return f.has_infinity ? (largest_field << f.mantissa_bits) | (1 << (f.mantissa_bits - 1))
                          : (largest_field << f.mantissa_bits) | f.mantissa_mask();
  }
  const int sign = std::signbit(value) ? 1 << (f.exponent_bits + f.mantissa_bits) : 0;
  const int beyond =
      f.has_infinity ? largest_field << f.mantissa_bits : ((largest_field << f.mantissa_bits) | f.mantissa_mask()) - 1;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0.0) return sign;
  if (std::isinf(value)) return sign | beyond;
  const int exponent = std::max(std::ilogb(magnitude), 1 - f.bias());
  // In units of the last place. Exact before the rounding: a double holds every float times a power of two.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, f.mantissa_bits - exponent)));
  // The codes of one exponent follow those of the one below, so a mantissa that overflowed simply carries on.
  const int code = ((exponent + f.bias() - 1) << f.mantissa_bits) + units;
  return sign | std::min(code, beyond);
}

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

// FP8 of one row: codes and one stored word per 128 channels, or per 512 with four exponents in a word.
void quantize(const Fp8Options& options, const Array& x, std::int64_t row, std::byte* codes, std::byte* scales) {
  const std::int64_t hidden = x.shape[1];
  const std::size_t item = item_size(x.dtype);
  for (std::int64_t first = 0, group = 0; first < hidden; first += 128, ++group) {
    const std::int64_t last = std::min<std::int64_t>(first + 128, hidden);
    float largest = 1e-4f;
    for (std::int64_t c = first; c < last; ++c) {
      largest = std::fmax(largest, std::fabs(decode(x.dtype, x.row(row) + c * item)));
    }
    const float reciprocal = 1.0f / 448.0f;
    float scale = largest * reciprocal;
    float factor = 448.0f / largest;
    if (options.round_scale) {
      int exponent = std::ilogb(scale);
      if (std::ldexp(1.0f, exponent) < scale) ++exponent;
      scale = std::ldexp(1.0f, exponent);
      factor = std::ldexp(1.0f, -exponent);
    }
    for (std::int64_t c = first; c < last; ++c) {
      encode(DType::kFp8E4m3, decode(x.dtype, x.row(row) + c * item) * factor, codes + c);
    }
    if (options.ue8m0) {
      scales[group] = static_cast<std::byte>(std::ilogb(scale) + 127);
    } else {
      std::memcpy(scales + group * sizeof(float), &scale, sizeof(float));
    }
  }
}

std::int64_t fp8_words(const Fp8Options& options, std::int64_t hidden) {
  const std::int64_t groups = (hidden + 127) / 128;
  return options.ue8m0 ? (groups + 3) / 4 : groups;
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
    const std::size_t x_bytes = out_.x.shape.back() * item_size(out_.x.dtype);
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

void round_values(std::vector<float>& values, DType dtype) {
  for (float& v : values) {
    std::array<std::byte, 4> item;
    encode(dtype, v, item.data());
    v = decode(dtype, item.data());
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
    round_values(part.values, dtype);
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
    const std::size_t item = item_size(like.dtype);
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
    const std::size_t item = item_size(x.dtype);
    std::vector<float> values(hidden);
    for (std::int64_t c = 0; c < hidden; ++c) values[c] = decode(x.dtype, x.bytes.data() + (row * hidden + c) * item);
    return values;
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
        sum[c] += decode(bias.dtype, bias.row(t) + c * item_size(bias.dtype));
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

Array::Array(DType dtype, std::vector<std::int64_t> shape) : dtype(dtype), shape(std::move(shape)) {
  std::size_t items = 1;
  for (const std::int64_t n : this->shape) items *= static_cast<std::size_t>(n);
  bytes.resize(items * item_size(dtype));
}

std::size_t Array::row_bytes() const {
  std::size_t items = 1;
  for (std::size_t d = 1; d < shape.size(); ++d) items *= static_cast<std::size_t>(shape[d]);
  return items * item_size(dtype);
}

TensorView Array::view() const {
  TensorView view;
  if (shape.empty()) return view;
  view.data = const_cast<std::byte*>(bytes.data());
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

float decode(DType dtype, const std::byte* item) {
  std::uint16_t two = 0;
  float four = 0.0f;
  switch (dtype) {
    case DType::kFp8E4m3: return decode_bits(kE4m3Format, static_cast<int>(*item));
    case DType::kBf16: std::memcpy(&two, item, sizeof two); return decode_bits(kBf16Format, two);
    case DType::kFp16: std::memcpy(&two, item, sizeof two); return decode_bits(kFp16Format, two);
    case DType::kFp32: std::memcpy(&four, item, sizeof four); return four;
    case DType::kU8:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: break;
  }
  std::abort();  // a mistake in a test
}

void encode(DType dtype, float value, std::byte* item) {
  std::uint16_t two = 0;
  switch (dtype) {
    case DType::kFp8E4m3: *item = static_cast<std::byte>(encode_bits(kE4m3Format, value)); return;
    case DType::kBf16: two = static_cast<std::uint16_t>(encode_bits(kBf16Format, value)); break;
    case DType::kFp16: two = static_cast<std::uint16_t>(encode_bits(kFp16Format, value)); break;
    case DType::kFp32: std::memcpy(item, &value, sizeof value); return;
    case DType::kU8:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: std::abort();  // a mistake in a test
  }
  std::memcpy(item, &two, sizeof two);
}

std::int64_t DispatchRank::expert(std::int64_t token, int k, int num_topk) const {
  const std::int64_t at = token * num_topk + k;
  return topk_idx.dtype == DType::kI64 ? topk_idx.get<std::int64_t>(at) : topk_idx.get<std::int32_t>(at);
}

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

std::vector<Combined> combine(const Exchange& e, const std::vector<Dispatched>& dispatched,
                              const std::vector<CombineRank>& ranks, const SumOrder& order, WeightsHome home) {
  std::vector<Combined> all(e.num_ranks);
  for (int rank = 0; rank < e.num_ranks; ++rank) {
    if (ranks[rank].x.given()) all[rank].x = HomeSum(e, dispatched, ranks, order, rank).rows();
    if (ranks[rank].topk_weights.given()) all[rank].topk_weights = weights_home(e, dispatched, ranks, rank, home);
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
