// SPDX-License-Identifier: MIT
// The C calls that look at results: tensors, handles, statistics.
#include <algorithm>

#include "capi/objects.h"

deep_ep_dispatch_result::deep_ep_dispatch_result(deep_ep::DispatchOutput from)
    : output(std::move(from)), handle(new deep_ep_handle(output.handle)) {}

deep_ep_dispatch_result::~deep_ep_dispatch_result() { deep_ep_handle_free(handle); }

namespace deep_ep::capi {

namespace {

const Tensor& field_of(const DispatchOutput& output, deep_ep_dispatch_field field) {
  switch (checked_enum(field, DEEP_EP_DISPATCH_TOPK_WEIGHTS, "field")) {
    case DEEP_EP_DISPATCH_X: break;
    case DEEP_EP_DISPATCH_SCALES: return output.scales;
    case DEEP_EP_DISPATCH_TOPK_IDX: return output.topk_idx;
    case DEEP_EP_DISPATCH_TOPK_WEIGHTS: return output.topk_weights;
  }
  return output.x;
}

const Tensor& field_of(const Handle& handle, deep_ep_handle_field field) {
  switch (checked_enum(field, DEEP_EP_HANDLE_TOKENS_BETWEEN, "field")) {
    case DEEP_EP_HANDLE_DST_RANK: break;
    case DEEP_EP_HANDLE_DST_ROW: return handle.dst_row;
    case DEEP_EP_HANDLE_FIRST_ARRIVAL: return handle.first_arrival;
    case DEEP_EP_HANDLE_SRC_TOKEN: return handle.src_token;
    case DEEP_EP_HANDLE_ARRIVAL_ROW: return handle.arrival_row;
    case DEEP_EP_HANDLE_SLOT_ROWS: return handle.slot_rows;
    case DEEP_EP_HANDLE_SLOT_FIRST_ROW: return handle.slot_first_row;
    case DEEP_EP_HANDLE_TOKENS_BETWEEN: return handle.tokens_between;
  }
  return handle.dst_rank;
}

const Tensor& field_of(const DispatchLayout& layout, deep_ep_layout_field field) {
  switch (checked_enum(field, DEEP_EP_LAYOUT_TOKEN_IN_RANK, "field")) {
    case DEEP_EP_LAYOUT_TOKENS_PER_RANK: break;
    case DEEP_EP_LAYOUT_TOKENS_PER_NODE: return layout.tokens_per_node;
    case DEEP_EP_LAYOUT_TOKENS_PER_EXPERT: return layout.tokens_per_expert;
    case DEEP_EP_LAYOUT_TOKEN_IN_RANK: return layout.is_token_in_rank;
  }
  return layout.tokens_per_rank;
}

const Tensor& field_of(const CombineOutput& output, deep_ep_combine_field field) {
  switch (checked_enum(field, DEEP_EP_COMBINE_TOPK_WEIGHTS, "field")) {
    case DEEP_EP_COMBINE_X: break;
    case DEEP_EP_COMBINE_TOPK_WEIGHTS: return output.topk_weights;
  }
  return output.x;
}

deep_ep_handle_info info_of(const Handle& handle) {
  deep_ep_handle_info info{};
  info.size = sizeof(info);
  info.num_tokens = handle.num_tokens;
  info.num_rows = handle.num_rows;
  info.num_arrivals = handle.num_arrivals;
  info.layout = static_cast<deep_ep_output_layout>(handle.layout);
  info.num_ranks = handle.num_ranks;
  info.num_topk = handle.num_topk;
  info.num_experts = handle.num_experts;
  info.expert_alignment = handle.expert_alignment;
  info.max_tokens_per_rank = handle.max_tokens_per_rank;
  info.low_latency = handle.low_latency ? 1 : 0;
  info.topk_idx_64 = handle.topk_idx_64 ? 1 : 0;
  return info;
}

/// The caller's array of peers steps by its own size of an entry, which stands in the first.
void write_peers(const std::vector<Statistics::Peer>& peers, deep_ep_peer_statistics* theirs, int max_peers) {
  constexpr std::size_t kFirst = EP_END_OF(deep_ep_peer_statistics, wait_ns_max);
  const std::size_t count = std::min<std::size_t>(std::max(max_peers, 0), peers.size());
  if (count == 0) return;
  const std::size_t step = checked_size(&given(theirs, "statistics.peers"), {"peers[0]", kFirst, sizeof(*theirs)});
  auto* at = reinterpret_cast<std::byte*>(theirs);
  for (std::size_t i = 0; i < count; ++i, at += step) {
    const deep_ep_peer_statistics ours{step, peers[i].bytes_sent, peers[i].waits, peers[i].wait_ns_sum,
                                       peers[i].wait_ns_max};
    std::memcpy(at, &step, sizeof(step));
    write_struct(at, &ours, {"peers", kFirst, sizeof(ours)});
  }
}

void write_slots(const std::vector<std::uint64_t>& rows, std::uint64_t* theirs, int max_slots) {
  const std::size_t count = std::min<std::size_t>(std::max(max_slots, 0), rows.size());
  if (count == 0) return;
  std::copy_n(rows.begin(), count, &given(theirs, "statistics.rows_per_slot"));
}

void write_statistics(const Statistics& from, deep_ep_statistics* theirs) {
  constexpr std::size_t kFirst = EP_END_OF(deep_ep_statistics, num_slots);
  deep_ep_statistics s = read(&given(theirs, "statistics"), "statistics", kFirst);
  write_peers(from.peers, s.peers, s.max_peers);
  write_slots(from.rows_per_slot, s.rows_per_slot, s.max_slots);
  s.num_peers = static_cast<int>(from.peers.size());
  s.num_slots = static_cast<int>(from.rows_per_slot.size());
  s.operations = from.operations;
  s.refused = from.refused;
  s.timeouts = from.timeouts;
  s.copied_out_bytes = from.copied_out_bytes;
  s.staged_bytes = from.staged_bytes;
  s.arena_bytes_in_use = from.arena_bytes_in_use;
  s.arena_bytes_high_water = from.arena_bytes_high_water;
  write(theirs, s, "statistics", kFirst);
}

}  // namespace
}  // namespace deep_ep::capi

using namespace deep_ep::capi;

extern "C" {

deep_ep_status deep_ep_allocation_tensor(const deep_ep_allocation* allocation, deep_ep_tensor* tensor) {
  return guarded([&] { write_tensor(tensor, given(allocation, "allocation").tensor); });
}

void deep_ep_allocation_free(deep_ep_allocation* allocation) { delete allocation; }

deep_ep_status deep_ep_dispatch_result_tensor(const deep_ep_dispatch_result* result, deep_ep_dispatch_field field,
                                              deep_ep_tensor* tensor) {
  return guarded([&] { write_tensor(tensor, field_of(given(result, "result").output, field)); });
}

deep_ep_status deep_ep_dispatch_result_side(const deep_ep_dispatch_result* result, int index, deep_ep_tensor* tensor) {
  return guarded([&] {
    const auto& side = given(result, "result").output.side;
    const int num_side = static_cast<int>(side.size());
    deep_ep::require(index >= 0 && index < num_side, "index: {}, there are {} side tensors", index, num_side);
    write_tensor(tensor, side[index]);
  });
}

int deep_ep_dispatch_result_num_side(const deep_ep_dispatch_result* result) {
  return result != nullptr ? static_cast<int>(result->output.side.size()) : 0;
}

deep_ep_handle* deep_ep_dispatch_result_handle(const deep_ep_dispatch_result* result) {
  return result != nullptr ? result->handle : nullptr;
}

void deep_ep_dispatch_result_free(deep_ep_dispatch_result* result) { delete result; }

deep_ep_handle* deep_ep_handle_retain(deep_ep_handle* handle) {
  // Relaxed: the caller owns a reference already, so the count cannot be on its way to 0.
  if (handle != nullptr) handle->owners.fetch_add(1, std::memory_order_relaxed);
  return handle;
}

void deep_ep_handle_free(deep_ep_handle* handle) {
  // Release: this owner's reads come before the deletion. Acquire: the last owner deletes after all of them.
  if (handle != nullptr && handle->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete handle;
}

deep_ep_status deep_ep_handle_get_info(const deep_ep_handle* handle, deep_ep_handle_info* info) {
  return guarded([&] {
    write(info, info_of(*given(handle, "handle").handle), "info", EP_END_OF(deep_ep_handle_info, num_arrivals));
  });
}

deep_ep_status deep_ep_handle_tensor(const deep_ep_handle* handle, deep_ep_handle_field field, deep_ep_tensor* tensor) {
  return guarded([&] { write_tensor(tensor, field_of(*given(handle, "handle").handle, field)); });
}

deep_ep_status deep_ep_layout_result_tensor(const deep_ep_layout_result* result, deep_ep_layout_field field,
                                            deep_ep_tensor* tensor) {
  return guarded([&] { write_tensor(tensor, field_of(given(result, "result").layout, field)); });
}

void deep_ep_layout_result_free(deep_ep_layout_result* result) { delete result; }

deep_ep_status deep_ep_combine_result_tensor(const deep_ep_combine_result* result, deep_ep_combine_field field,
                                             deep_ep_tensor* tensor) {
  return guarded([&] { write_tensor(tensor, field_of(given(result, "result").output, field)); });
}

void deep_ep_combine_result_free(deep_ep_combine_result* result) { delete result; }

deep_ep_status deep_ep_get_statistics(const deep_ep_buffer* buffer, deep_ep_statistics* statistics) {
  return guarded([&] { write_statistics(given(buffer, "buffer").buffer->statistics(), statistics); });
}

deep_ep_status deep_ep_reset_statistics(deep_ep_buffer* buffer) {
  return guarded([&] { given(buffer, "buffer").buffer->reset_statistics(); });
}

}  // extern "C"
