// SPDX-License-Identifier: MIT
#include "dlpack.h"

#include <algorithm>
#include <array>
#include <utility>

namespace deep_ep::python::dlpack {

namespace {

struct DlVersion {
  std::uint32_t major;
  std::uint32_t minor;
};
constexpr DlVersion kVersion{1, 0};

// As DlManagedTensor, since DLPack 1.0.
struct DlVersionedTensor {
  DlVersion version;
  void* context;
  void (*deleter)(DlVersionedTensor*);
  std::uint64_t flags;
  DlTensor tensor;
};

constexpr std::array kDTypes{DType::kU8,   DType::kFp8E4m3, DType::kBf16, DType::kFp16,
                             DType::kFp32, DType::kI32,     DType::kI64,  DType::kBool};

// A tensor on its way out: the struct that is passed around, and what it points to.
struct Parcel {
  DlVersionedTensor managed{};
  Tensor tensor;
};

}  // namespace

DlDataType dl_type(DType dtype) {
  switch (dtype) {
    case DType::kU8: return {1, 8, 1};
    case DType::kFp8E4m3: return {10, 8, 1};
    case DType::kBf16: return {4, 16, 1};
    case DType::kFp16: return {2, 16, 1};
    case DType::kFp32: return {2, 32, 1};
    case DType::kI32: return {0, 32, 1};
    case DType::kI64: return {0, 64, 1};
    case DType::kBool: return {6, 8, 1};
  }
  return {1, 8, 1};
}

DlTensor dl_tensor(Tensor& tensor, DlDataType dtype, Device device) {
  const DlDevice where = device == kCpu ? DlDevice{kCpuDevice, 0} : DlDevice{kCudaDevice, device};
  return {tensor.data, where, tensor.ndim, dtype, tensor.shape.data(), tensor.strides.data(), 0};
}

// The names are those of the interface's header.
struct Exchange::Table {
  DlVersion version;
  const Table* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  int (*managed_tensor_to_py_object_no_sync)(DlVersionedTensor*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, DlTensor*);
  void* current_work_stream;
};

void Exchange::find(nb::object tensor_type) {
  table_ = nullptr;
  const nb::object capsule = nb::getattr(tensor_type, "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_CheckExact(capsule.ptr()) == 0) return;
  const auto* table = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) PyErr_Clear();  // a capsule of another kind
  while (table != nullptr && table->version.major != kVersion.major) table = table->prev_api;
  if (table == nullptr || table->dltensor_from_py_object_no_sync == nullptr) return;
  table_ = table;
  type_ = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  kept_ = std::move(tensor_type);
}

bool Exchange::view(nb::handle tensor, TensorView& view, Device& device) const {
  DlTensor told{};
  if (table_->dltensor_from_py_object_no_sync(tensor.ptr(), &told) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto* dtype = std::find_if(kDTypes.begin(), kDTypes.end(), [&](DType d) { return dl_type(d) == told.dtype; });
  const bool on_cpu = told.device.type == kCpuDevice;
  if (dtype == kDTypes.end() || (!on_cpu && told.device.type != kCudaDevice) || told.ndim < 1 ||
      told.ndim > TensorView::kMaxDims || told.strides == nullptr)
    return false;
  view.data = static_cast<std::byte*>(told.data) + told.byte_offset;
  view.dtype = *dtype;
  view.ndim = told.ndim;
  std::copy_n(told.shape, told.ndim, view.shape.begin());
  std::copy_n(told.strides, told.ndim, view.strides.begin());
  device = on_cpu ? kCpu : told.device.id;
  return true;
}

nb::object Exchange::tensor(const Tensor& tensor, Device device) const {
  auto* parcel = new Parcel{{}, tensor};
  parcel->managed = {kVersion, parcel,
                     [](DlVersionedTensor* managed) { delete static_cast<Parcel*>(managed->context); }, 0,
                     dl_tensor(parcel->tensor, dl_type(tensor.dtype), device)};
  void* made = nullptr;
  // Takes the parcel over, also where it fails.
  if (table_->managed_tensor_to_py_object_no_sync(&parcel->managed, &made) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(made));
}

}  // namespace deep_ep::python::dlpack
