// SPDX-License-Identifier: MIT
// Low-latency combine: its instances for rows as they are, and the launch of any.
#include "cuda/low_latency_combine_kernel.cuh"

namespace deep_ep::cuda {

namespace {

template <class Number>
const void* kernel_of(bool levels, bool lines) {
  return lines ? low_latency_combine_instance<Number, Lines>(levels)
               : low_latency_combine_instance<Number, AsIs>(levels);
}

}  // namespace

const void* low_latency_combine_kernel(DType dtype, bool levels, bool lines) {
  if (dtype == DType::kBf16) return kernel_of<Bf16>(levels, lines);
  if (dtype == DType::kFp16) return kernel_of<Fp16>(levels, lines);
  return kernel_of<Fp32>(levels, lines);
}

void launch_low_latency_combine(const Params& params, int blocks, cudaStream_t stream) {
  // Rows that are rounded sums of a rank already have one level less.
  const bool levels = (params.order.round_per_rank && !params.pre_reduce) || params.order.round_per_node;
  const void* kernel = params.wire == WireFormat::kAsIs
                           ? low_latency_combine_kernel(params.dtype, levels, params.by_lines)
                           : low_latency_combine_encoded_kernel(params.dtype, levels, params.wire);
  Params copy = params;
  void* arguments[] = {&copy};
  const std::size_t shared = sizeof(Peer) * params.common.num_ranks + 4 * (params.common.num_ranks + 1);
  launch_low_latency(kernel, blocks, arguments, shared, stream);
}

}  // namespace deep_ep::cuda
