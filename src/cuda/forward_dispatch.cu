// SPDX-License-Identifier: MIT
// The last kernel of a dispatch between nodes. The one before it has written the rows of our own node, and the final
// rows of every selection. Each block packs chunks for far nodes and delivers chunks that come from there, in turns and
// without ever waiting for one of the two: a rank that only packed, or only delivered, could wait for one that waits
// for it. Phases: await replies, pack and deliver, receive.
#include "cuda/dispatch_receive.cuh"
#include "cuda/forward_deliver.cuh"
#include "cuda/forward_pack.cuh"

namespace deep_ep::cuda {

namespace {

// Thread 0: whom this block still waits for; -1: nobody.
template <Rows kRows>
__device__ int awaited(const ForwardDispatchParams& f, const Packer<kRows>& packer, const Deliverer& deliverer) {
  if (!packer.done()) return packer.rail();
  for (int source = 0; source < f.dispatch.common.num_ranks; ++source)
    if (!deliverer.done_with(source)) return source;
  return -1;
}

// Phase pack and deliver.
template <Rows kRows>
__device__ void exchange(const Now& now, const ForwardDispatchParams& f, const Nodes& nodes, const Destination* to,
                         Packing& packing) {
  __shared__ int waits_for;
  Packer<kRows> packer(now, f, nodes, packing);
  Deliverer deliverer(now, f, nodes, to);
  for (int looks = 1;; ++looks) {
    bool moved = !packer.done() && packer.pack_chunk();
    moved = deliverer.deliver_chunk() || moved;
    if (moved) continue;
    if (threadIdx.x == 0) {
      waits_for = awaited(f, packer, deliverer);
      if (waits_for >= 0 && has_failed(now)) waits_for = -1;  // another block has said why
      if (waits_for >= 0 && is_over(now, looks)) {
        report(now, Fault::kTimeout, waits_for, 1, 0);
        waits_for = -1;
      }
    }
    __syncthreads();
    const bool over = waits_for < 0;
    __syncthreads();
    if (over) return;
  }
}

// The last block: nothing is left of what was counted.
__device__ void clear_counts(const Common& common) {
  for (int source = static_cast<int>(threadIdx.x); source < common.num_ranks; source += kForwardThreads)
    common.far.passed_on[source] = {};
}

}  // namespace

template <Rows kRows>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_dispatch(const __grid_constant__ ForwardDispatchParams f) {
  extern __shared__ __align__(16) std::byte shared[];
  __shared__ Packing packing;
  const DispatchParams& p = f.dispatch;
  const Now now(p.common, Now::Kernel::kLater);
  auto* const to = reinterpret_cast<Destination*>(shared);
  const Incoming incoming(p);
  bool good = __syncthreads_and(!has_failed(now));
  // As in the kernel before, which has done nothing either.
  if (good && p.rows < 0 &&
      plan::OutputBlock::place(p.shape, p.layout, incoming.rows, incoming.arrivals).total_bytes > p.room)
    return;
  for (int dst = static_cast<int>(threadIdx.x); good && dst < p.common.num_ranks; dst += kForwardThreads)
    good = await_reply(now, p, dst, to[dst]);
  if (__syncthreads_and(good)) exchange<kRows>(now, f, {p.common, f.node_of_rank}, to, packing);
  if (!last_block(now)) return;
  clear_counts(p.common);
  receive(now, p, to);
  finish(now);
}

namespace {

const void* kernel_of(bool quantize, DType dtype) {
  return for_rows(quantize, dtype,
                  [](auto rows) { return reinterpret_cast<const void*>(&forward_dispatch<decltype(rows)::value>); });
}

}  // namespace

void launch_forward_dispatch(const ForwardDispatchParams& params, int blocks, cudaStream_t stream) {
  ForwardDispatchParams copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(kernel_of(params.quantize, params.dispatch.x_dtype), dim3(static_cast<unsigned>(blocks)),
                   dim3(kForwardThreads), arguments, sizeof(Destination) * params.dispatch.common.num_ranks, stream);
}

const void* forward_dispatch_kernel(bool quantize, DType dtype) { return kernel_of(quantize, dtype); }

}  // namespace deep_ep::cuda
