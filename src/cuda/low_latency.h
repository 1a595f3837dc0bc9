// SPDX-License-Identifier: MIT
// The low-latency kernels' arguments and launchers, for host code. Each kernel sends, receives, or does both at once.
#pragma once

#include <cuda_runtime.h>

#include "cuda/exchange.h"
#include "plan/divisor.h"
#include "plan/fp8.h"
#include "plan/lines.h"
#include "plan/message.h"
#include "plan/placement.h"
#include "plan/wire.h"

namespace deep_ep::cuda {

/// Phases of one launch.
enum Phases : int { kSend = 1, kReceive = 2, kSendAndReceive = 3 };

/// What a receiver of dispatch makes for its handle, all in device memory; counts are known there alone.
struct ArrivalTables {
  std::int32_t *first_arrival, *slot_rows, *slot_first_row, *tokens_between, *src_token, *arrival_row;
  float* arrival_weights;      // null: the dispatch carries none
  std::int32_t* row_token;     // kPadded
  std::int64_t* source_range;  // kPadded
  // Of our own tokens that stay here, as arrival_row and arrival_weights, by token number.
  std::int32_t* own_row;
  float* own_weights;  // null: the dispatch carries none
};

/// How a block that routes shares tokens among its warps.
struct RouteShape {
  int of_step = 1;     // tokens that a warp has lanes for
  int most_warps = 1;  // as many as have room for counters
};

/// By what dispatch divides.
struct DispatchDivisors {
  plan::Divisor pieces, ranks, topk;
  plan::Divisor of_step;      // RouteShape
  plan::Divisor even;         // LowLatencyDispatchParams, where it is not 0
  plan::Divisor count_lines;  // of one source, for this rank
};

struct LowLatencyDispatchParams {
  Common common;
  std::byte* window;  // our own, as in `common`
  int phases;
  std::uint64_t* ticket;  // the operation's number: send leaves it to receive, so that graphs replay
  plan::RowShape shape;
  plan::LineMessage lines;
  std::uint32_t count_bytes, messages_at;  // of a source's counts; where messages begin behind them
  int pieces;                              // of a row, at least one
  std::uint64_t message_bytes;             // as Statistics counts what is sent
  plan::FarMessage far_message;            // to and from far ranks
  std::size_t far_source_bytes;            // of their slots, for each source
  OutputLayout layout;
  int expert_alignment, max_tokens_per_rank, num_topk;
  // As source.
  int num_tokens, num_experts;
  std::int64_t hidden;
  const std::byte* x;
  DType x_dtype;
  bool quantize;
  plan::Fp8Scale scale_kind;
  bool scales_given;
  const std::int32_t* scales;  // the caller's; null also where there are no tokens
  std::int64_t scale_strides[2];
  const void* topk_idx;
  bool topk_idx_64;
  const float* topk_weights;
  bool mask_topk_weights;
  const std::byte* side[plan::kMaxSide];
  plan::PlacementView placement;   // on the device
  bool one_copy_each;              // of every expert
  int even;                        // DevicePlacement::even: where it says all, no table is read
  const std::int32_t* first_copy;  // [num_ranks + 1]: slots of all ranks, one after the other
  int max_slots;
  RouteShape route;
  DispatchDivisors per;
  std::int32_t* dst_rank;  // of the handle
  // As receiver.
  int num_slots;
  std::byte* block;
  plan::OutputBlock at;
  std::int64_t most_arrivals, most_rows;
  ArrivalTables tables;
};

struct LowLatencyCombineParams {
  Common common;
  std::byte* window;  // our own, as in `common`
  int phases;
  std::uint64_t* ticket;
  plan::RowParts parts;
  OutputLayout layout;
  SumOrder order;
  DType dtype;
  bool pre_reduce;
  int max_tokens_per_rank, num_topk;
  std::int64_t row_bytes;  // 0: only weights travel
  bool by_lines;           // plan/lines.h, else in parts
  int pieces;              // of a row
  plan::CombineSlots slots;
  std::size_t slot_lines;  // bytes from one slot to the next
  WireFormat wire;         // in parts
  plan::EncodedRow encoded;
  std::int64_t slot_bytes;  // from one row's slot to the next: a row as it crosses, padded
  // As the rank that computed the rows.
  const std::byte* x;
  const float* x_weights;        // travel home beside the rows
  const float* arrival_weights;  // pre_reduce: what the dispatch carried; null: none are applied
  const std::int32_t *first_arrival, *src_token, *arrival_row;
  // Rows that stay on this rank are added where they lie in x: where each is, by token and selection, and what weighs
  // it with pre_reduce. Null: they go through slots as those of others do.
  const std::int32_t* own_row;
  const float* own_weights;
  // As home.
  int num_tokens;
  const std::int32_t *dst_rank, *node_of_rank;
  const float* weights;
  const std::byte* bias[2];
  std::byte* out;
  float* weights_out;
  WeightsHome weights_home;
};

/// Marks an operation whose ticket was dropped.
struct AbandonParams {
  Common common;
  const std::uint64_t* ticket;
};

/// Before a call is received: whoever does not speak by the deadline is masked from then on.
struct SilentParams {
  Common common;
  const std::uint64_t* ticket;
  Peer* peers;  // as common.peers
};

/// One of the kernels below, all of one block size.
void launch_low_latency(const void* kernel, int blocks, void** arguments, std::size_t shared, cudaStream_t stream);
void launch_low_latency_dispatch(const LowLatencyDispatchParams& params, int blocks, cudaStream_t stream);
void launch_low_latency_combine(const LowLatencyCombineParams& params, int blocks, cudaStream_t stream);
void launch_abandon(const AbandonParams& params, cudaStream_t stream);
void launch_leave_out_silent(const SilentParams& params, cudaStream_t stream);

RouteShape route_shape(int num_topk, int max_slots);
/// Bytes of shared memory that a dispatch of this shape takes.
std::size_t low_latency_shared_bytes(const LowLatencyDispatchParams& params);

const void* low_latency_dispatch_kernel(bool quantize, DType dtype, bool far);
const void* low_latency_combine_kernel(DType dtype, bool levels, bool lines);
const void* low_latency_combine_encoded_kernel(DType dtype, bool levels, WireFormat wire);
const void* abandon_kernel();
const void* leave_out_silent_kernel();

}  // namespace deep_ep::cuda
