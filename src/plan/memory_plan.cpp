// SPDX-License-Identifier: MIT
// The public face of the layouts: how much memory, and why.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "check.h"
#include "deep_ep/config.h"
#include "plan/forwarding.h"
#include "plan/output.h"
#include "plan/window.h"

namespace deep_ep {

namespace {

std::string human(std::size_t bytes) {
  if (bytes < 10240) return fmt::format("{} B", bytes);
  if (bytes < 10240ull << 10) return fmt::format("{:.1f} KiB", static_cast<double>(bytes) / 1024);
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

plan::RowShape shape_of(const ExchangeShape& shape) {
  plan::RowShape row;
  row.row_bytes = shape.row_bytes;
  row.num_scales = shape.num_scales;
  row.num_topk = shape.num_topk;
  row.topk_idx_bytes = shape.topk_idx_64 ? 8 : 4;
  row.topk_weights = shape.topk_weights;
  row.num_side = shape.side_bytes > 0 ? 1 : 0;
  row.side_bytes[0] = shape.side_bytes;
  return row;
}

}  // namespace

std::string Config::to_string() const {
  return fmt::format(
      "max_experts = {}\nranks_per_node = [{}]\nlow_latency.max_tokens_per_rank = {}\nlow_latency.row_bytes = {}\n"
      "low_latency.num_topk = {}\nlow_latency.side_bytes = {}\narena_bytes = {}\nnum_tickets = {}\ntimeout = {} ms\n"
      "open_timeout = {} ms\nnetwork.provider = {}\nforward_slot_bytes = {}\n",
      max_experts, fmt::join(ranks_per_node, ", "), low_latency.max_tokens_per_rank, low_latency.row_bytes,
      low_latency.num_topk, low_latency.side_bytes, arena_bytes, num_tickets, timeout.count(), open_timeout.count(),
      network.provider, forward_slot_bytes);
}

MemoryPlan Config::plan(int num_ranks) const {
  require(num_ranks >= 1, "num_ranks must be at least 1: {}", num_ranks);
  const std::size_t arena = plan::arena_bytes_of(*this, num_ranks, plan::machine_bytes());
  const auto w = plan::WindowLayout::place(*this, num_ranks, arena);
  MemoryPlan result;
  const auto region = [&](const char* name, std::size_t begin, std::size_t end, std::string why) {
    result.regions.push_back({name, end - begin, std::move(why)});
    result.total_bytes += end - begin;
  };
  region("words", 0, w.announcements_at,
         fmt::format("doorbell, flags of {} operations x {} peers", plan::kOperationsInFlight, num_ranks));
  region("announcements", w.announcements_at, w.replies_at,
         fmt::format("counts of {} ranks and {} experts from each peer, per operation", num_ranks, max_experts));
  region("replies", w.replies_at, w.flags_at,
         fmt::format("first row of each of {} experts at each peer, per operation", max_experts));
  region("low-latency flags", w.flags_at, w.lines_at,
         "one for each part of a row that may arrive; touched on GPUs only");
  region("low-latency lines", w.lines_at, w.low_latency_at,
         fmt::format("{} tickets of what travels with its number; touched on GPUs only", w.num_tickets));
  region("low-latency slots", w.low_latency_at, w.arena_at,
         fmt::format("{} tickets x {} ranks x {} tokens", w.num_tickets, num_ranks, low_latency.max_tokens_per_rank));
  region("arena", w.arena_at, w.total_bytes,
         "outputs of dispatch, allocate() and staged combine input; pages as they are used");
  if (!network.provider.empty() && plan::Topology::from(ranks_per_node, num_ranks).num_nodes > 1)
    region("between nodes", 0, plan::FarMemory::of(w, forward_slot_bytes).total(),
           fmt::format("{} slots of {} to and from each rank, mirrors of windows; pages as they are used",
                       plan::kForwardSlots, human(forward_slot_bytes)));
  return result;
}

std::string MemoryPlan::to_string() const {
  std::string text;
  for (const MemoryRegion& region : regions)
    text += fmt::format("{:<18} {:>12}  {}\n", region.name, human(region.bytes), region.why);
  return text + fmt::format("{:<18} {:>12}  per rank\n", "total", human(total_bytes));
}

std::size_t arena_bytes_for(const ExchangeShape& shape) {
  const std::int64_t arrivals = shape.tokens > 0 ? shape.tokens : shape.rows;
  // A layout with arrival_row is the larger one; for few rows the difference is some bytes.
  const OutputLayout layout = arrivals < shape.rows ? OutputLayout::kByExpert : OutputLayout::kByRank;
  return plan::OutputBlock::place(shape_of(shape), layout, shape.rows, arrivals).total_bytes;
}

std::int64_t arena_rows(std::size_t arena_bytes, const ExchangeShape& shape) {
  std::int64_t fits = 0, too_many = 1;
  ExchangeShape probe = shape;
  probe.tokens = 0;
  const auto takes = [&](std::int64_t rows) {
    probe.rows = rows;
    return arena_bytes_for(probe);
  };
  while (takes(too_many) <= arena_bytes && too_many < std::int64_t{1} << 40) too_many *= 2;
  while (too_many - fits > 1) {
    const std::int64_t middle = fits + (too_many - fits) / 2;
    (takes(middle) <= arena_bytes ? fits : too_many) = middle;
  }
  return fits;
}

}  // namespace deep_ep
