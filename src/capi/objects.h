// SPDX-License-Identifier: MIT
// What stands behind the opaque types of deep_ep.h, and how arguments turn from C to C++ and back.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capi/border.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/buffer.h"

struct deep_ep_group {
  std::shared_ptr<deep_ep::Bootstrap> group;
};

struct deep_ep_placement {
  std::shared_ptr<const deep_ep::Placement> placement;
};

struct deep_ep_memory_plan {
  deep_ep::MemoryPlan plan;
  std::string text;
};

struct deep_ep_buffer {
  std::unique_ptr<deep_ep::Buffer> buffer;
};

struct deep_ep_allocation {
  deep_ep::Tensor tensor;
};

struct deep_ep_handle {
  explicit deep_ep_handle(std::shared_ptr<const deep_ep::Handle> of) : handle(std::move(of)) {}
  std::shared_ptr<const deep_ep::Handle> handle;
  std::atomic<int> owners{1};
};

struct deep_ep_dispatch_result {
  explicit deep_ep_dispatch_result(deep_ep::DispatchOutput from);
  ~deep_ep_dispatch_result();
  deep_ep_dispatch_result(const deep_ep_dispatch_result&) = delete;
  deep_ep_dispatch_result& operator=(const deep_ep_dispatch_result&) = delete;

  deep_ep::DispatchOutput output;
  deep_ep_handle* handle;  // one reference is ours
};

struct deep_ep_layout_result {
  deep_ep::DispatchLayout layout;
};

struct deep_ep_combine_result {
  deep_ep::CombineOutput output;
};

struct deep_ep_dispatch_ticket {
  deep_ep::Ticket<deep_ep::DispatchOutput> ticket;
};

struct deep_ep_combine_ticket {
  deep_ep::Ticket<deep_ep::CombineOutput> ticket;
};

namespace deep_ep::capi {

DType dtype_of(deep_ep_dtype dtype, const char* name);
std::chrono::milliseconds timeout_of(std::int64_t timeout_ms);

/// NULL and ndim 0 become a view that is not given. `name` is for messages.
TensorView view_of(const deep_ep_tensor* tensor, const char* name);
void write_tensor(deep_ep_tensor* theirs, const TensorView& view);

Config config_of(const deep_ep_config* config);
/// The backend that a caller chose, and its GPU, into `options`.
void choose_backend(deep_ep_backend backend, const int* cuda_device, Options& options);
std::shared_ptr<const Placement> placement_of(const deep_ep_placement* placement);
DispatchInput input_of(const deep_ep_dispatch_input* input);
CombineInput input_of(const deep_ep_combine_input* input);

/// Threads for a call that asks for `num_workers`: so many, or where that is 0 what deep_ep_set_sm_limit() left.
int workers_of(int num_workers);

}  // namespace deep_ep::capi
