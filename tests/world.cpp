// SPDX-License-Identifier: MIT
// Random inputs, and bitwise comparison with the oracle.
#include "world.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>

namespace deep_ep::test {

using oracle::Array;

std::uint64_t Random::next() {
  state_ += 0x9e3779b97f4a7c15ull;
  std::uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

namespace {

const char* layout_name(OutputLayout layout) {
  switch (layout) {
    case OutputLayout::kByRank: return "by_rank";
    case OutputLayout::kByExpert: return "by_expert";
    case OutputLayout::kPadded: return "padded";
  }
  return "?";
}

const char* homes_name(Homes homes) {
  switch (homes) {
    case Homes::kEven: return "even";
    case Homes::kUneven: return "uneven";
    case Homes::kReplicas: return "replicas";
  }
  return "?";
}

// Sign, an exponent around that of 1, any mantissa.
std::uint32_t random_bits(Random& random, DType dtype) {
  const std::uint64_t r = random.next();
  const std::uint32_t mantissa = static_cast<std::uint32_t>(r >> 32);
  const std::uint32_t exponent = static_cast<std::uint32_t>((r >> 8) % 6);
  const std::uint32_t sign = static_cast<std::uint32_t>(r & 1);
  switch (dtype) {
    case DType::kBf16: return sign << 15 | (124 + exponent) << 7 | (mantissa & 0x7f);
    case DType::kFp16: return sign << 15 | (12 + exponent) << 10 | (mantissa & 0x3ff);
    case DType::kFp32: return sign << 31 | (124 + exponent) << 23 | (mantissa & 0x7fffff);
    case DType::kU8:
    case DType::kFp8E4m3:
    case DType::kI32:
    case DType::kI64: return mantissa;
    case DType::kBool: return sign;
  }
  return 0;
}

std::vector<int> nodes(const Shape& shape) {
  std::vector<int> node_of;
  for (int rank = 0, node = 0, left = 0; rank < shape.ranks; ++rank, --left) {
    if (left == 0) {
      if (rank > 0) ++node;
      const auto& sizes = shape.ranks_per_node;
      left = sizes.empty() ? shape.ranks : sizes[std::min<std::size_t>(node, sizes.size() - 1)];
    }
    node_of.push_back(node);
  }
  return node_of;
}

std::vector<std::vector<int>> hosting(const Shape& shape, Random& random) {
  std::vector<std::vector<int>> hosted(shape.ranks);
  switch (shape.homes) {
    case Homes::kEven:
      for (int rank = 0, expert = 0; rank < shape.ranks; ++rank) {
        const int count = shape.experts / shape.ranks + (rank < shape.experts % shape.ranks ? 1 : 0);
        for (int i = 0; i < count; ++i) hosted[rank].push_back(expert++);
      }
      return hosted;
    case Homes::kUneven:
    case Homes::kReplicas: break;
  }
  for (int expert = 0; expert < shape.experts; ++expert) {
    const int copies = shape.homes == Homes::kUneven ? 1 : static_cast<int>(random.between(1, shape.ranks));
    std::vector<int> ranks(shape.ranks);
    std::iota(ranks.begin(), ranks.end(), 0);
    for (int c = 0; c < copies; ++c) {
      std::swap(ranks[c], ranks[random.between(c, shape.ranks - 1)]);
      auto& list = hosted[ranks[c]];
      list.insert(list.begin() + random.below(static_cast<std::int64_t>(list.size()) + 1), expert);
    }
  }
  return hosted;
}

Array random_ids(const Shape& shape, Random& random, std::int64_t tokens) {
  Array ids(shape.idx64 ? DType::kI64 : DType::kI32, {tokens, shape.topk});
  std::vector<int> experts(shape.experts);
  std::iota(experts.begin(), experts.end(), 0);
  for (std::int64_t at = 0; at < tokens * shape.topk; ++at) {
    const std::int64_t k = at % shape.topk;
    std::int64_t id = -1;
    if (shape.duplicates) {
      id = random.below(shape.experts);
    } else if (k < shape.experts) {  // beyond that a token has no expert left
      std::swap(experts[k], experts[random.between(k, shape.experts - 1)]);
      id = experts[k];
    }
    if (random.below(100) < shape.percent_missing) id = -1 - random.below(3);
    if (shape.idx64) {
      ids.set<std::int64_t>(at, id);
    } else {
      ids.set<std::int32_t>(at, static_cast<std::int32_t>(id));
    }
  }
  return ids;
}

// Rows for quantising want spread magnitudes, and groups that are all zero or tiny.
void spread_magnitudes(Array& x, Random& random) {
  const std::size_t item = item_bytes(x.dtype);
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    for (std::int64_t first = 0; first < x.shape[1]; first += 128) {
      const float factor = random.pick({1.0f, 1.0f, 0.0f, 1e-6f, 100.0f, 0.03f});
      for (std::int64_t c = first; c < std::min(first + 128, x.shape[1]); ++c) {
        std::byte* at = x.row(t) + c * item;
        oracle::encode(x.dtype, oracle::decode(x.dtype, at) * factor, at);
      }
    }
  }
}

void strew_odd_values(Array& x, Random& random) {
  const std::size_t item = item_bytes(x.dtype);
  using Limits = std::numeric_limits<float>;
  for (std::size_t at = 0; at < x.bytes.size(); at += item) {
    if (!random.one_in(40)) continue;
    const float odd = random.pick(
        {0.0f, -0.0f, 1e-40f, -3e-6f, 65504.0f, -3e38f, Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN()});
    oracle::encode(x.dtype, odd, x.bytes.data() + at);
  }
}

Array column_major(const Array& a) {
  Array out(a.dtype, {a.shape[1], a.shape[0]});
  for (std::int64_t r = 0; r < a.shape[0]; ++r) {
    for (std::int64_t c = 0; c < a.shape[1]; ++c) {
      out.set(c * a.shape[0] + r, a.get<std::uint32_t>(r * a.shape[1] + c));
    }
  }
  return out;
}

std::string shape_text(const TensorView& view) { return view.given() ? describe(view) : "nothing"; }

// Compares `rows` first rows in the order of the logical shape, whatever the strides. skip: rows whose content is
// undefined.
std::string compare_rows(const char* what, const TensorView& got, const Array& expected, std::int64_t rows,
                         const std::vector<bool>* written = nullptr) {
  const std::size_t item = item_bytes(expected.dtype);
  const int dims = static_cast<int>(expected.shape.size());
  const std::int64_t outer = dims == 3 ? expected.shape[1] : 1;  // rows of a slot
  const std::int64_t width = dims == 1 ? 1 : expected.shape[dims - 1];
  for (std::int64_t r = 0; r < rows; ++r) {
    if (written != nullptr && !(*written)[r]) continue;
    std::int64_t base = r * got.strides[0];
    if (dims == 3) base = (r / outer) * got.strides[0] + (r % outer) * got.strides[1];
    const std::int64_t step = dims == 1 ? 1 : got.strides[dims - 1];
    const std::byte* have = got.as<std::byte>();
    const std::byte* want = expected.bytes.data() + r * width * item;
    for (std::int64_t c = 0; c < width; ++c) {
      if (std::memcmp(have + (base + c * step) * item, want + c * item, item) == 0) continue;
      std::uint64_t h = 0, w = 0;
      std::memcpy(&h, have + (base + c * step) * item, item);
      std::memcpy(&w, want + c * item, item);
      std::ostringstream text;
      text << what << " " << shape_text(got) << " differs at row " << r << " column " << c << std::hex << ": 0x" << h
           << " instead of 0x" << w;
      return text.str();
    }
  }
  return "";
}

bool same_shape(const TensorView& got, const Array& expected, std::int64_t first_dim = -1) {
  if (got.given() != expected.given()) return false;
  if (!got.given()) return true;
  if (got.dtype != expected.dtype || got.ndim != static_cast<int>(expected.shape.size())) return false;
  for (int d = 0; d < got.ndim; ++d) {
    if (got.shape[d] != (d == 0 && first_dim >= 0 ? first_dim : expected.shape[d])) return false;
  }
  return true;
}

std::string compare(const char* what, const TensorView& got, const Array& expected,
                    const std::vector<bool>* written = nullptr) {
  if (!same_shape(got, expected)) {
    return std::string(what) + " is " + shape_text(got) + " instead of " + shape_text(expected.view());
  }
  if (!got.given()) return "";
  std::int64_t rows = expected.shape[0];
  if (written != nullptr) rows = static_cast<std::int64_t>(written->size());
  if (written == nullptr && expected.shape.size() == 3) rows *= expected.shape[1];
  if (written != nullptr && expected.shape.size() == 2 && expected.shape[0] != rows) {
    // [slots, rows of a slot]: one value per row
    Array flat = expected;
    flat.shape = {rows};
    TensorView view = got;
    view.ndim = 1;
    view.shape[0] = rows;
    view.strides[0] = 1;
    return compare_rows(what, view, flat, rows, written);
  }
  return compare_rows(what, got, expected, rows, written);
}

std::string compare_ints(const char* what, const TensorView& got, const std::vector<std::int32_t>& expected,
                         std::int64_t prefix = -1) {
  const std::string begin = std::string("handle.") + what;
  if (!got.given() || got.dtype != DType::kI32) return begin + " is " + shape_text(got);
  const std::int64_t count = prefix >= 0 ? prefix : static_cast<std::int64_t>(expected.size());
  if (prefix < 0 ? got.numel() != count : got.numel() < count) {
    return begin + " has " + std::to_string(got.numel()) + " entries instead of " + std::to_string(count);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (got.as<std::int32_t>()[i] != expected[i]) {
      return begin + " differs at " + std::to_string(i) + ": " + std::to_string(got.as<std::int32_t>()[i]) +
             " instead of " + std::to_string(expected[i]);
    }
  }
  return "";
}

std::string compare_tokens_between(const World& world, int rank, const TensorView& got) {
  const int n = world.shape.ranks;
  if (!got.given() || got.dtype != DType::kI32 || got.numel() != std::int64_t{n} * n) {
    return "handle.tokens_between is " + shape_text(got);
  }
  for (int from = 0; from < n; ++from) {
    for (int to = 0; to < n; ++to) {
      if (world.shape.low_latency && to != rank) continue;
      const std::int32_t have = got.as<std::int32_t>()[from * n + to];
      const std::int32_t want = world.expected[rank].tokens_between[from * n + to];
      if (have != want) {
        return "handle.tokens_between[" + std::to_string(from) + "," + std::to_string(to) + "] is " +
               std::to_string(have) + " instead of " + std::to_string(want);
      }
    }
  }
  return "";
}

std::string first_of(std::initializer_list<std::string> messages) {
  for (const std::string& m : messages) {
    if (!m.empty()) return m;
  }
  return "";
}

std::string compare_scalars(const World& world, int rank, const Handle& h) {
  std::ostringstream text;
  const auto check = [&](const char* what, std::int64_t got, std::int64_t want) {
    if (got != want && text.str().empty()) text << "handle." << what << " is " << got << " instead of " << want;
  };
  check("layout", static_cast<int>(h.layout), static_cast<int>(world.shape.layout));
  check("num_ranks", h.num_ranks, world.shape.ranks);
  check("num_topk", h.num_topk, world.shape.topk);
  check("num_experts", h.num_experts, world.shape.experts);
  check("expert_alignment", h.expert_alignment, world.shape.alignment);
  check("low_latency", h.low_latency, world.shape.low_latency);
  check("topk_idx_64", h.topk_idx_64, world.shape.idx64);
  check("num_tokens", h.num_tokens, world.expected[rank].num_tokens);
  if (!h.placement && text.str().empty()) text << "handle.placement is missing";
  return text.str();
}

std::string compare_handle(const World& world, int rank, const Handle& h, bool bounded) {
  const oracle::Dispatched& e = world.expected[rank];
  if (!bounded && (h.num_rows != e.num_rows || h.num_arrivals != e.num_arrivals)) {
    return "handle has " + std::to_string(h.num_rows) + " rows, " + std::to_string(h.num_arrivals) +
           " arrivals instead of " + std::to_string(e.num_rows) + " and " + std::to_string(e.num_arrivals);
  }
  const bool low = world.shape.low_latency;  // there the sender does not know rows, and the receiver always does
  const auto absent = [](const char* what, const TensorView& view) {
    return view.given() ? std::string("handle.") + what + " is given" : std::string();
  };
  return first_of(
      {compare_scalars(world, rank, h), compare_ints("dst_rank", h.dst_rank, e.dst_rank),
       low ? absent("dst_row", h.dst_row) : compare_ints("dst_row", h.dst_row, e.dst_row),
       low ? absent("dst_arrival", h.dst_arrival) : compare_ints("dst_arrival", h.dst_arrival, e.dst_arrival),
       compare_ints("first_arrival", h.first_arrival, e.first_arrival),
       compare_ints("src_token", h.src_token, e.src_token, bounded ? e.num_arrivals : -1),
       world.shape.layout == OutputLayout::kByRank && !low
           ? absent("arrival_row", h.arrival_row)
           : compare_ints("arrival_row", h.arrival_row, e.arrival_row, bounded ? e.num_arrivals * h.num_topk : -1),
       compare_ints("slot_rows", h.slot_rows, e.slot_rows),
       compare_ints("slot_first_row", h.slot_first_row, e.slot_first_row),
       compare_tokens_between(world, rank, h.tokens_between)});
}

std::string compare_scale_strides(const World& world, const TensorView& scales) {
  if (!scales.given()) return "";
  const bool padded = scales.ndim == 3;
  const std::int64_t rows = scales.shape[padded ? 1 : 0];
  const std::int64_t width = scales.shape[padded ? 2 : 1];
  const bool columns = world.shape.scale_order == ScaleOrder::kColumnMajor;
  const std::int64_t step = padded ? rows : (rows + 3) / 4 * 4;
  const std::int64_t row_stride = columns ? 1 : width;
  const std::int64_t column_stride = columns ? step : 1;
  if (rows < 2 || width < 2) return "";  // strides of a single row or column say nothing
  if (scales.strides[padded ? 1 : 0] != row_stride || scales.strides[padded ? 2 : 1] != column_stride) {
    return "scales have strides " + std::to_string(scales.strides[padded ? 1 : 0]) + ", " +
           std::to_string(scales.strides[padded ? 2 : 1]) + " instead of " + std::to_string(row_stride) + ", " +
           std::to_string(column_stride);
  }
  return "";
}

void cut(Tensor& tensor, std::int64_t rows) {
  if (tensor.given() && rows <= tensor.shape[0]) tensor.shape[0] = rows;
}

// Behind the last arrival there are no ids.
std::string compare_unused(const DispatchOutput& got, std::int64_t arrivals) {
  if (!got.topk_idx.given()) return "";
  const bool wide = got.handle->topk_idx_64;
  for (std::int64_t at = arrivals * got.handle->num_topk; at < got.topk_idx.numel(); ++at) {
    const std::int64_t id = wide ? got.topk_idx.as<std::int64_t>()[at] : got.topk_idx.as<std::int32_t>()[at];
    if (id != -1) return "topk_idx beyond the arrivals is not -1 at entry " + std::to_string(at);
  }
  return "";
}

}  // namespace

std::string Shape::to_string() const {
  std::ostringstream text;
  text << name(backend_under_test()) << " ranks " << ranks << " nodes{";
  for (const int n : ranks_per_node) text << n << ' ';
  text << "} " << network << " " << name(dtype) << " hidden " << hidden << " topk " << topk << " experts " << experts
       << " tokens " << tokens << (uneven_tokens ? " uneven" : "") << " missing " << percent_missing
       << (duplicates ? " duplicates" : "") << " homes " << homes_name(homes)
       << (policy == Placement::Policy::kLocalFirst ? " local_first" : "") << " " << layout_name(layout)
       << " alignment " << alignment << (weights ? " weights" : "") << (idx64 ? " i64" : " i32")
       << (mask_weights ? "" : " unmasked");
  if (fp8) text << " fp8" << (fp8->round_scale ? "/round" : "") << (fp8->ue8m0 ? "/ue8m0" : "");
  if (scale_order == ScaleOrder::kColumnMajor) text << " column_major";
  if (caller_scales > 0) text << " caller_scales " << caller_scales << (caller_scales_strided ? " strided" : "");
  text << " side " << side.size() << (low_latency ? " low_latency" : "") << " seed " << seed;
  return text.str();
}

Array random_array(Random& random, DType dtype, std::vector<std::int64_t> shape) {
  Array a(dtype, std::move(shape));
  const std::size_t item = item_bytes(dtype);
  for (std::size_t at = 0; at < a.bytes.size(); at += item) {
    const std::uint64_t bits = random_bits(random, dtype);
    std::memcpy(a.bytes.data() + at, &bits, item);
  }
  return a;
}

// Where the environment asks for it, worlds of any test are of two nodes that share no memory.
Shape World::over_network(Shape shape) {
  const char* network = std::getenv("EP_TEST_NETWORK");
  if (network == nullptr || shape.ranks == 1 || !shape.network.empty()) return shape;
  shape.network = network;
  if (shape.ranks_per_node.empty()) shape.ranks_per_node = {(shape.ranks + 1) / 2};
  return shape;
}

World::World(const Shape& wanted) : shape(over_network(wanted)) {
  const Shape& s = shape;
  Random random(s.seed);
  exchange.num_ranks = s.ranks;
  exchange.node_of = nodes(s);
  exchange.hosted = hosting(s, random);
  exchange.num_experts = s.experts;
  exchange.policy = s.policy;
  exchange.layout = s.layout;
  exchange.alignment = s.alignment;
  exchange.max_tokens = max_tokens();
  exchange.num_topk = s.topk;
  exchange.mask_topk_weights = s.mask_weights;
  exchange.fp8 = s.fp8;
  if (s.homes != Homes::kEven) placement = Placement::from_lists(exchange.hosted, s.experts, s.policy);

  const std::int64_t full = random.below(s.ranks);
  for (int rank = 0; rank < s.ranks; ++rank) {
    const std::int64_t tokens = s.uneven_tokens && rank != full ? random.between(0, s.tokens) : s.tokens;
    oracle::DispatchRank in;
    in.x = random_array(random, s.dtype, {tokens, s.hidden});
    if (s.fp8) spread_magnitudes(in.x, random);
    if (s.caller_scales > 0) in.scales = random_array(random, s.caller_scale_dtype, {tokens, s.caller_scales});
    in.topk_idx = random_ids(s, random, tokens);
    if (s.weights) in.topk_weights = random_array(random, DType::kFp32, {tokens, s.topk});
    for (const auto& [dtype, n] : s.side) in.side.push_back(random_array(random, dtype, {tokens, n}));
    strided_scales.push_back(in.scales.given() && s.caller_scales_strided ? column_major(in.scales) : Array());
    ranks.push_back(std::move(in));
  }
  expect_again();
}

void World::expect_again() { expected = oracle::dispatch(exchange, ranks); }

World World::without(std::vector<bool> masked) const {
  World world = *this;
  world.exchange.masked = std::move(masked);
  world.expect_again();
  return world;
}

World World::finding_silent(std::vector<bool> silent) const {
  World world = without(std::move(silent));
  for (std::size_t rank = 0; rank < expected.size(); ++rank) world.expected[rank].dst_rank = expected[rank].dst_rank;
  return world;
}

Config World::config() const {
  Config config = small_config();
  config.ranks_per_node = shape.ranks_per_node;
  config.network.provider = shape.network;
  if (shape.slot_bytes > 0) config.forward_slot_bytes = shape.slot_bytes;
  std::size_t copies = 0;
  for (const auto& list : exchange.hosted) copies += list.size();
  config.max_experts = static_cast<int>(copies);
  if (shape.low_latency) {
    config.low_latency.max_tokens_per_rank = max_tokens();
    config.low_latency.row_bytes = static_cast<std::size_t>(shape.hidden) * 4;
    config.low_latency.num_topk = shape.topk;
    std::size_t side = static_cast<std::size_t>(shape.caller_scales) * 4;
    if (shape.fp8) side += static_cast<std::size_t>((shape.hidden + 127) / 128) * 4;
    for (const auto& [dtype, n] : shape.side) side += item_bytes(dtype) * static_cast<std::size_t>(n);
    config.low_latency.side_bytes = side;
  }
  return config;
}

DispatchInput World::input(int rank) const {
  const oracle::DispatchRank& mine = ranks[rank];
  DispatchInput in;
  in.x = mine.x.view();
  in.scales = mine.scales.view();
  if (strided_scales[rank].given()) {
    in.scales.data = strided_scales[rank].view().data;
    in.scales.strides[0] = 1;
    in.scales.strides[1] = mine.scales.shape[0];
  }
  in.topk_idx = mine.topk_idx.view();
  in.topk_weights = mine.topk_weights.view();
  for (const Array& side : mine.side) in.side.push_back(side.view());
  in.num_experts = shape.experts;
  in.placement = placement;
  in.layout = shape.layout;
  in.expert_alignment = shape.alignment;
  if (shape.low_latency || shape.layout == OutputLayout::kPadded) in.max_tokens_per_rank = max_tokens();
  in.fp8 = shape.fp8;
  in.scale_order = shape.scale_order;
  in.mask_topk_weights = shape.mask_weights;
  return in;
}

std::string difference(const char* what, const TensorView& got, const Array& expected) {
  return compare(what, to_host(got), expected);
}

DispatchOutput what_came(const DispatchOutput& output) {
  DispatchOutput got = to_host(output);
  if (!got.handle || !has_room_to_spare(*got.handle)) return got;
  Handle h = *got.handle;
  h.num_arrivals = arrivals_that_came(h);
  if (h.layout != OutputLayout::kPadded) h.num_rows = rows_that_came(h);
  for (Tensor* tensor : {&h.src_token, &h.arrival_row, &h.arrival_weights}) cut(*tensor, h.num_arrivals);
  for (Tensor* tensor : {&got.x, &got.scales, &got.topk_weights})
    if (h.layout != OutputLayout::kPadded) cut(*tensor, h.num_rows);
  cut(got.topk_idx, h.num_arrivals);
  for (Tensor& side : got.side) cut(side, h.num_arrivals);
  got.handle = std::make_shared<const Handle>(std::move(h));
  return got;
}

std::string difference(const World& world, int rank, const DispatchOutput& output, bool cached) {
  const DispatchOutput whole = to_host(output), got = what_came(whole);
  const oracle::Dispatched& e = world.expected[rank];
  const std::vector<bool>* written = world.shape.layout == OutputLayout::kPadded ? &e.row_written : nullptr;
  if (!got.handle) return "there is no handle";
  if (got.side.size() != e.side.size()) return "there are " + std::to_string(got.side.size()) + " side tensors";
  std::string side;
  for (std::size_t i = 0; i < e.side.size() && side.empty(); ++i) side = compare("side", got.side[i], e.side[i]);
  return first_of({compare_handle(world, rank, *got.handle, false), compare("x", got.x, e.x, written),
                   compare("scales", got.scales, e.scales, written), compare_scale_strides(world, whole.scales),
                   compare_unused(whole, e.num_arrivals),
                   compare("topk_idx", got.topk_idx, cached ? Array() : e.topk_idx),
                   compare("topk_weights", got.topk_weights, e.topk_weights,
                           world.shape.layout == OutputLayout::kPadded ? written : nullptr),
                   side});
}

std::string difference_bounded(const World& world, int rank, const DispatchOutput& output, std::int64_t max_rows) {
  const DispatchOutput got = to_host(output);
  const oracle::Dispatched& e = world.expected[rank];
  if (!got.handle) return "there is no handle";
  const std::int64_t arrivals = got.handle->num_arrivals;
  if (got.handle->num_rows != max_rows) return "handle.num_rows is " + std::to_string(got.handle->num_rows);
  if (arrivals < e.num_arrivals) return "handle.num_arrivals is " + std::to_string(arrivals);
  std::string message = compare_handle(world, rank, *got.handle, true);
  const auto check = [&](const char* what, const TensorView& view, const Array& expected, std::int64_t first_dim) {
    if (!message.empty()) return;
    if (!same_shape(view, expected, first_dim)) {
      message = std::string(what) + " is " + shape_text(view);
    } else if (expected.given()) {
      message = compare_rows(what, view, expected, expected.shape[0]);
    }
  };
  const bool by_rank = world.shape.layout == OutputLayout::kByRank;
  check("x", got.x, e.x, max_rows);
  check("scales", got.scales, e.scales, max_rows);
  check("topk_idx", got.topk_idx, e.topk_idx, arrivals);
  check("topk_weights", got.topk_weights, e.topk_weights, by_rank ? arrivals : max_rows);
  for (std::size_t i = 0; i < e.side.size(); ++i) check("side", got.side[i], e.side[i], arrivals);
  if (message.empty()) message = compare_unused(got, e.num_arrivals);
  return message;
}

Homeward homeward(const World& world, const HomewardShape& shape) {
  Homeward result;
  Random random(world.shape.seed * 31 + shape.seed);
  for (int rank = 0; rank < world.shape.ranks; ++rank) {
    const oracle::Dispatched& e = world.expected[rank];
    oracle::CombineRank in;
    std::vector<std::int64_t> rows = e.x.shape;
    rows.back() = shape.hidden;
    if (shape.rows) in.x = random_array(random, shape.dtype, rows);
    if (shape.odd_rows) strew_odd_values(in.x, random);
    if (shape.weights) in.weights = random_array(random, DType::kFp32, {e.num_tokens, world.shape.topk});
    if (shape.topk_weights) {
      rows.pop_back();
      if (world.shape.layout == OutputLayout::kByRank) rows = {e.num_arrivals, world.shape.topk};
      in.topk_weights = random_array(random, DType::kFp32, rows);
    }
    for (int b = 0; b < shape.biases; ++b) in.bias[b] = random_array(random, shape.dtype, {e.num_tokens, shape.hidden});
    in.wire = shape.wire;
    result.out.emplace_back(shape.dtype, std::vector<std::int64_t>{e.num_tokens, shape.hidden});
    result.ranks.push_back(std::move(in));
  }
  return result;
}

CombineInput combine_input(const Homeward& homeward, int rank, std::shared_ptr<const Handle> handle,
                           const SumOrder& order) {
  const oracle::CombineRank& mine = homeward.ranks[rank];
  CombineInput in;
  in.x = mine.x.view();
  in.handle = std::move(handle);
  in.topk_weights = mine.topk_weights.view();
  in.weights = mine.weights.view();
  in.bias = {mine.bias[0].view(), mine.bias[1].view()};
  in.order = order;
  in.wire = mine.wire;
  return in;
}

std::string difference(const oracle::Combined& expected, const CombineOutput& output) {
  const CombineOutput got = to_host(output);
  return first_of({compare("combined x", got.x, expected.x),
                   compare("combined topk_weights", got.topk_weights, expected.topk_weights)});
}

std::vector<SumOrder> all_orders() {
  std::vector<SumOrder> orders;
  for (const auto key : {SumOrder::Key::kRank, SumOrder::Key::kTopK}) {
    for (int bits = 0; bits < 8; ++bits) orders.push_back({key, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0});
  }
  return orders;
}

std::string to_string(const SumOrder& order) {
  return std::string(order.key == SumOrder::Key::kRank ? "by rank" : "by topk") +
         (order.round_per_rank ? ", rounded per rank" : "") + (order.round_per_node ? ", rounded per node" : "") +
         (order.bias_first ? ", bias first" : ", bias last");
}

}  // namespace deep_ep::test
