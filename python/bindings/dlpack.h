// SPDX-License-Identifier: MIT
// DLPack's binary interface, plain structs that every array library agrees on, and torch's way to exchange them in one
// call without Python in between (from torch 2.10 on).
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "torch_tensor.h"

namespace deep_ep::python::dlpack {

inline constexpr std::int32_t kCpuDevice = 1;
inline constexpr std::int32_t kCudaDevice = 2;

struct DlDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DlDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;

  bool operator==(const DlDataType&) const = default;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

/// What a capsule holds that any version of torch takes.
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

/// DLPack's type of the same name.
DlDataType dl_type(DType dtype);

/// Those fields of a view, which must outlive it.
DlTensor dl_tensor(Tensor& tensor, DlDataType dtype, Device device);

/// torch's table of functions for objects of one type.
class Exchange {
 public:
  /// The table that the type offers. Without one, or with one of another major version, it knows no tensor.
  void find(nb::object tensor_type);

  bool makes_tensors() const { return table_ != nullptr; }
  /// Whether the object is of exactly that type: a subclass may mean something else by its memory.
  bool knows(nb::handle object) const { return table_ != nullptr && Py_TYPE(object.ptr()) == type_; }

  /// Borrows a tensor that knows() has named. False, and no error, where it cannot be described.
  bool view(nb::handle tensor, TensorView& view, Device& device) const;
  /// A tensor over the same memory, which it keeps alive.
  nb::object tensor(const Tensor& tensor, Device device) const;

 private:
  struct Table;
  const Table* table_ = nullptr;
  PyTypeObject* type_ = nullptr;
  nb::object kept_;
};

}  // namespace deep_ep::python::dlpack
