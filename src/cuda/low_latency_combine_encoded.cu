// SPDX-License-Identifier: MIT
// Low-latency combine: its instances for rows that cross in a wire format.
#include "cuda/low_latency_combine_kernel.cuh"

namespace deep_ep::cuda {

namespace {

template <class Number>
const void* kernel_of(bool levels, WireFormat wire) {
  return wire == WireFormat::kFp8 ? low_latency_combine_instance<Number, Fp8>(levels)
                                  : low_latency_combine_instance<Number, LogFmt>(levels);
}

}  // namespace

const void* low_latency_combine_encoded_kernel(DType dtype, bool levels, WireFormat wire) {
  return dtype == DType::kFp16 ? kernel_of<Fp16>(levels, wire) : kernel_of<Bf16>(levels, wire);
}

}  // namespace deep_ep::cuda
