// SPDX-License-Identifier: MIT
// The arguments of the kernel that sends a dispatch to far nodes, and passes on what comes from there, for host code.
#pragma once

#include "cuda/kernels.h"
#include "plan/forwarding.h"

namespace deep_ep::cuda {

struct ForwardDispatchParams {
  DispatchParams dispatch;  // as the kernel before had it
  bool quantize;
  plan::TokenUnit unit;
  plan::Chunking chunking;
  const std::int32_t* node_of_rank;
  int num_nodes;
  int packers;  // blocks that pack: each a run of the tokens, as a stream of its own to every far node
};

void launch_forward_dispatch(const ForwardDispatchParams& params, int blocks, cudaStream_t stream);
const void* forward_dispatch_kernel(bool quantize, DType dtype);

}  // namespace deep_ep::cuda
