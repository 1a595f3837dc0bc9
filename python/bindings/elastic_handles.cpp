// SPDX-License-Identifier: MIT
// The tensors of DeepEP's V2 EPHandle, made from a Handle, and a Handle made again from them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <string>

#include "deep_ep/error.h"
#include "handles.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

namespace {

const std::int32_t* read(const TensorView& tensor) { return tensor.as<const std::int32_t>(); }

// [arrivals, 2 + topk]: source (rank * max_tokens + token) | source rank * topk + highest selection here | rows of the
// selections, -1 where there is none. Behind the last arrival of a bounded dispatch: -1.
Tensor source_metadata(const Handle& h, const TensorView& slots, std::int64_t arrivals, int max_tokens) {
  const int topk = h.num_topk, width = topk + 2;
  const bool expanded = h.layout != OutputLayout::kByRank;
  Tensor metadata = filled({arrivals, width}, -1);
  const std::int32_t* first = read(h.first_arrival);
  for (int src = 0; src < h.num_ranks; ++src)
    for (std::int64_t arrival = first[src]; arrival < std::min<std::int64_t>(first[src + 1], arrivals); ++arrival) {
      std::int32_t* out = metadata.as<std::int32_t>() + arrival * width;
      int highest = -1;
      for (int k = 0; k < topk; ++k) {
        const std::int64_t i = arrival * topk + k;
        const bool here = slots.dtype == DType::kI64 ? slots.as<const std::int64_t>()[i] >= 0 : read(slots)[i] >= 0;
        if (here) highest = k;
        if (expanded) out[2 + k] = read(h.arrival_row)[i];
      }
      out[0] = src * max_tokens + read(h.src_token)[arrival];
      out[1] = src * topk + highest;
    }
  return metadata;
}

// Inclusive prefix over source ranks of one number within their nodes, rows of all nodes together.
Tensor rank_prefix(const Handle& h, const KeyTensor& key, int num_scaleup) {
  std::fill_n(key.tensor().as<std::int32_t>(), num_scaleup, 0);
  const std::int32_t* first = read(h.first_arrival);
  std::int32_t* prefix = key.tensor().as<std::int32_t>();
  for (int src = 0; src < h.num_ranks; ++src) prefix[src % num_scaleup] += first[src + 1] - first[src];
  for (int i = 1; i < num_scaleup; ++i) prefix[i] += prefix[i - 1];
  return key.tensor();
}

nb::tuple elastic_fields(const std::shared_ptr<Handle>& handle, nb::handle slots, std::int64_t arrivals,
                         int max_tokens_per_rank, int num_scaleup) {
  const Handle& h = *handle;
  const bool expanded = h.layout != OutputLayout::kByRank;
  const KeyTensor key(DType::kI32, {num_scaleup});
  const Tensor by_rank = rank_prefix(h, key, num_scaleup);
  key.set(handle);
  const std::int64_t num_slots = h.slot_rows.numel();
  Tensor by_expert = filled({num_slots}, 0);
  for (std::int64_t slot = 0; slot < num_slots; ++slot)
    by_expert.as<std::int32_t>()[slot] =
        expanded ? read(h.slot_first_row)[slot] + read(h.slot_rows)[slot] : read(h.slot_first_row)[slot + 1];
  return nb::make_tuple(to_torch(by_rank), to_torch(by_expert), to_torch(copy_of(h.slot_rows)),
                        to_torch(source_metadata(h, view_of(slots, "recv_topk_idx"), arrivals, max_tokens_per_rank)),
                        to_torch(copy_of(h.dst_row)));
}

// From the tensors of an EPHandle whose own Handle is gone, as after a checkpoint.
std::shared_ptr<Handle> handle_from_elastic(nb::handle topk_idx_object, nb::handle dst_row_object,
                                            nb::handle unaligned_object, const std::shared_ptr<Placement>& placement,
                                            std::int64_t num_rows, std::int64_t num_arrivals, int expert_alignment,
                                            bool expanded) {
  const TensorView ids = view_of(topk_idx_object, "handle.topk_idx");
  const TensorView rows = view_of(dst_row_object, "handle.dst_buffer_slot_idx");
  const TensorView counts = view_of(unaligned_object, "handle.num_unaligned_recv_tokens_per_expert");
  if (rows.dtype != DType::kI32 || counts.dtype != DType::kI32 || ids.ndim != 2 || rows.shape != ids.shape)
    throw Error(ErrorCode::kInvalidArgument, "handle: topk_idx " + describe(ids) + " and dst_buffer_slot_idx " +
                                                 describe(rows) +
                                                 " must have one shape, counts be i32: " + describe(counts));
  auto h = std::make_shared<Handle>();
  h->layout = expanded ? OutputLayout::kByExpert : OutputLayout::kByRank;
  h->num_ranks = placement->num_ranks();
  h->num_topk = static_cast<int>(ids.size(1));
  h->num_experts = placement->num_experts();
  h->expert_alignment = expert_alignment;
  h->topk_idx_64 = ids.dtype == DType::kI64;
  h->placement = placement;
  h->num_tokens = ids.size(0);
  h->num_rows = num_rows;
  h->num_arrivals = num_arrivals;
  h->dst_rank = filled({h->num_tokens, h->num_topk}, -1);
  h->dst_row = copy_of(rows);
  h->dst_arrival = h->dst_row;  // a cached dispatch grouped by expert sends nothing by arrival
  for (std::int64_t i = 0; i < ids.numel(); ++i) {
    const std::int64_t expert = ids.dtype == DType::kI64 ? ids.as<const std::int64_t>()[i] : read(ids)[i];
    if (read(rows)[i] >= 0 && expert >= 0)
      h->dst_rank.as<std::int32_t>()[i] = placement->replicas(static_cast<int>(expert))[0].rank;
  }
  h->slot_rows = copy_of(counts);
  h->slot_first_row = filled({counts.numel() + 1}, 0);
  std::int32_t end = 0;
  for (std::int64_t slot = 0; slot < counts.numel(); ++slot) {
    end += (read(counts)[slot] + expert_alignment - 1) / expert_alignment * expert_alignment;
    h->slot_first_row.as<std::int32_t>()[slot + 1] = end;
  }
  return h;
}

}  // namespace

void bind_elastic_handles(nb::module_& m) {
  m.def("elastic_fields", &elastic_fields, nb::arg("handle"), nb::arg("recv_topk_idx"), nb::arg("num_arrivals"),
        nb::arg("max_tokens_per_rank"), nb::arg("num_scaleup"),
        "psum per rank, psum per expert, unaligned counts, source metadata, rows at the destinations.");
  m.def("handle_from_elastic", &handle_from_elastic, nb::arg("topk_idx"), nb::arg("dst_row"), nb::arg("unaligned"),
        nb::arg("placement"), nb::arg("num_rows"), nb::arg("num_arrivals"), nb::arg("expert_alignment"),
        nb::arg("expanded"));
}

}  // namespace deep_ep::python
