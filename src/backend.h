// SPDX-License-Identifier: MIT
// What a backend is: the calls of Buffer, checked and completed, and the interface that host and CUDA implement.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "deep_ep/buffer.h"
#include "plan/fp8.h"
#include "plan/output.h"
#include "plan/topology.h"

namespace deep_ep {

/// What ranks must have in common in one operation. It travels with the counts, so that ranks whose calls differ learn
/// it at once instead of writing past each other's rows.
struct Signature {
  enum Field : int {
    kOperation,
    kLayout,
    kRowDType,
    kRowBytes,
    kTopk,
    kExperts,
    kPlacement,
    kAlignment,
    kMaxTokens,
    kTopkIdxBytes,
    kTopkWeights,
    kScales,
    kScaleDType,
    kScaleOrder,
    kSideBytes,
    kCached,
    kPreReduced,  // 1: rows are added, 2: weighed and added before they come home
    kWireFormat,
    kNumFields
  };
  std::array<std::int64_t, kNumFields> fields{};

  /// Throws kInvalidArgument naming the first field in which `theirs` differs, and both ranks' values.
  void require_same(const Signature& theirs, int my_rank, int their_rank) const;
};

/// A checked dispatch, with what follows from its arguments.
struct DispatchCall {
  Operation operation = Operation::kDispatch;
  DispatchInput in;
  std::shared_ptr<const Placement> placement;  // never null
  OutputLayout layout = OutputLayout::kByRank;
  int expert_alignment = 1;
  int max_tokens_per_rank = 0;
  int num_experts = 0;
  int num_topk = 0;
  int num_tokens = 0;
  std::int64_t hidden = 0;
  DType wire_dtype = DType::kBf16;  // of received rows
  DType scale_dtype = DType::kFp32;
  bool quantize = false;
  plan::Fp8Scale scale_kind = plan::Fp8Scale::kExact;
  plan::RowShape shape;
  Signature signature;
  std::chrono::milliseconds timeout{0};
  int num_workers = 0;  // 0: all
};

/// A checked combine.
struct CombineCall {
  Operation operation = Operation::kCombine;
  CombineInput in;
  std::int64_t hidden = 0;  // 0: only weights travel
  DType dtype = DType::kBf16;
  std::size_t row_bytes = 0;
  std::size_t wire_bytes = 0;  // of a row as it crosses: row_bytes, or less in a wire format
  Signature signature;
  std::chrono::milliseconds timeout{0};
  int num_workers = 0;
};

/// A checked question about a layout.
struct LayoutCall {
  TensorView topk_idx;
  int num_experts = 0;
  std::shared_ptr<const Placement> placement;  // never null
  Stream stream = nullptr;
};

/// Moves the bytes of one rank. Calls come as Buffer's do: collective, one thread at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual DispatchOutput dispatch(const DispatchCall& call) = 0;
  virtual CombineOutput combine(const CombineCall& call) = 0;
  virtual Ticket<DispatchOutput> low_latency_dispatch(const DispatchCall& call) = 0;
  virtual Ticket<CombineOutput> low_latency_combine(const CombineCall& call) = 0;

  /// This rank's arguments were wrong: tells the peers, whose same operation then fails with this text, and stays in
  /// step.
  virtual void refuse(Operation operation, const std::string& why) = 0;

  virtual DispatchLayout dispatch_layout(const LayoutCall& call) = 0;
  virtual Tensor allocate(const TensorView& shape) = 0;
  virtual std::shared_ptr<void> lend(std::vector<std::shared_ptr<void>> owners, Stream user) = 0;
  virtual void set_masked(int rank, bool masked) = 0;
  virtual bool masked(int rank) const = 0;
  /// Raises what enqueued calls found out late.
  virtual void check() {}
  /// What was found out while opening, for logs; one line each.
  virtual std::string describe() const { return ""; }
  virtual Statistics statistics() const = 0;
  virtual void reset_statistics() = 0;
};

/// The views of a dispatch's outputs inside one block.
struct OutputTensors {
  const DispatchCall& call;
  const plan::OutputBlock& at;
  std::int64_t num_rows;
  std::int64_t num_arrivals;
  int num_slots;
  int num_ranks;

  DispatchOutput make(std::byte* block, const std::shared_ptr<void>& owner) const;
};

/// A handle with the fields that follow from the call.
Handle handle_for(const DispatchCall& call, int num_ranks);

/// What every backend needs to open.
struct BackendInput {
  std::shared_ptr<Bootstrap> group;
  Config config;  // its network with what the environment adds
  Options options;
  plan::Topology topology;
};

namespace host {
std::unique_ptr<Backend> open_backend(const BackendInput& input);
}
namespace cuda {
// Only in a library that was built with CUDA (EP_WITH_CUDA).

/// Throws where this process cannot use the GPU that `options` names.
void require_device(const Options& options);
std::unique_ptr<Backend> open_backend(const BackendInput& input);
}  // namespace cuda

}  // namespace deep_ep
