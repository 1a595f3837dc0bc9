// SPDX-License-Identifier: MIT
// Combine between nodes that a network joins: two kernels that go before combine itself. The first numbers what this
// rank asks of each far node. The second asks for it, brings the rows that come into device memory, and answers those
// who ask us. For host code.
#pragma once

#include <memory>

#include "cuda/kernels.h"
#include "plan/forwarding.h"

namespace deep_ep::cuda {

class Context;
struct Call;

/// Requests that a home sends at once: the one who serves keeps so many of each home.
inline constexpr std::int64_t kMostRequests = 2048;

/// What a far home asks of us, in device memory. One batch of its requests is served at a time. One block changes all
/// but what other blocks count.
struct Serving {
  std::int32_t requests_here;  // taken out, of all batches
  std::int32_t units;          // that go back, of this batch
  std::int64_t first_unit;     // so many went back before
  unsigned long long chunks;   // of this batch: number << 32 | how many of them blocks have taken on
  std::uint32_t chunks_in_all, chunks_sent;
  std::uint32_t done;  // nothing will come, and everything is sent
};

/// A batch, in device memory: kMostRequests of them at most.
struct Batch {
  std::byte* requests;      // plan::RequestUnit, as they came
  Term* terms;              // rows one by one: of each unit; joined: [requests, num_topk]
  std::int32_t* num_terms;  // joined: of each request
  std::int32_t* dst_rank;   // [requests, num_topk], -1: none
  plan::SumStep* steps;     // scratch, where num_topk is more than kMostLocalSteps
};

/// How what crosses is laid out, in its two forms.
struct CrossingForms {
  plan::RequestUnit request[2];  // without, with factors
  plan::ReturnUnit unit[2];      // row by row, joined
};

struct ForwardCombineParams {
  CombineParams combine;            // as the kernel behind has it
  const std::int32_t* routed_rank;  // [tokens, topk], of the handle, as is the next
  const std::int32_t* routed_row;
  std::int32_t *dst_rank, *row, *weights_row;  // of `combine`, which the first kernel writes
  std::int32_t* asking;                        // [nodes, tokens]: the tokens that have rows there
  unsigned long long* units;                   // of all nodes
  int num_nodes;
  CrossingForms forms;
  Serving* servings;           // [num_ranks]
  Batch batches;               // of the first far rank that asks; those of others lie behind it
  std::int64_t most_requests;  // of a batch
};

/// One call's memory for both kernels, and their launch.
class ForwardedCombine {
 public:
  ForwardedCombine(Context& context, const CombineCall& call);
  /// Throws where what crosses fits no slot.
  void require_slots() const;
  /// Between what `combine` needs of the call and its own launch: completes it.
  void launch(CombineParams& combine, const Call& now);

 private:
  std::int64_t most_units() const;
  void place(ForwardCombineParams& params, cudaStream_t stream);

  Context& context_;
  const CombineCall& call_;
  const Handle& handle_;
  CrossingForms forms_;
  const bool joined_;
  const std::int64_t most_requests_;
  std::shared_ptr<void> memory_;
};

void launch_forward_plan(const ForwardCombineParams& params, cudaStream_t stream);
void launch_forward_combine(const ForwardCombineParams& params, int blocks, cudaStream_t stream);
const void* forward_plan_kernel();
const void* forward_combine_kernel(DType dtype);

}  // namespace deep_ep::cuda
