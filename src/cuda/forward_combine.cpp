// SPDX-License-Identifier: MIT
#include "cuda/forward_combine.h"

#include <algorithm>

#include "check.h"
#include "cuda/context.h"
#include "cuda/failure.h"

namespace deep_ep::cuda {

namespace {

CrossingForms forms_of(const CombineCall& call) {
  const Handle& handle = *call.in.handle;
  CrossingForms forms;
  for (const bool yes : {false, true}) {
    forms.request[yes] = plan::RequestUnit::place(handle.num_topk, yes);
    forms.unit[yes] = plan::ReturnUnit::place(call.row_bytes, handle.num_topk, call.in.topk_weights.given(),
                                              handle.layout == OutputLayout::kByRank, yes);
  }
  return forms;
}

}  // namespace

ForwardedCombine::ForwardedCombine(Context& context, const CombineCall& call)
    : context_(context),
      call_(call),
      handle_(*call.in.handle),
      forms_(forms_of(call)),
      joined_(call.in.order.round_per_node && call.hidden > 0),
      most_requests_(std::min(
          kMostRequests, plan::Chunking::of(forms_.request[false].bytes, context.link()->slot_bytes()).per_chunk)) {}

void ForwardedCombine::require_slots() const {
  const std::size_t slot = context_.link()->slot_bytes();
  for (const std::size_t bytes : {forms_.request[call_.in.weights.given()].bytes, forms_.unit[joined_].bytes})
    require(plan::Chunking::of(bytes, slot).per_chunk > 0,
            "forward_slot_bytes: a row, with what travels beside it, is {} bytes, a slot has {}", bytes, slot);
}

// Of all far nodes.
std::int64_t ForwardedCombine::most_units() const {
  const plan::Topology& nodes = context_.topology;
  const int here = nodes.node_of_rank[context_.rank];
  const int near = nodes.first_rank_of_node[here + 1] - nodes.first_rank_of_node[here];
  const int from = joined_                                   ? nodes.num_nodes - 1
                   : handle_.layout == OutputLayout::kByRank ? context_.num_ranks - near
                                                             : handle_.num_topk;
  return handle_.num_tokens * std::min(handle_.num_topk, from);
}

// Device memory of one call, kept by Context for the next. Most of it are the rows that come, as many as could: of a
// token up to min(num_topk, far ranks) rows with kByRank, up to num_topk otherwise, and one for each far node where
// they are joined. 4096 tokens with eight rows of 14336 bytes each take 448 MiB. A batch of requests takes at most
// kMostRequests * num_topk * 48 bytes, once for each rank.
void ForwardedCombine::place(ForwardCombineParams& params, cudaStream_t stream) {
  const std::int64_t topk = handle_.num_topk, selections = handle_.num_tokens * topk, units = most_units();
  const std::int64_t requests = most_requests_ * context_.num_ranks;
  const std::size_t weights_of_unit = forms_.unit[joined_].weights_of_one * (joined_ ? topk : 1);
  std::size_t end = 0;
  const auto take = [&](std::int64_t count, std::size_t bytes) {
    return plan::take(end, static_cast<std::size_t>(count) * bytes);
  };
  // What begins as zero:
  const std::size_t asked_at = take(params.num_nodes, sizeof(Asked)),
                    servings_at = take(context_.num_ranks, sizeof(Serving)),
                    units_at = take(1, sizeof(unsigned long long)), cleared = end;
  const std::size_t x_at = take(units, call_.row_bytes), weights_at = take(units, sizeof(float) * weights_of_unit),
                    rank_at = take(selections, 4), row_at = take(selections, 4), weights_row_at = take(selections, 4),
                    asking_at = take(params.num_nodes * handle_.num_tokens, 4),
                    requests_at = take(requests, forms_.request[true].bytes),
                    terms_at = take(requests * topk, sizeof(Term)), num_terms_at = take(requests, 4),
                    dst_rank_at = take(requests * topk, 4),
                    steps_at = take(topk > kMostLocalSteps ? requests * topk : 0, sizeof(plan::SumStep));
  memory_ = context_.local(end);
  auto* const base = static_cast<std::byte*>(memory_.get());
  check(cudaMemsetAsync(base, 0, cleared, stream), "cudaMemsetAsync");
  const auto words = [&](std::size_t at) { return reinterpret_cast<std::int32_t*>(base + at); };
  params.combine.forwarded = {reinterpret_cast<Asked*>(base + asked_at), base + x_at,
                              reinterpret_cast<float*>(base + weights_at), static_cast<std::int32_t>(weights_of_unit),
                              joined_};
  params.servings = reinterpret_cast<Serving*>(base + servings_at);
  params.units = reinterpret_cast<unsigned long long*>(base + units_at);
  params.dst_rank = words(rank_at), params.row = words(row_at), params.weights_row = words(weights_row_at);
  params.asking = words(asking_at);
  params.batches = {base + requests_at, reinterpret_cast<Term*>(base + terms_at), words(num_terms_at),
                    words(dst_rank_at),
                    topk > kMostLocalSteps ? reinterpret_cast<plan::SumStep*>(base + steps_at) : nullptr};
}

void ForwardedCombine::launch(CombineParams& combine, const Call& now) {
  ForwardCombineParams params{};
  params.num_nodes = context_.topology.num_nodes;
  params.forms = forms_;
  params.most_requests = most_requests_;
  params.combine = combine;
  params.routed_rank = combine.dst_rank, params.routed_row = combine.row;
  place(params, now.stream);
  params.combine.dst_rank = params.dst_rank;
  params.combine.row = params.row, params.combine.weights_row = params.weights_row;
  launch_forward_plan(params, now.stream);
  const int far_ranks = context_.num_ranks - 1;
  launch_forward_combine(params, std::min(now.blocks, far_ranks * plan::kForwardSlots), now.stream);
  combine = params.combine;
}

}  // namespace deep_ep::cuda
