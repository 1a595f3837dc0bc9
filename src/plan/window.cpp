// SPDX-License-Identifier: MIT
#include "plan/window.h"

#include <unistd.h>

#include <algorithm>

#include "check.h"
#include "plan/lines.h"
#include "plan/message.h"
#include "plan/topology.h"

namespace deep_ep::plan {

namespace {

constexpr std::size_t kMaxDefaultArena = std::size_t{16} << 30;

void check(const Config& config, int num_ranks) {
  Topology::from(config.ranks_per_node, num_ranks);
  require(config.max_experts >= 1, "max_experts must be at least 1: {}", config.max_experts);
  require(config.num_tickets >= 2 && config.num_tickets <= 64, "num_tickets must be 2 .. 64: {}", config.num_tickets);
  require(config.forward_slot_bytes >= 4096 && config.forward_slot_bytes <= std::size_t{1} << 30,
          "forward_slot_bytes must be 4 KiB .. 1 GiB: {}", config.forward_slot_bytes);
  require(config.timeout.count() > 0, "timeout must be positive: {} ms", config.timeout.count());
  require(config.open_timeout.count() > 0, "open_timeout must be positive: {} ms", config.open_timeout.count());
  const LowLatencyCapacity& low = config.low_latency;
  require(low.max_tokens_per_rank >= 0 && low.max_tokens_per_rank < 1 << 24,
          "low_latency.max_tokens_per_rank must be 0 .. 2^24 - 1: {}", low.max_tokens_per_rank);
  require(low.num_topk >= 0, "low_latency.num_topk must not be negative: {}", low.num_topk);
}

}  // namespace

WindowLayout WindowLayout::place(const Config& config, int num_ranks, std::size_t arena_bytes) {
  check(config, num_ranks);
  const std::size_t ranks = static_cast<std::size_t>(num_ranks);
  const std::size_t pairs = ranks * kOperationsInFlight;
  const std::size_t counts = sizeof(std::int32_t) * static_cast<std::size_t>(config.max_experts);
  WindowLayout w;
  w.num_ranks = num_ranks;
  w.num_tickets = config.num_tickets;
  w.max_slots = config.max_experts;
  w.announcement_bytes = align_up(kAnnouncementHead + sizeof(std::int32_t) * ranks + counts, kRegionAlignment);
  w.reply_bytes = align_up(kReplyHead + counts, kRegionAlignment);
  w.low_latency_ticket_bytes =
      config.low_latency.max_tokens_per_rank > 0 ? plan::low_latency_ticket_bytes(config.low_latency, num_ranks) : 0;
  w.flags_of_ticket =
      config.low_latency.max_tokens_per_rank > 0 ? align_up(low_latency_flags(config.low_latency, num_ranks), 32) : 0;
  w.line_bytes_of_ticket =
      config.low_latency.max_tokens_per_rank > 0 ? line_bytes(config.low_latency, num_ranks, config.max_experts) : 0;
  w.arena_bytes = align_up(arena_bytes, kPage);
  std::size_t end = 0;
  w.doorbell_at = take(end, 2 * kLine);
  w.released_at = take(end, kLine * ranks);
  w.excluded_at = take(end, kLine * ranks);
  w.words_at = take(end, kLine * pairs);
  w.announcements_at = take(end, w.announcement_bytes * pairs);
  w.replies_at = take(end, w.reply_bytes * pairs);
  w.flags_at = take(end, 4 * w.flags_of_ticket * config.num_tickets);
  w.lines_at = take(end, w.line_bytes_of_ticket * config.num_tickets);
  w.low_latency_at = take(end, w.low_latency_ticket_bytes * config.num_tickets, kPage);
  w.arena_at = take(end, w.arena_bytes, kPage);
  w.total_bytes = align_up(end, kPage);
  return w;
}

std::size_t machine_bytes() {
  return static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
}

std::size_t arena_bytes_of(const Config& config, int num_ranks, std::size_t machine) {
  if (config.arena_bytes > 0) return align_up(config.arena_bytes, WindowLayout::kPage);
  const std::size_t share = machine / static_cast<std::size_t>(std::max(8, num_ranks));
  return std::min(kMaxDefaultArena, share) / WindowLayout::kPage * WindowLayout::kPage;
}

}  // namespace deep_ep::plan
