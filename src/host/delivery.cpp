// SPDX-License-Identifier: MIT
#include "host/delivery.h"

#include <algorithm>
#include <cstring>

namespace deep_ep::host {

void Delivery::deliver(const TokenInTransit& token) const {
  for (int k = 0; k < call_.num_topk; ++k) {
    const std::int32_t dst = token.rank[k];
    if (dst < 0 || destinations_[dst].block == nullptr) continue;
    const bool first_there = std::find(token.rank, token.rank + k, dst) == token.rank + k;
    if (first_there) write_arrival(token, destinations_[dst], k);
    if (first_there || !by_rank_) write_row(token, destinations_[dst], k);
  }
}

void Delivery::write_row(const TokenInTransit& token, const Destination& to, int k) const {
  const std::int64_t row = token.row_there[k];
  ops_.copy(to.block + to.at.x_at + static_cast<std::size_t>(row) * call_.shape.row_bytes, token.row,
            call_.shape.row_bytes);
  std::int32_t* scales = reinterpret_cast<std::int32_t*>(to.block + to.at.scales_at) + to.at.first_scale(row);
  for (int i = 0; i < call_.shape.num_scales; ++i)
    scales[i * to.at.scale_column_stride] = token.scales[i * token.scale_stride];
  if (call_.shape.topk_weights && !by_rank_)
    reinterpret_cast<float*>(to.block + to.at.topk_weights_at)[row] = token.weights[k];
}

// What is told of a token once per rank: ids, weights, where it came from, side tensors.
void Delivery::write_arrival(const TokenInTransit& token, const Destination& to, int first_k) const {
  const int topk = call_.num_topk;
  const std::size_t arrival = static_cast<std::size_t>(token.arrival[first_k]);
  if (!cached_) write_ids(token, to, first_k);
  if (call_.shape.topk_weights && by_rank_) {
    auto* weights = reinterpret_cast<float*>(to.block + to.at.topk_weights_at) + arrival * topk;
    for (int k = 0; k < topk; ++k)
      weights[k] = token.rank[k] == token.rank[first_k] || !call_.in.mask_topk_weights ? token.weights[k] : 0.0f;
  }
  for (int i = 0; i < call_.shape.num_side; ++i)
    std::memcpy(to.block + to.at.side_at[i] + arrival * call_.shape.side_bytes[i], token.side[i],
                call_.shape.side_bytes[i]);
}

void Delivery::write_ids(const TokenInTransit& token, const Destination& to, int first_k) const {
  const int topk = call_.num_topk;
  const std::size_t arrival = static_cast<std::size_t>(token.arrival[first_k]);
  const std::int32_t dst = token.rank[first_k];
  for (int k = 0; k < topk; ++k) {
    const std::int32_t slot = token.rank[k] == dst ? token.slot[k] : -1;
    std::byte* idx = to.block + to.at.topk_idx_at + (arrival * topk + k) * call_.shape.topk_idx_bytes;
    if (call_.shape.topk_idx_bytes == 8) {
      *reinterpret_cast<std::int64_t*>(idx) = slot;
    } else {
      *reinterpret_cast<std::int32_t*>(idx) = slot;
    }
  }
  reinterpret_cast<std::int32_t*>(to.block + to.at.src_token_at)[arrival] = token.token;
  auto* rows = reinterpret_cast<std::int32_t*>(to.block + to.at.arrival_row_at) + arrival * topk;
  for (int k = 0; k < topk && !by_rank_; ++k) rows[k] = token.rank[k] == dst ? token.row_there[k] : -1;
}

}  // namespace deep_ep::host
