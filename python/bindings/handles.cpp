// SPDX-License-Identifier: MIT
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

#include "deep_ep/error.h"
#include "handles.h"

namespace deep_ep::python {

namespace {

// Tensors of handles that were given out. Memory that is in use again has been overwritten here by its new handle.
struct Register {
  struct Seen {
    const std::byte* end = nullptr;
    std::weak_ptr<const Handle> handle;
  };
  std::mutex mutex;
  std::map<const std::byte*, Seen> tensors;  // by first byte

  void forget_the_dead() {
    std::erase_if(tensors, [](const auto& entry) { return entry.second.handle.expired(); });
  }
};

// Never destroyed: the last tensors may go after all static objects.
Register& known_tensors() {
  static auto* known = new Register;
  return *known;
}

}  // namespace

HandlePtr handle_at(const void* data) {
  const auto* at = static_cast<const std::byte*>(data);
  Register& known = known_tensors();
  std::lock_guard lock(known.mutex);
  const auto next = known.tensors.upper_bound(at);
  if (next == known.tensors.begin()) return nullptr;
  const Register::Seen& seen = std::prev(next)->second;
  return at < seen.end ? seen.handle.lock() : nullptr;
}

Tensor tensor_of(const HandlePtr& handle, Tensor Handle::*field) {
  constexpr std::size_t kManyEntries = 1024;
  const Tensor& tensor = (*handle).*field;
  if (!tensor.given()) return {};
  const auto* first = tensor.as<const std::byte>();
  if (tensor.bytes() > 0) {
    Register& known = known_tensors();
    std::lock_guard lock(known.mutex);
    if (known.tensors.size() >= kManyEntries) known.forget_the_dead();
    const std::byte* end = first + tensor.bytes();
    known.tensors.erase(known.tensors.upper_bound(first), known.tensors.lower_bound(end));  // of handles that are gone
    known.tensors[first] = {end, handle};
  }
  return Tensor(tensor, std::shared_ptr<void>(handle, tensor.data));
}

namespace {
constexpr char kAttribute[] = "_deep_ep_handle";
}

void put_beside(nanobind::handle tensor, const HandlePtr& handle) {
  nanobind::setattr(tensor, kAttribute, nanobind::cast(std::const_pointer_cast<Handle>(handle)));
}

HandlePtr handle_beside(nanobind::handle tensor) {
  const nanobind::object found = nanobind::getattr(tensor, kAttribute, nanobind::none());
  return found.is_none() ? nullptr : nanobind::cast<std::shared_ptr<Handle>>(found);
}

Tensor copy_of(const TensorView& view) {
  if (!view.contiguous())
    throw Error(ErrorCode::kInvalidArgument, "tensor of a handle must be contiguous: " + describe(view));
  Tensor memory = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(view.bytes())});
  if (view.bytes() > 0) std::memcpy(memory.data, view.data, view.bytes());
  Tensor copy(view, memory.owner);
  copy.data = memory.data;
  return copy;
}

}  // namespace deep_ep::python
