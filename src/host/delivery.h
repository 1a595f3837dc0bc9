// SPDX-License-Identifier: MIT
// One token at its final rows: what its source does for ranks of its own node, and for a token from another node the
// rank that passes it on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.h"
#include "host/rows.h"
#include "plan/output.h"

namespace deep_ep::host {

/// Where one rank's output lies, seen from here; no block: not ours to write.
struct Destination {
  std::byte* block = nullptr;
  plan::OutputBlock at;
  std::uint32_t num_rows = 0, num_arrivals = 0;
};

/// A token as it travels, and where its receivers want it. Borrows everything.
struct TokenInTransit {
  std::int32_t token = 0;  // its number at its source
  const void* row = nullptr;
  const std::int32_t* scales = nullptr;
  std::int64_t scale_stride = 1;
  const float* weights = nullptr;  // [num_topk]
  std::array<const std::byte*, plan::kMaxSide> side{};
  // [num_topk] each; rank -1: no selection, or none that concerns us
  const std::int32_t* rank = nullptr;
  const std::int32_t* slot = nullptr;
  const std::int32_t* row_there = nullptr;
  const std::int32_t* arrival = nullptr;
};

class Delivery {
 public:
  Delivery(const DispatchCall& call, const std::vector<Destination>& destinations, const RowOps& ops)
      : call_(call),
        destinations_(destinations),
        ops_(ops),
        by_rank_(call.layout == OutputLayout::kByRank),
        cached_(call.in.handle != nullptr) {}

  /// Writes the token once to each rank it goes to; grouped by expert: once for each selection there. Rows are
  /// streamed: RowOps::flush() before anybody is told.
  void deliver(const TokenInTransit& token) const;

 private:
  void write_row(const TokenInTransit& token, const Destination& to, int k) const;
  void write_arrival(const TokenInTransit& token, const Destination& to, int first_k) const;
  void write_ids(const TokenInTransit& token, const Destination& to, int first_k) const;

  const DispatchCall& call_;
  const std::vector<Destination>& destinations_;
  const RowOps& ops_;
  const bool by_rank_, cached_;
};

}  // namespace deep_ep::host
