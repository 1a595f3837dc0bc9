// SPDX-License-Identifier: MIT
// Low-latency dispatch where every rank is there already: a row need not lie at its source until its receivers place it
// but is written straight to its places, which follow from what all ranks announced. Nobody waits for that: a source
// that finds an announcement missing leaves its row in its own window.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "backend.h"
#include "host/context.h"

namespace deep_ep::host {

class StraightRows {
 public:
  /// `context`, `call` and `epoch` stay the caller's.
  StraightRows(const Context& context, const DispatchCall& call, const Epoch& epoch)
      : context_(context), call_(call), epoch_(epoch) {}

  /// Whether a rank may offer its output for it, before anything comes: rows have their places only where no rank is
  /// left out, now or later.
  static bool possible(const Context& context, const DispatchCall& call) {
    return call.layout == OutputLayout::kPadded && context.link() == nullptr && !call.in.mask_silent &&
           static_cast<int>(context.active_ranks().size()) == context.num_ranks;
  }

  /// Whether the places are known by now; from the first true on for good. For any thread.
  bool known();

  /// Where a row of ours lies, by its number among ours in that slot. Once places are known.
  std::byte* place(int rank, int slot, std::int32_t number) const {
    return slots_[static_cast<std::size_t>(rank) * call_.placement->max_slots() + slot] +
           number * static_cast<std::int64_t>(call_.shape.row_bytes);
  }

 private:
  void settle();
  bool place_rows(int rank);

  enum State : int { kOpen, kKnown, kNever };
  const Context& context_;
  const DispatchCall& call_;
  const Epoch& epoch_;
  std::atomic<int> state_{kOpen};
  std::mutex mutex_;               // guards what follows until the state says kKnown
  int looked_at_ = 0;              // pairs of ranks, each to each, of which the one has told the other
  std::vector<std::byte*> slots_;  // [num_ranks][max_slots]: where our first row lies
};

}  // namespace deep_ep::host
