// SPDX-License-Identifier: MIT
#include "host/straight_rows.h"

namespace deep_ep::host {

bool StraightRows::known() {
  // Acquire: pairs with the release below, so that the slots are there with the state.
  if (const int state = state_.load(std::memory_order_acquire); state != kOpen) return state == kKnown;
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return false;
  for (const int n = context_.num_ranks; looked_at_ < n * n; ++looked_at_)
    if (!context_.has_announced(looked_at_ / n, epoch_, looked_at_ % n)) return false;
  settle();
  return state_.load(std::memory_order_relaxed) == kKnown;
}

void StraightRows::settle() {
  slots_.resize(static_cast<std::size_t>(context_.num_ranks) * call_.placement->max_slots());
  bool all = true;
  for (int rank = 0; rank < context_.num_ranks && all; ++rank) all = place_rows(rank);
  // Release: see known().
  state_.store(all ? kKnown : kNever, std::memory_order_release);
}

// As plan::make_row_plan() has it for kPadded. False: that rank offers no room, or will find an error.
bool StraightRows::place_rows(int rank) {
  const Announcement& theirs = context_.announcement(context_.rank, epoch_.number, rank);
  if (theirs.x_at == 0 || theirs.signature.fields != call_.signature.fields) return false;
  const std::int64_t room = std::int64_t{context_.num_ranks} * call_.max_tokens_per_rank;
  for (int slot = 0; slot < call_.placement->num_slots(rank); ++slot) {
    std::int64_t before = 0, all = 0;
    for (int src = 0; src < context_.num_ranks; ++src) {
      const std::int32_t rows = context_.announced_rows(rank, epoch_.number, src)[slot];
      if (src < context_.rank) before += rows;
      all += rows;
    }
    if (all > room) return false;
    const std::int64_t first = slot * room + before;
    slots_[static_cast<std::size_t>(rank) * call_.placement->max_slots() + slot] =
        context_.window(rank) + theirs.x_at + first * static_cast<std::int64_t>(call_.shape.row_bytes);
  }
  return true;
}

}  // namespace deep_ep::host
