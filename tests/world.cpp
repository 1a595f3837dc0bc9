// SPDX-License-Identifier: MIT
// Worlds from a seed.
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
