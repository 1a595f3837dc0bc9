// SPDX-License-Identifier: MIT
// The handle tuples of DeepEP's V1 API, made from a Handle, and a Handle made again from what they hold.
// This library moves rows without channels; where the tuples speak of channels, all tokens are in channel 0.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <string>
#include <vector>

#include "deep_ep/error.h"
#include "handles.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

namespace {

struct Shape {
  int rank;
  int num_channels;
  int ranks_per_node;
  int num_nodes(int num_ranks) const { return (num_ranks + ranks_per_node - 1) / ranks_per_node; }
};

std::int32_t* words(const Tensor& tensor) { return tensor.as<std::int32_t>(); }

// [num_tokens, num_ranks]: the row of each token on each rank, -1 where it does not go.
Tensor rows_by_rank(const Handle& h) {
  Tensor rows = filled({h.num_tokens, h.num_ranks}, -1);
  const auto *dst_rank = h.dst_rank.as<const std::int32_t>(), *dst_row = h.dst_row.as<const std::int32_t>();
  for (std::int64_t i = 0; i < h.dst_rank.numel(); ++i)
    if (dst_rank[i] >= 0) words(rows)[i / h.num_topk * h.num_ranks + dst_rank[i]] = dst_row[i];
  return rows;
}

// Tokens from ranks 0 .. i to rank j, inclusive.
void fill_rank_prefix(const Handle& h, const Tensor& prefix) {
  const int ranks = h.num_ranks;
  const auto* between = h.tokens_between.as<const std::int32_t>();
  for (int i = 0; i < ranks; ++i)
    for (int j = 0; j < ranks; ++j)
      words(prefix)[i * ranks + j] = between[i * ranks + j] + (i > 0 ? words(prefix)[(i - 1) * ranks + j] : 0);
}

// [rows, num_channels] with the same value in a whole row: an inclusive prefix over channels, all in the first.
template <typename Value>
Tensor inclusive_over_channels(int rows, int num_channels, const Value& value) {
  Tensor tensor = filled({rows, num_channels}, 0);
  for (int row = 0; row < rows; ++row)
    std::fill_n(words(tensor) + static_cast<std::int64_t>(row) * num_channels, num_channels, value(row));
  return tensor;
}

// [rows, num_channels]: where each channel begins: the first at `begin`, the others, being empty, at `end`.
template <typename Begin, typename End>
Tensor starts_of_channels(int rows, int num_channels, const Begin& begin, const End& end) {
  Tensor tensor = inclusive_over_channels(rows, num_channels, end);
  for (int row = 0; row < rows && num_channels > 0; ++row)
    words(tensor)[static_cast<std::int64_t>(row) * num_channels] = begin(row);
  return tensor;
}

Tensor src_rows(const Handle& h) { return h.src_token.given() ? h.src_token : filled({h.num_rows}, -1); }

nb::tuple intranode_tuple(const std::shared_ptr<Handle>& handle, nb::object is_token_in_rank, int rank,
                          int num_channels) {
  const Handle& h = *handle;
  const int ranks = h.num_ranks;
  const KeyTensor rank_prefix(DType::kI32, {ranks, ranks});
  fill_rank_prefix(h, rank_prefix.tensor());
  rank_prefix.set(handle);
  const auto* between = h.tokens_between.as<const std::int32_t>();
  const auto* first = h.first_arrival.as<const std::int32_t>();
  const Tensor sent =
      inclusive_over_channels(ranks, num_channels, [&](int dst) { return between[rank * ranks + dst]; });
  const Tensor received = starts_of_channels(
      ranks, num_channels, [](int) { return 0; }, [&](int src) { return first[src + 1] - first[src]; });
  return nb::make_tuple(to_torch(rank_prefix.tensor()), to_torch(sent), to_torch(received), to_torch(src_rows(h)),
                        is_token_in_rank, to_torch(rows_by_rank(h)));
}

// Node of the source, and which ranks of this node the token goes to.
Tensor source_meta(const Handle& h, const TensorView& member_words, const Shape& shape) {
  Tensor meta = Tensor::allocate(DType::kU8, {h.num_rows, 8});
  const auto* first = h.first_arrival.as<const std::int32_t>();
  const int first_rank = shape.rank / shape.ranks_per_node * shape.ranks_per_node;
  const int last_rank = std::min({first_rank + shape.ranks_per_node, first_rank + 32, h.num_ranks});
  int src = 0;
  for (std::int64_t row = 0; row < h.num_rows; ++row) {
    while (src + 1 < h.num_ranks && row >= first[src + 1]) ++src;
    const bool valid = row < first[h.num_ranks];
    std::int32_t mask = 0;
    const auto* member = member_words.as<const std::int32_t>() + row * member_words.size(1);
    for (int rank = first_rank; valid && rank < last_rank; ++rank)
      mask |= (member[rank / 32] >> (rank % 32) & 1) << (rank - first_rank);
    meta.as<std::int32_t>()[2 * row] = valid ? src / shape.ranks_per_node : -1;
    meta.as<std::int32_t>()[2 * row + 1] = mask;
  }
  return meta;
}

// [num_tokens, num_nodes]: number of the token among those that go to the node, -1 where it does not.
Tensor heads_by_node(const Handle& h, const Shape& shape) {
  const int nodes = shape.num_nodes(h.num_ranks);
  Tensor heads = filled({h.num_tokens, nodes}, -1);
  std::vector<std::int32_t> next(nodes, 0);
  const auto* dst_rank = h.dst_rank.as<const std::int32_t>();
  for (std::int64_t i = 0; i < h.dst_rank.numel(); ++i) {
    if (dst_rank[i] < 0) continue;
    const int node = dst_rank[i] / shape.ranks_per_node;
    std::int32_t& head = words(heads)[i / h.num_topk * nodes + node];
    if (head < 0) head = next[node]++;
  }
  return heads;
}

nb::tuple internode_tuple(const std::shared_ptr<Handle>& handle, nb::object is_token_in_rank, nb::handle members,
                          int rank, int num_channels, int ranks_per_node) {
  const Handle& h = *handle;
  const Shape shape{rank, num_channels, ranks_per_node};
  const int ranks = h.num_ranks, nodes = shape.num_nodes(ranks);
  const auto* between = h.tokens_between.as<const std::int32_t>();
  const auto* first = h.first_arrival.as<const std::int32_t>();
  const auto rows_up_to_node = [&](int node) { return first[std::min((node + 1) * ranks_per_node, ranks)]; };
  const auto rows_before_node = [&](int node) { return first[std::min(node * ranks_per_node, ranks)]; };

  const KeyTensor rank_prefix(DType::kI32, {ranks});
  std::copy_n(first + 1, ranks, words(rank_prefix.tensor()));
  rank_prefix.set(handle);
  const Tensor node_heads = heads_by_node(h, shape);
  std::vector<std::int32_t> tokens_to_node(nodes, 0);
  for (std::int64_t i = 0; i < node_heads.numel(); ++i) tokens_to_node[i % nodes] += words(node_heads)[i] >= 0;
  Tensor node_prefix = filled({nodes}, 0);
  for (int node = 0; node < nodes; ++node) words(node_prefix)[node] = rows_up_to_node(node);
  // [num_tokens * nodes, ranks of a node], where nodes are even; else [num_tokens, ranks].
  Tensor rank_heads = rows_by_rank(h);
  if (ranks % ranks_per_node == 0)
    rank_heads =
        Tensor(TensorView(rank_heads.data, DType::kI32, {h.num_tokens * nodes, ranks_per_node}), rank_heads.owner);

  return nb::make_tuple(
      is_token_in_rank,
      to_torch(inclusive_over_channels(nodes, num_channels, [&](int node) { return tokens_to_node[node]; })),
      to_torch(inclusive_over_channels(ranks, num_channels, [&](int dst) { return between[rank * ranks + dst]; })),
      to_torch(inclusive_over_channels(nodes, num_channels,
                                       [&](int node) { return rows_up_to_node(node) - rows_before_node(node); })),
      to_torch(node_prefix),
      to_torch(starts_of_channels(
          ranks, num_channels, [&](int src) { return first[src]; }, [&](int src) { return first[src + 1]; })),
      to_torch(rank_prefix.tensor()), to_torch(source_meta(h, view_of(members, "members"), shape)),
      to_torch(node_heads), to_torch(rank_heads));
}

// A handle of rows by rank from the matrix that rows_by_rank() made. Good for combine and for cached dispatch.
std::shared_ptr<Handle> from_rows_by_rank(nb::handle rows_object, int num_ranks, std::int64_t num_rows, int num_topk) {
  const TensorView rows = view_of(rows_object, "rows by rank");
  if (rows.dtype != DType::kI32 || !rows.contiguous() || rows.numel() % num_ranks != 0)
    throw Error(ErrorCode::kInvalidArgument, "handle: its last tensor must be a contiguous int32 matrix of rows on " +
                                                 std::to_string(num_ranks) + " ranks: it is " + describe(rows));
  auto h = std::make_shared<Handle>();
  h->num_ranks = num_ranks;
  h->num_topk = num_topk;
  h->num_experts = num_ranks;
  h->placement = Placement::even(num_ranks, num_ranks);
  h->num_tokens = rows.numel() / num_ranks;
  h->num_rows = h->num_arrivals = num_rows;
  h->dst_rank = filled({h->num_tokens, num_topk}, -1);
  h->dst_row = filled({h->num_tokens, num_topk}, -1);
  const auto* row = rows.as<const std::int32_t>();
  for (std::int64_t token = 0; token < h->num_tokens; ++token) {
    int k = 0;
    for (int dst = 0; dst < num_ranks; ++dst, ++row) {
      if (*row < 0) continue;
      if (k == num_topk)
        throw Error(ErrorCode::kInvalidArgument, "handle: token " + std::to_string(token) + " went to more than top-" +
                                                     std::to_string(num_topk) + " ranks");
      words(h->dst_rank)[token * num_topk + k] = dst;
      words(h->dst_row)[token * num_topk + k++] = *row;
    }
    // Which selection took which rank is not known; all entries of a token's weights travel, so every selection names
    // one of its ranks.
    for (int last = k - 1; last >= 0 && k < num_topk; ++k) {
      words(h->dst_rank)[token * num_topk + k] = words(h->dst_rank)[token * num_topk + last];
      words(h->dst_row)[token * num_topk + k] = words(h->dst_row)[token * num_topk + last];
    }
  }
  h->dst_arrival = h->dst_row;
  h->slot_rows = filled({1}, static_cast<std::int32_t>(num_rows));
  h->slot_first_row = filled({2}, 0);
  words(h->slot_first_row)[1] = static_cast<std::int32_t>(num_rows);
  return h;
}

// Ids for tokens whose ranks alone are known: "expert" r is rank r.
nb::object ranks_as_experts(nb::handle member_object) {
  const TensorView member = view_of(member_object, "is_token_in_rank");
  if (member.ndim != 2 || item_bytes(member.dtype) != 1 || !member.contiguous())
    throw Error(ErrorCode::kInvalidArgument,
                "is_token_in_rank must be a contiguous bool matrix: it is " + describe(member));
  Tensor ids = filled({member.size(0), member.size(1)}, -1);
  for (std::int64_t i = 0; i < member.numel(); ++i)
    if (member.as<const std::uint8_t>()[i] != 0) words(ids)[i] = static_cast<std::int32_t>(i % member.size(1));
  return to_torch(ids);
}

// [num_tokens, ceil(num_ranks / 32)]: a bit for each rank that a token goes to.
nb::object membership_words(nb::handle member_object) {
  const TensorView member = view_of(member_object, "is_token_in_rank");
  const std::int64_t ranks = member.size(1), width = (ranks + 31) / 32;
  Tensor bits = filled({member.size(0), width}, 0);
  for (std::int64_t i = 0; i < member.numel(); ++i) {
    if (member.as<const std::uint8_t>()[i] == 0) continue;
    const std::int64_t rank = i % ranks;
    bits.as<std::uint32_t>()[i / ranks * width + rank / 32] |= std::uint32_t{1} << (rank % 32);
  }
  return to_torch(bits);
}

}  // namespace

void bind_legacy_handles(nb::module_& m) {
  m.def("intranode_tuple", &intranode_tuple, nb::arg("handle"), nb::arg("is_token_in_rank").none(), nb::arg("rank"),
        nb::arg("num_channels"));
  m.def("internode_tuple", &internode_tuple, nb::arg("handle"), nb::arg("is_token_in_rank").none(), nb::arg("members"),
        nb::arg("rank"), nb::arg("num_channels"), nb::arg("ranks_per_node"));
  m.def("handle_from_rows_by_rank", &from_rows_by_rank, nb::arg("rows"), nb::arg("num_ranks"), nb::arg("num_rows"),
        nb::arg("num_topk"));
  m.def("ranks_as_experts", &ranks_as_experts, nb::arg("is_token_in_rank"));
  m.def("membership_words", &membership_words, nb::arg("is_token_in_rank"));
}

}  // namespace deep_ep::python
