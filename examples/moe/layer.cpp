// SPDX-License-Identifier: MIT
// Dispatch, experts, combine through deep_ep::Buffer.
#include "layer.h"

#include <array>
#include <chrono>

#include "model.h"

namespace moe {
namespace {

constexpr std::int64_t kChannelsPerScale = 128;

deep_ep::Config config_for(const Settings& settings) {
  // At worst every token of every rank chooses only experts of one rank.
  const std::int64_t tokens = static_cast<std::int64_t>(settings.ranks) * settings.tokens;
  deep_ep::ExchangeShape worst;
  worst.rows = tokens * settings.topk + static_cast<std::int64_t>(settings.experts) * kRowsAtOnce;
  worst.tokens = tokens;
  worst.row_bytes = settings.hidden * sizeof(Bf16);
  worst.num_scales = settings.hidden / static_cast<int>(kChannelsPerScale);
  worst.num_topk = settings.topk;

  deep_ep::Config config;
  config.max_experts = settings.experts;
  config.ranks_per_node = {settings.ranks_per_node};
  // Room for two results of dispatch in BF16, one in FP8 and the experts' rows. Pages that are never used cost nothing.
  config.arena_bytes = 4 * deep_ep::arena_bytes_for(worst);
  config.timeout = std::chrono::seconds(settings.timeout_s);
  return config;
}

const std::array<float, 256>& e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values{};
    for (int code = 0; code < 256; ++code) values[code] = e4m3_value(static_cast<std::uint8_t>(code));
    return values;
  }();
  return table;
}

}  // namespace

Layer::Layer(const Settings& settings, const std::shared_ptr<deep_ep::Bootstrap>& group)
    : settings_(settings), placement_(deep_ep::Placement::even(settings.experts, group->num_ranks())) {
  deep_ep::Options options;
  options.num_workers = settings.workers;
  buffer_ = deep_ep::Buffer::open(group, config_for(settings), options);
  for (int slot = 0; slot < placement_->num_slots(group->rank()); ++slot) {
    experts_.push_back(make_expert(settings, placement_->expert_at(group->rank(), slot)));
  }
}

deep_ep::DispatchOutput Layer::dispatch(const std::vector<Bf16>& x, const Routing& routing, bool fp8) {
  const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / settings_.hidden;
  deep_ep::DispatchInput input;
  input.x = {x.data(), deep_ep::DType::kBf16, {tokens, settings_.hidden}};
  input.topk_idx = {routing.experts.data(), deep_ep::DType::kI64, {tokens, settings_.topk}};
  input.num_experts = settings_.experts;
  input.placement = placement_;
  input.layout = deep_ep::OutputLayout::kByExpert;
  input.expert_alignment = kRowsAtOnce;
  if (fp8) input.fp8 = deep_ep::Fp8Options{};
  return buffer_->dispatch(input);
}

deep_ep::Tensor Layer::run_experts(const deep_ep::DispatchOutput& received) {
  deep_ep::Tensor rows = buffer_->allocate(deep_ep::DType::kBf16, {received.x.size(0), settings_.hidden});
  const auto* first_row = received.handle->slot_first_row.as<std::int32_t>();
  for (std::size_t slot = 0; slot < experts_.size(); ++slot) {
    const std::int64_t first = first_row[slot];
    const std::int64_t last = first_row[slot + 1];
    const std::vector<float> input = widen_rows(received, first, last);
    run_expert(experts_[slot], input.data(), last - first, rows.as<Bf16>() + first * settings_.hidden);
  }
  return rows;
}

deep_ep::Tensor Layer::combine(const deep_ep::Tensor& rows, const deep_ep::DispatchOutput& received,
                               const Routing& routing) {
  deep_ep::CombineInput input;
  input.x = rows;
  input.handle = received.handle;
  input.weights = {routing.weights.data(), deep_ep::DType::kFp32, {received.handle->num_tokens, settings_.topk}};
  input.order = deep_ep::SumOrder::by_topk();
  return buffer_->combine(input).x;
}

std::vector<float> widen_rows(const deep_ep::DispatchOutput& received, std::int64_t first, std::int64_t last) {
  const std::int64_t hidden = received.x.size(1);
  std::vector<float> rows((last - first) * hidden);
  const std::size_t begin = static_cast<std::size_t>(first * hidden);
  if (received.x.dtype == deep_ep::DType::kBf16) {
    const Bf16* values = received.x.as<Bf16>() + begin;
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = widen(values[i]);
    return rows;
  }
  const std::uint8_t* codes = received.x.as<std::uint8_t>() + begin;
  const float* scales = received.scales.as<float>() + begin / kChannelsPerScale;  // [rows, hidden / 128]
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = e4m3_table()[codes[i]] * scales[i / kChannelsPerScale];
  return rows;
}

}  // namespace moe
