// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

#include "deep_ep/error.h"
#include "handles.h"

namespace deep_ep::python {

namespace {

struct Register {
  // A tensor of a handle; memory that is in use again has been overwritten here by its new handle.
  struct Seen {
    const std::byte* end = nullptr;
    std::weak_ptr<const Handle> handle;
  };
  std::mutex mutex;
  std::unordered_map<const void*, HandlePtr> handles;
  std::map<const std::byte*, Seen> tensors;  // by first byte

  HandlePtr owner_of(const std::byte* data) const {
    auto next = tensors.upper_bound(data);
    if (next == tensors.begin()) return nullptr;
    const Seen& seen = std::prev(next)->second;
    return data < seen.end ? seen.handle.lock() : nullptr;
  }
  void forget_the_dead() {
    std::erase_if(tensors, [](const auto& entry) { return entry.second.handle.expired(); });
  }
};

// Never destroyed: the last tensors may go after all static objects.
Register& key_register() {
  static auto* keys = new Register;
  return *keys;
}

}  // namespace

// Lives as long as the tensor's memory; takes the handle out of the register when that goes.
struct KeyTensor::Entry {
  Tensor memory;
  ~Entry() {
    HandlePtr last;  // dropped after the lock: a handle's memory may take other locks
    std::lock_guard lock(key_register().mutex);
    if (const auto found = key_register().handles.find(memory.data); found != key_register().handles.end()) {
      last = std::move(found->second);
      key_register().handles.erase(found);
    }
  }
};

KeyTensor::KeyTensor(DType dtype, std::initializer_list<std::int64_t> shape) : entry_(std::make_shared<Entry>()) {
  entry_->memory = Tensor::allocate(dtype, shape);
  tensor_ = Tensor(entry_->memory, entry_);
}

void KeyTensor::set(HandlePtr handle) const {
  std::lock_guard lock(key_register().mutex);
  key_register().handles[tensor_.data] = std::move(handle);
}

HandlePtr handle_at(const void* data) {
  std::lock_guard lock(key_register().mutex);
  const auto found = key_register().handles.find(data);
  return found != key_register().handles.end() ? found->second
                                               : key_register().owner_of(static_cast<const std::byte*>(data));
}

Tensor tensor_of(const HandlePtr& handle, Tensor Handle::*field) {
  constexpr std::size_t kManyEntries = 1024;
  const Tensor& tensor = (*handle).*field;
  if (!tensor.given()) return {};
  const auto* first = tensor.as<const std::byte>();
  if (tensor.bytes() > 0) {
    Register& known = key_register();
    std::lock_guard lock(known.mutex);
    if (known.tensors.size() >= kManyEntries) known.forget_the_dead();
    const std::byte* end = first + tensor.bytes();
    known.tensors.erase(known.tensors.upper_bound(first), known.tensors.lower_bound(end));  // of handles that are gone
    known.tensors[first] = {end, handle};
  }
  return Tensor(tensor, std::shared_ptr<void>(handle, tensor.data));
}

Tensor filled(std::initializer_list<std::int64_t> shape, std::int32_t value) {
  Tensor tensor = Tensor::allocate(DType::kI32, shape);
  std::fill_n(tensor.as<std::int32_t>(), tensor.numel(), value);
  return tensor;
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
