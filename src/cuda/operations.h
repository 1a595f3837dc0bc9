// SPDX-License-Identifier: MIT
// The operations of the CUDA backend: each enqueues its kernels on the call's stream.
#pragma once

#include "backend.h"
#include "cuda/context.h"

namespace deep_ep::cuda {

DispatchOutput dispatch(Context& context, const DispatchCall& call);
DispatchLayout dispatch_layout(Context& context, const LayoutCall& call);
CombineOutput combine(Context& context, const CombineCall& call);
Ticket<DispatchOutput> low_latency_dispatch(const std::shared_ptr<Context>& context, const DispatchCall& call);
Ticket<CombineOutput> low_latency_combine(const std::shared_ptr<Context>& context, const CombineCall& call);

}  // namespace deep_ep::cuda
