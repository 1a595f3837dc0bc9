// SPDX-License-Identifier: MIT
// The kernels' arguments and launchers, for host code.
#pragma once

#include <cuda_runtime.h>

#include "cuda/exchange.h"
#include "plan/fp8.h"
#include "plan/placement.h"
#include "plan/sum_order.h"
#include "plan/tuning.h"

namespace deep_ep::cuda {

/// Where this rank's tokens go. notify writes numbers relative to what the receivers will say; dispatch makes them
/// final.
struct Routes {
  std::int32_t* dst_rank;     // [tokens, topk], of the handle
  std::int32_t* dst_row;      // likewise
  std::int32_t* dst_arrival;  // likewise
  std::int32_t* slot;         // scratch, as are the next two
  std::int32_t* relative_row;
  std::int32_t* relative_arrival;
};

struct NotifyParams {
  Common common;
  Routes routes;
  const void* topk_idx;
  bool topk_idx_64;
  int num_tokens, num_topk, num_experts;
  plan::PlacementView placement;   // on the device
  const std::int32_t* first_copy;  // [num_ranks + 1]: slots of all ranks, one after the other
  int num_copies;
  std::int32_t* block_counts;    // [blocks][num_ranks + num_copies]
  std::int32_t* segment_counts;  // [segments][num_ranks + num_copies], where shared memory has no room for them
  std::int32_t* totals;          // [num_ranks + num_copies]
  int segment_tokens;            // a segment is one warp's tokens
  int words_in_shared;           // of each warp and key: its counter, and the lanes that have it; or one, or none
  OutputLayout layout;
  int expert_alignment, max_tokens_per_rank, num_slots;
  std::int32_t *first_arrival, *slot_rows, *slot_first_row, *tokens_between;  // of the handle
  std::int32_t* first_row;                                                    // [num_ranks][num_slots]
  std::int32_t* counted_first_row;  // slot_first_row in pinned memory; none: the host does not wait for it
};

struct LayoutParams {
  const void* topk_idx;
  bool topk_idx_64;
  int num_tokens, num_topk, num_experts, num_ranks, num_nodes, rank;
  plan::PlacementView placement;      // on the device
  std::int32_t* counters;             // [num_ranks | num_nodes | num_experts], cleared
  std::uint8_t* is_token_in_rank;     // [num_tokens, num_ranks]
  unsigned long long* bad_selection;  // cleared; selections minus the index of the first id that names no expert
};

struct DispatchParams {
  Common common;
  Routes routes;
  plan::RowShape shape;
  OutputLayout layout;
  bool cached;
  int num_tokens, num_topk, num_slots;
  std::int64_t hidden;
  const std::byte* x;
  DType x_dtype;
  plan::Fp8Scale scale_kind;
  const std::int32_t* scales;  // the caller's
  std::int64_t scale_strides[2];
  const float* topk_weights;
  bool mask_topk_weights;
  const std::byte* side[plan::kMaxSide];
  // As receiver.
  std::uint64_t verdict, needed, there;
  std::uint64_t block_at;
  std::uint64_t room;           // bytes from there on
  std::int64_t rows, arrivals;  // -1: as notify counted them; if the room is too small for those, nothing is done
  std::int64_t max_rows;
  const std::int32_t *first_arrival, *first_row, *slot_rows, *slot_first_row;
  const std::int32_t* tokens_between;  // [num_ranks][num_ranks]
  // How the blocks share the work.
  plan::BlockRoles roles;
  int mover_warps;
  int chunks;                            // of 32 selections
  plan::Divisor lanes_of_token;          // by min(num_topk, 32)
  int pieces, piece_bytes, stage_bytes;  // of the wire row
  int code_bytes;                        // of a batch that is quantised; else 0
};

/// One step of a token's sum with what it needs, so that whoever adds reads one word of 16 bytes.
struct alignas(16) Term {
  enum Closes : std::int32_t { kRank = 1, kNode = 2 };
  std::int32_t row, rank;
  float weight;
  std::int32_t closes;  // the sums that are complete after it
};

/// Steps of a token that a thread keeps to itself: memory of its own is nearer than the GPU's.
inline constexpr int kMostLocalSteps = 32;

/// What a combine asks of a far node, in device memory.
struct Asked {
  std::int32_t rail;      // whom; -1: nobody is left there
  std::int32_t requests;  // tokens that have rows there
  std::int32_t units;     // that come back (plan::ReturnUnit)
  std::int64_t first;     // where they lie: so many units of other nodes come before
  // While they travel
  std::int32_t requests_sent;
  std::uint32_t units_here;
};

/// What came from far ranks, in device memory.
struct ForwardedRows {
  Asked* asked;  // [nodes]; null: there are no far ranks
  std::byte* x;  // rows of all units, and their weights
  float* weights;
  std::int32_t weights_of_unit;
  bool joined;  // a unit is the sum of a node
};

struct CombineParams {
  Common common;
  OutputLayout layout;
  SumOrder order;
  DType dtype;
  int num_tokens, num_topk;
  std::int64_t hidden;
  std::size_t row_bytes;
  std::int64_t num_rows;         // of ours, that homes may read
  const std::int32_t* dst_rank;  // [tokens, topk]
  // Likewise: rows in the rank's window, or among what came from its node, and rows of weights there.
  const std::int32_t *row, *weights_row;
  const std::int32_t* node_of_rank;
  const float* weights;
  const std::byte* bias[2];
  std::byte* out;
  std::uint64_t x_at, weights_at;
  float* weights_out;
  WeightsHome weights_home;
  ForwardedRows forwarded;
  plan::SumStep* steps;     // [tokens, topk], scratch; none: num_topk is at most kMostLocalSteps
  Term* terms;              // [tokens, topk]
  std::int32_t* num_terms;  // [tokens]
};

void launch_layout(const LayoutParams& params, cudaStream_t stream);
void launch_notify(const NotifyParams& params, int blocks, cudaStream_t stream);
/// `shared_limit`: bytes of shared memory that a block of this device may take for stages.
void launch_dispatch(DispatchParams params, bool quantize, int blocks, cudaStream_t stream, int shared_limit);
void launch_combine(const CombineParams& params, int blocks, cudaStream_t stream);
struct RefuseParams {
  Common common;
  char text[kRefusalBytes];
};
void launch_refuse(const RefuseParams& params, cudaStream_t stream);

/// The kernels themselves, to be loaded and configured before any of them runs.
const void* layout_kernel();
const void* notify_kernel();
const void* refuse_kernel();
const void* dispatch_kernel(bool quantize, DType dtype);
const void* combine_kernel(DType dtype, bool levels);
inline constexpr int kNotifyWarps = 16;

}  // namespace deep_ep::cuda
