// SPDX-License-Identifier: MIT
// What dispatch and combine must return, worked out from all ranks' inputs at once by plain loops. Shares no code with
// src/: its own number formats, routing, placement, order and sums, all written from the text of include/deep_ep. Slow
// on purpose.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "deep_ep/buffer.h"

namespace deep_ep::oracle {

// A contiguous tensor with its own memory. Without dimensions it stands for "not given", as TensorView does.
struct Array {
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  Array() = default;
  Array(DType dtype, std::vector<std::int64_t> shape);

  bool given() const { return !shape.empty(); }
  std::int64_t rows() const { return shape.empty() ? 0 : shape[0]; }
  std::size_t row_bytes() const;
  std::byte* row(std::int64_t i) { return bytes.data() + i * row_bytes(); }
  const std::byte* row(std::int64_t i) const { return bytes.data() + i * row_bytes(); }
  TensorView view() const;

  template <typename T>
  T get(std::int64_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void set(std::int64_t i, T value) {
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
};

// Numbers.
float decode(DType dtype, const std::byte* item);
void encode(DType dtype, float value, std::byte* item);  // to nearest, ties to even; e4m3 saturates

// What all ranks of one exchange agree on.
struct Exchange {
  int num_ranks = 1;
  std::vector<int> node_of;              // [num_ranks]
  std::vector<std::vector<int>> hosted;  // [rank][slot] -> expert
  int num_experts = 0;
  Placement::Policy policy = Placement::Policy::kSpread;
  OutputLayout layout = OutputLayout::kByRank;
  int alignment = 1;
  int max_tokens = 0;  // per rank, kPadded
  int num_topk = 0;
  bool mask_topk_weights = true;
  std::optional<Fp8Options> fp8;
  std::vector<bool> masked;  // ranks left out; empty: none

  int num_slots(int rank) const { return static_cast<int>(hosted[rank].size()); }
  bool is_masked(int rank) const { return !masked.empty() && masked[rank]; }
};

struct DispatchRank {
  Array x;             // [tokens, hidden]
  Array scales;        // [tokens, num_scales], dense
  Array topk_idx;      // [tokens, topk], i32 or i64
  Array topk_weights;  // [tokens, topk]
  std::vector<Array> side;

  std::int64_t expert(std::int64_t token, int k, int num_topk) const;
};

struct Dispatched {
  Array x, scales, topk_idx, topk_weights;
  std::vector<Array> side;
  std::vector<bool> row_written;  // false: a kPadded row that nothing came for; its content is undefined
  std::int64_t num_rows = 0;
  std::int64_t num_arrivals = 0;
  std::int64_t num_tokens = 0;
  std::vector<std::int32_t> dst_rank, dst_row, dst_arrival, first_arrival, src_token, arrival_row, slot_rows,
      slot_first_row, tokens_between;
};

// One entry per rank.
std::vector<Dispatched> dispatch(const Exchange& exchange, const std::vector<DispatchRank>& ranks);

struct CombineRank {
  Array x;             // rows as dispatched
  Array topk_weights;  // as dispatched
  Array weights;       // [tokens, topk] at home
  std::array<Array, 2> bias;
  WireFormat wire = WireFormat::kAsIs;
};

struct Combined {
  Array x;
  Array topk_weights;
};

std::vector<Combined> combine(const Exchange& exchange, const std::vector<Dispatched>& dispatched,
                              const std::vector<CombineRank>& ranks, const SumOrder& order,
                              WeightsHome home = WeightsHome::kSumOverRanks);

struct Layout {
  std::vector<std::int32_t> tokens_per_rank, tokens_per_node, tokens_per_expert;
  std::vector<std::uint8_t> is_token_in_rank;
};

Layout layout(const Exchange& exchange, const DispatchRank& tokens, int rank);

}  // namespace deep_ep::oracle
