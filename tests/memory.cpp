// SPDX-License-Identifier: MIT
// Which backend is tested, and copies between ordinary memory and its own.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "device.h"

namespace deep_ep::test {

Backend backend_under_test() {
  static const Backend backend = [] {
    const char* wanted = std::getenv("EP_TEST_BACKEND");
    if (wanted == nullptr || std::string(wanted) == "host") return Backend::kHost;
    if (std::string(wanted) == "cuda") return Backend::kCuda;
    throw std::runtime_error(std::string("EP_TEST_BACKEND is '") + wanted + "', but must be host or cuda");
  }();
  return backend;
}

std::string name(Backend backend) {
  switch (backend) {
    case Backend::kHost: return "host";
    case Backend::kCuda: return "cuda";
  }
  return "?";
}

namespace {

// From the first element to the last, holes between strides included.
std::size_t extent(const TensorView& tensor) {
  if (tensor.numel() == 0) return 0;
  std::int64_t last = 0;
  for (int d = 0; d < tensor.ndim; ++d) last += (tensor.shape[d] - 1) * tensor.strides[d];
  return static_cast<std::size_t>(last + 1) * item_bytes(tensor.dtype);
}

}  // namespace

std::string obstacle() { return on_cuda() ? device::obstacle() : ""; }

Tensor to_host(const TensorView& tensor) {
  if (!on_cuda() || !device::holds(tensor.data)) return Tensor(tensor, nullptr);
  const std::size_t bytes = extent(tensor);
  Tensor copied = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(bytes)});
  if (bytes > 0) device::copy(copied.data, tensor.data, bytes);
  TensorView view = tensor;
  view.data = copied.data;
  return Tensor(view, copied.owner);
}

Tensor to_host(const Tensor& tensor) {
  Tensor there = to_host(static_cast<const TensorView&>(tensor));
  if (!there.owner) there.owner = tensor.owner;
  return there;
}

Tensor to_backend(const TensorView& tensor) {
  if (!on_cuda() || !tensor.given() || device::holds(tensor.data)) return Tensor(tensor, nullptr);
  const std::size_t bytes = tensor.data != nullptr ? extent(tensor) : 0;
  auto memory = device::allocate(bytes);
  if (bytes > 0) device::copy(memory.get(), tensor.data, bytes);
  TensorView view = tensor;
  view.data = memory.get();
  return Tensor(view, std::move(memory));
}

void overwrite(const TensorView& tensor, const void* bytes) {
  if (tensor.bytes() == 0) return;
  if (on_cuda()) {
    device::copy(tensor.data, bytes, tensor.bytes());
  } else {
    std::memcpy(tensor.data, bytes, tensor.bytes());
  }
}

bool has_room_to_spare(const Handle& handle) { return handle.low_latency && handle.cuda_device >= 0; }

namespace {
std::int64_t last_of(const Tensor& ints) {
  const Tensor here = to_host(ints);
  return here.as<std::int32_t>()[here.numel() - 1];
}
}  // namespace

std::int64_t arrivals_that_came(const Handle& handle) { return last_of(handle.first_arrival); }

std::int64_t rows_that_came(const Handle& handle) {
  return handle.layout == OutputLayout::kByRank ? arrivals_that_came(handle) : last_of(handle.slot_first_row);
}

Handle to_host(const Handle& handle) {
  Handle there = handle;
  for (Tensor* tensor : {&there.dst_rank, &there.dst_row, &there.dst_arrival, &there.first_arrival, &there.src_token,
                         &there.arrival_row, &there.slot_rows, &there.slot_first_row, &there.tokens_between,
                         &there.arrival_weights, &there.row_token, &there.source_range})
    *tensor = to_host(*tensor);
  return there;
}

DispatchOutput to_host(const DispatchOutput& output) {
  DispatchOutput there = output;
  for (Tensor* tensor : {&there.x, &there.scales, &there.topk_idx, &there.topk_weights}) *tensor = to_host(*tensor);
  for (Tensor& side : there.side) side = to_host(side);
  if (there.handle) there.handle = std::make_shared<const Handle>(to_host(*there.handle));
  return there;
}

CombineOutput to_host(const CombineOutput& output) { return {to_host(output.x), to_host(output.topk_weights)}; }

}  // namespace deep_ep::test
