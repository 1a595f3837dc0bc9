// SPDX-License-Identifier: MIT
// Random inputs of one rank, a dispatch and a combine of them on any buffer, and what came of it as numbers that can be
// compared.
#pragma once

#include <algorithm>
#include <map>

#include "cuda/gpu.h"
#include "world.h"

namespace deep_ep::test {

/// One rank's tensors in ordinary memory, and where wanted in a GPU's.
struct Sample {
  oracle::Array x, ids, weights, home_weights, bias;

  Sample(const Shape& shape, Random& random, int tokens)
      : x(random_array(random, shape.dtype, {tokens, shape.hidden})),
        ids(DType::kI64, {tokens, shape.topk}),
        weights(random_array(random, DType::kFp32, {tokens, shape.topk})),
        home_weights(random_array(random, DType::kFp32, {tokens, shape.topk})),
        bias(random_array(random, shape.dtype, {tokens, shape.hidden})) {
    for (std::int64_t i = 0; i < ids.rows() * shape.topk; ++i)
      ids.set<std::int64_t>(i, random.below(100) < shape.percent_missing ? -1 : random.below(shape.experts));
  }
};

/// Where a buffer reads a sample: as it is, or copies in device memory.
struct Placed {
  Tensor x, ids, weights, home_weights, bias;
  Placed(const Sample& sample, bool on_gpu) {
    const auto put = [&](const oracle::Array& array) {
      return on_gpu ? to_gpu(array.view()) : Tensor(array.view(), nullptr);
    };
    x = put(sample.x), ids = put(sample.ids), weights = put(sample.weights);
    home_weights = put(sample.home_weights), bias = put(sample.bias);
  }
};

inline DispatchInput dispatch_of(const Shape& shape, const Placed& placed, std::int64_t max_rows, Stream stream) {
  DispatchInput in;
  in.x = placed.x;
  in.topk_idx = placed.ids;
  if (shape.weights) in.topk_weights = placed.weights;
  in.num_experts = shape.experts;
  in.layout = shape.layout;
  in.expert_alignment = shape.alignment;
  in.fp8 = shape.fp8;
  in.max_rows = max_rows;
  if (shape.low_latency) in.max_tokens_per_rank = shape.max_tokens_per_rank;
  in.stream = stream;
  return in;
}

/// Brings `rows` home; they must be numbers.
inline CombineInput combine_of(const Shape& shape, const Placed& placed, const TensorView& rows,
                               const std::shared_ptr<const Handle>& handle, const SumOrder& order, Stream stream) {
  CombineInput back;
  back.x = rows;
  back.handle = handle;
  back.order = order;
  if (shape.layout != OutputLayout::kByRank) back.weights = placed.home_weights;
  back.bias[0] = placed.bias;
  back.stream = stream;
  return back;
}

/// FNV-1a over eight bytes at a time: equal digests are taken for equal results.
class Digest {
 public:
  void add(const void* data, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, static_cast<const std::byte*>(data) + at, std::min<std::size_t>(8, bytes - at));
      value_ = (value_ ^ word) * 0x100000001b3ull;
      value_ ^= value_ >> 29;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325ull;
};

/// Digests by name of everything that a dispatch and its combine promise. The layouts are kByRank and kByExpert.
using Digests = std::map<std::string, std::uint64_t>;

inline Digests digests_of(const DispatchOutput& sent, const CombineOutput& home, int num_ranks) {
  Digests all;
  const auto add = [&](const std::string& what, const TensorView& tensor, std::int64_t rows) {
    if (!tensor.given()) return;
    std::vector<std::byte> bytes = bytes_of(tensor);
    if (tensor.shape[0] > 0) bytes.resize(bytes.size() / static_cast<std::size_t>(tensor.shape[0]) * rows);
    Digest digest;
    digest.add(bytes.data(), bytes.size());
    all[what] = digest.value();
  };
  const Handle& h = *sent.handle;
  const auto last = [&](const Tensor& counts, std::int64_t at) {
    const auto bytes = bytes_of(counts);
    return std::int64_t{reinterpret_cast<const std::int32_t*>(bytes.data())[at]};
  };
  const std::int64_t arrivals = last(h.first_arrival, num_ranks);
  const std::int64_t rows =
      h.layout == OutputLayout::kByRank ? arrivals : last(h.slot_first_row, h.slot_first_row.shape[0] - 1);
  add("x", sent.x, rows);
  add("scales", sent.scales, rows);
  add("topk_idx", sent.topk_idx, arrivals);
  add("topk_weights", sent.topk_weights, h.layout == OutputLayout::kByRank ? arrivals : rows);
  add("src_token", h.src_token, arrivals);
  add("arrival_row", h.arrival_row, arrivals);
  for (const auto& [what, tensor] :
       {std::pair("dst_rank", &h.dst_rank), std::pair("dst_row", &h.dst_row), std::pair("dst_arrival", &h.dst_arrival),
        std::pair("first_arrival", &h.first_arrival), std::pair("slot_rows", &h.slot_rows),
        std::pair("slot_first_row", &h.slot_first_row), std::pair("tokens_between", &h.tokens_between),
        std::pair("combined x", &home.x)})
    add(what, *tensor, tensor->shape[0]);
  return all;
}

}  // namespace deep_ep::test
