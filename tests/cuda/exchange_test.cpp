// SPDX-License-Identifier: MIT
// Whole exchanges on one GPU, every byte compared with the host backend's on the same inputs.
#include <atomic>

#include "gpu.h"

namespace deep_ep::test {
namespace {

struct Case {
  int ranks = 2;
  int tokens = 40;
  std::int64_t hidden = 256;
  int topk = 4;
  int experts = 16;
  DType dtype = DType::kBf16;
  OutputLayout layout = OutputLayout::kByRank;
  int alignment = 1;
  bool idx64 = true;
  bool weights = true;
  bool fp8 = false, round_scale = false, ue8m0 = false;
  bool column_major = false;
  int caller_scales = 0;
  int side = 0;
  bool replicas = false;
  bool mask_weights = true;
  int max_rows = 0;
  int sms = 0;
  bool specials = false;  // NaN and infinities among the values
  std::vector<int> nodes = {};
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.ranks << " ranks, " << c.tokens << " tokens of " << c.hidden << " " << name(c.dtype) << ", top-"
             << c.topk << " of " << c.experts << ", layout " << static_cast<int>(c.layout) << ", fp8 " << c.fp8
             << c.round_scale << c.ue8m0 << ", column-major " << c.column_major << ", max_rows " << c.max_rows;
}

// One rank's inputs in ordinary memory.
struct Inputs {
  Tensor x, scales, idx, weights, side, home_weights, bias;
};

Tensor random_bytes(std::mt19937& random, DType dtype, std::initializer_list<std::int64_t> shape) {
  Tensor tensor = Tensor::allocate(dtype, shape);
  for (std::size_t i = 0; i < tensor.bytes(); ++i) tensor.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(random());
  return tensor;
}

std::uint16_t half_bits(float x) {  // of a small positive normal number
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (((bits >> 13) - (112 << 10)) & 0x7fff));
}

Tensor random_numbers(std::mt19937& random, DType dtype, std::initializer_list<std::int64_t> shape,
                      bool specials = false) {
  Tensor tensor = Tensor::allocate(dtype, shape);
  if (dtype == DType::kU8 || dtype == DType::kFp8E4m3) return random_bytes(random, dtype, shape);
  std::uniform_real_distribution<float> range(-3, 3);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    float x = range(random);
    if (std::abs(x) < 0.01f) x = 0.5f;
    if (random() % 64 == 0) x *= 1000;
    const unsigned special = specials ? random() % 997 : 999;
    if (dtype == DType::kFp32) {
      tensor.as<float>()[i] = special == 0 ? NAN : special == 1 ? -INFINITY : special == 2 ? -0.0f : x;
    } else if (dtype == DType::kBf16) {
      std::uint32_t bits;
      std::memcpy(&bits, &x, 4);
      tensor.as<std::uint16_t>()[i] = special == 0   ? 0xffc1
                                      : special == 1 ? 0xff80
                                      : special == 2 ? 0x8000
                                                     : bits >> 16;
    } else {
      tensor.as<std::uint16_t>()[i] = special == 0 ? 0xfe01 : special == 1 ? 0x7c00 : special == 2 ? 3 : half_bits(x);
    }
  }
  return tensor;
}

Inputs inputs_of(const Case& c, int rank) {
  std::mt19937 random(static_cast<unsigned>(rank * 7919 + c.hidden + c.topk * 31));
  const int tokens = rank == 1 && c.tokens > 3 ? c.tokens - 3 : c.tokens;
  Inputs in;
  in.x = random_numbers(random, c.dtype, {tokens, c.hidden}, c.specials);
  in.idx = Tensor::allocate(c.idx64 ? DType::kI64 : DType::kI32, {tokens, c.topk});
  for (std::int64_t i = 0; i < in.idx.numel(); ++i) {
    const int id = random() % 8 == 0 ? -1 : static_cast<int>(random() % c.experts);
    if (c.idx64) {
      in.idx.as<std::int64_t>()[i] = id;
    } else {
      in.idx.as<std::int32_t>()[i] = id;
    }
  }
  if (c.weights) in.weights = random_numbers(random, DType::kFp32, {tokens, c.topk});
  if (c.caller_scales > 0) in.scales = random_bytes(random, DType::kI32, {tokens, c.caller_scales});
  if (c.side > 0) in.side = random_bytes(random, DType::kI32, {tokens, c.side});
  in.home_weights = random_numbers(random, DType::kFp32, {tokens, c.topk});
  in.bias = random_numbers(random, c.dtype, {tokens, c.hidden});
  return in;
}

std::shared_ptr<const Placement> placement_of(const Case& c) {
  std::vector<std::vector<int>> hosted(c.ranks);
  for (int expert = 0; expert < c.experts; ++expert) {
    hosted[expert % c.ranks].push_back(expert);
    if (expert % 3 == 0 && c.ranks > 1) hosted[(expert + 1) % c.ranks].push_back(expert);
  }
  return Placement::from_lists(hosted, c.experts, Placement::Policy::kLocalFirst);
}

// What is compared, by name; rows of kPadded that nothing came for are not.
using Result = std::vector<std::pair<std::string, std::vector<std::byte>>>;

void keep(Result& result, const std::string& name, const TensorView& tensor) {
  if (!tensor.given()) return;
  auto bytes = bytes_of(tensor);
  // A NaN of arithmetic is a NaN; its bits are the machine's choice where rows are FP32.
  for (std::size_t i = 0; tensor.dtype == DType::kFp32 && i < bytes.size() / 4; ++i) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    if (value != value) std::memset(bytes.data() + 4 * i, 0xff, 4);
  }
  result.emplace_back(name, std::move(bytes));
}

// Zeroes rows that hold nothing, in a copy: undefined on both sides.
void keep_rows(Result& result, const std::string& name, const TensorView& tensor, const Handle& handle,
               std::int64_t valid) {
  if (!tensor.given()) return;
  std::vector<std::byte> bytes = bytes_of(tensor);
  if (handle.layout == OutputLayout::kPadded) {
    const auto counts = bytes_of(handle.slot_rows);
    const std::int64_t rows = tensor.shape[1], slots = tensor.shape[0];
    const std::int64_t words = slots * rows > 0 ? static_cast<std::int64_t>(bytes.size()) / (slots * rows) : 0;
    for (std::int64_t s = 0; s < slots; ++s)
      for (std::int64_t r = reinterpret_cast<const std::int32_t*>(counts.data())[s]; r < rows; ++r) {
        if (tensor.ndim == 3 && tensor.strides[2] != 1) {
          for (std::int64_t j = 0; j < tensor.shape[2]; ++j)
            std::memset(bytes.data() + 4 * (s * tensor.strides[0] + r * tensor.strides[1] + j * tensor.strides[2]), 0,
                        4);
        } else {
          std::memset(bytes.data() + (s * rows + r) * words, 0, words);
        }
      }
  } else if (tensor.ndim == 2 && tensor.strides[1] != 1 && tensor.shape[1] > 1) {
    std::vector<std::byte> dense;  // column-major: only what the view shows, the alignment's gap is nobody's
    std::vector<std::byte> all(4 * static_cast<std::size_t>(tensor.strides[1] * tensor.shape[1]));
    if (!all.empty()) gpu(cudaMemcpy(all.data(), tensor.data, all.size(), cudaMemcpyDefault));
    for (std::int64_t i = 0; i < valid; ++i)
      for (std::int64_t j = 0; j < tensor.shape[1]; ++j) {
        const std::byte* at = all.data() + 4 * (i * tensor.strides[0] + j * tensor.strides[1]);
        dense.insert(dense.end(), at, at + 4);
      }
    bytes = dense;
  } else if (tensor.shape[0] > 0) {
    bytes.resize(bytes.size() / tensor.shape[0] * valid);
  }
  result.emplace_back(name, std::move(bytes));
}

Result run_case(const Case& c, Buffer& buffer, const Inputs& in, bool device) {
  Result result;
  const auto there = [&](const Tensor& tensor) { return device ? to_gpu(tensor) : tensor; };
  const Tensor x = there(in.x), idx = there(in.idx), weights = there(in.weights), scales = there(in.scales),
               side = there(in.side), home = there(in.home_weights), bias = there(in.bias);
  DispatchInput input;
  input.x = x;
  input.topk_idx = idx;
  input.topk_weights = weights;
  input.scales = scales;
  if (c.side > 0) input.side = {side};
  input.num_experts = c.experts;
  if (c.replicas) input.placement = placement_of(c);
  input.layout = c.layout;
  input.expert_alignment = c.alignment;
  input.max_tokens_per_rank = c.layout == OutputLayout::kPadded ? std::max(c.tokens, 1) : 0;
  if (c.fp8) input.fp8 = Fp8Options{c.round_scale, c.ue8m0};
  if (c.column_major) input.scale_order = ScaleOrder::kColumnMajor;
  input.mask_topk_weights = c.mask_weights;
  input.max_rows = c.max_rows;
  DispatchOutput out = buffer.dispatch(input);
  const Handle& h = *out.handle;
  const auto first_arrival = bytes_of(h.first_arrival), first_row = bytes_of(h.slot_first_row);
  const std::int64_t arrivals = reinterpret_cast<const std::int32_t*>(first_arrival.data())[c.ranks];
  const auto slots = h.slot_first_row.shape[0] - 1;
  const std::int64_t rows =
      c.layout == OutputLayout::kByRank ? arrivals : reinterpret_cast<const std::int32_t*>(first_row.data())[slots];
  const auto keep_output = [&](const std::string& call, const DispatchOutput& o) {
    keep_rows(result, call + " x", o.x, h, rows);
    keep_rows(result, call + " scales", o.scales, h, rows);
    if (o.topk_idx.given()) keep(result, call + " topk_idx", o.topk_idx);
    keep_rows(result, call + " topk_weights", o.topk_weights, h, rows);
    for (const Tensor& t : o.side)
      result.emplace_back(call + " side", bytes_of(TensorView(t.data, t.dtype, {arrivals, t.shape[1]})));
  };
  keep_output("dispatch", out);
  keep(result, "dst_rank", h.dst_rank);
  keep(result, "dst_row", h.dst_row);
  keep(result, "dst_arrival", h.dst_arrival);
  keep(result, "first_arrival", h.first_arrival);
  keep(result, "slot_rows", h.slot_rows);
  keep(result, "slot_first_row", h.slot_first_row);
  keep(result, "tokens_between", h.tokens_between);
  result.emplace_back("src_token", bytes_of(TensorView(h.src_token.data, DType::kI32, {arrivals})));
  if (h.arrival_row.given())
    result.emplace_back("arrival_row", bytes_of(TensorView(h.arrival_row.data, DType::kI32, {arrivals, c.topk})));

  DispatchInput again;
  again.x = x;
  again.scales = scales;
  again.topk_weights = weights;
  again.handle = out.handle;
  again.fp8 = input.fp8;
  keep_output("cached dispatch", buffer.dispatch(again));

  if (c.dtype != DType::kBf16 && c.dtype != DType::kFp16 && c.dtype != DType::kFp32) return result;
  // Back: rows of our own, the same on both backends.
  DispatchInput plain;
  plain.x = x;
  plain.handle = out.handle;
  DispatchOutput sent = buffer.dispatch(plain);
  for (const SumOrder& order : {SumOrder::by_rank(), SumOrder::by_rank_and_node(), SumOrder::by_topk(),
                                SumOrder{SumOrder::Key::kRank, true, true, false}}) {
    CombineInput combine;
    combine.x = sent.x;
    combine.handle = out.handle;
    combine.order = order;
    if (c.layout != OutputLayout::kByRank) combine.weights = home;
    combine.bias[0] = bias;
    if (c.weights) combine.topk_weights = out.topk_weights;
    CombineOutput back = buffer.combine(combine);
    keep(result, "combine", back.x);
    keep(result, "combine weights", back.topk_weights);
    combine.weights_home = WeightsHome::kFromOwner;
    combine.bias[0] = {};
    back = buffer.combine(combine);
    keep(result, "combine without bias", back.x);
    keep(result, "combine weights of the owner", back.topk_weights);
  }
  return result;
}

void expect_same_as_host(const Case& c) {
  std::ostringstream text;
  text << c;
  SCOPED_TRACE(text.str());
  std::vector<Result> host(c.ranks), device(c.ranks);
  Config config = small_config();
  config.max_experts = 4096;
  config.ranks_per_node = c.nodes;
  Options one_worker;
  one_worker.num_workers = 1;
  run_ranks(c.ranks, config, one_worker,
            [&](Buffer& b) { host[b.rank()] = run_case(c, b, inputs_of(c, b.rank()), false); });
  run_ranks(c.ranks, config, on_gpu(c.sms),
            [&](Buffer& b) { device[b.rank()] = run_case(c, b, inputs_of(c, b.rank()), true); });
  for (int rank = 0; rank < c.ranks; ++rank) {
    ASSERT_EQ(host[rank].size(), device[rank].size());
    for (std::size_t i = 0; i < host[rank].size(); ++i) {
      const auto& [what, expected] = host[rank][i];
      const auto& seen = device[rank][i].second;
      ASSERT_EQ(expected.size(), seen.size()) << what << " of rank " << rank;
      if (expected == seen) continue;
      std::size_t at = 0;
      while (expected[at] == seen[at]) ++at;
      ADD_FAILURE() << what << " of rank " << rank << " differs first at byte " << at << " of " << expected.size()
                    << ": " << static_cast<int>(expected[at]) << " on the host, " << static_cast<int>(seen[at])
                    << " on the GPU";
      break;
    }
  }
}

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

TEST(CudaExchange, is_the_hosts_for_every_layout_and_number_of_ranks) {
  EP_NEEDS_GPU();
  for (int ranks : {1, 2, 4, 8})
    for (OutputLayout layout : kLayouts) expect_same_as_host({.ranks = ranks, .layout = layout, .alignment = 4});
}

TEST(CudaExchange, is_the_hosts_for_every_kind_of_row) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32, DType::kU8, DType::kFp8E4m3})
    for (OutputLayout layout : kLayouts)
      expect_same_as_host({.dtype = dtype, .layout = layout, .idx64 = false, .caller_scales = 3, .side = 5});
}

TEST(CudaExchange, quantises_as_the_host_does) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32})
    for (OutputLayout layout : kLayouts)
      for (int kind = 0; kind < 3; ++kind)
        for (bool column_major : {false, true})
          expect_same_as_host({.hidden = 2064,
                               .dtype = dtype,
                               .layout = layout,
                               .fp8 = true,
                               .round_scale = kind > 0,
                               .ue8m0 = kind > 1,
                               .column_major = column_major,
                               .specials = true});
}

TEST(CudaExchange, serves_rows_of_any_width) {
  EP_NEEDS_GPU();
  for (std::int64_t hidden : {8, 16, 136, 1000, 4096, 7168, 16400, 40000}) {
    expect_same_as_host({.tokens = 20, .hidden = hidden});
    if (hidden % 16 == 0)
      expect_same_as_host({.tokens = 20, .hidden = hidden, .layout = OutputLayout::kByExpert, .fp8 = true});
  }
}

TEST(CudaExchange, serves_many_selections_and_many_experts) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts) {
    expect_same_as_host({.tokens = 30, .topk = 1, .layout = layout});
    expect_same_as_host({.ranks = 4, .tokens = 30, .hidden = 64, .topk = 32, .experts = 64, .layout = layout});
    expect_same_as_host({.ranks = 2, .tokens = 10, .hidden = 64, .topk = 70, .experts = 400, .layout = layout});
  }
  expect_same_as_host(
      {.ranks = 4, .tokens = 300, .hidden = 64, .topk = 8, .experts = 4096, .layout = OutputLayout::kByExpert});
}

TEST(CudaExchange, follows_placements_and_nodes) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts)
    expect_same_as_host({.ranks = 4, .layout = layout, .replicas = true, .mask_weights = false, .nodes = {2}});
}

TEST(CudaExchange, serves_no_tokens_and_bounded_outputs_on_any_number_of_sms) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts) expect_same_as_host({.tokens = 0, .layout = layout});
  for (int sms : {1, 3, 16}) {
    expect_same_as_host({.tokens = 700, .max_rows = 2000, .sms = sms});
    expect_same_as_host(
        {.tokens = 700, .layout = OutputLayout::kByExpert, .alignment = 8, .max_rows = 8000, .sms = sms});
  }
}

}  // namespace
}  // namespace deep_ep::test
