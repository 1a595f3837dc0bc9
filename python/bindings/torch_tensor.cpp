// SPDX-License-Identifier: MIT
#include "torch_tensor.h"

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>

#include "deep_ep/error.h"

namespace deep_ep::python {

namespace {

// DLPack's binary interface: plain structs that every array library agrees on.
struct DlDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DlDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
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
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

constexpr char kCapsuleName[] = "dltensor";
constexpr std::int32_t kDlCpu = 1;
constexpr std::int32_t kDlCuda = 2;

// A tensor on its way out: the struct that DLPack passes around, and what it points to.
struct Parcel {
  DlManagedTensor managed{};
  Tensor tensor;
};

// FP8 and bool leave as bytes, because old versions of torch do not read them from DLPack; they are viewed afterwards.
DlDataType dl_type(DType dtype) {
  switch (dtype) {
    case DType::kU8:
    case DType::kFp8E4m3:
    case DType::kBool: return {1, 8, 1};
    case DType::kBf16: return {4, 16, 1};
    case DType::kFp16: return {2, 16, 1};
    case DType::kFp32: return {2, 32, 1};
    case DType::kI32: return {0, 32, 1};
    case DType::kI64: return {0, 64, 1};
  }
  return {1, 8, 1};
}

struct TorchFace {
  nb::object from_dlpack;
  std::unordered_map<PyObject*, DType> dtype_of;  // dtype objects live as long as the process
  std::array<nb::object, 8> dtypes;
};

// Never destroyed: tensors may be made until the interpreter is gone, and its objects must not be released after it.
TorchFace& torch_face() {
  static auto* face = new TorchFace;
  return *face;
}

void forget_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;  // taken: its new owner deletes it
  auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  managed->deleter(managed);
}

// As str() says it. (nb::str of an attribute itself would take it for a string.)
std::string text_of(const nb::object& object) { return nb::str(object).c_str(); }

[[noreturn]] void throw_elsewhere(nb::handle tensor, const char* what, Device device) {
  const std::string wanted = device == kCpu ? "the CPU" : "cuda:" + std::to_string(device);
  throw Error(ErrorCode::kUnsupported, std::string(what) + " is on " + text_of(tensor.attr("device")) +
                                           ", where this call's tensors must be on " + wanted);
}

std::int64_t item(const nb::object& tuple, int i) {
  return nb::cast<std::int64_t>(nb::borrow(PyTuple_GetItem(tuple.ptr(), i)));
}

}  // namespace

void use_torch(nb::object from_dlpack, nb::dict dtypes) {
  TorchFace& face = torch_face();
  face.from_dlpack = std::move(from_dlpack);
  face.dtype_of.clear();
  for (auto [dtype, code] : dtypes) {
    const int index = nb::cast<int>(code);
    face.dtype_of[dtype.ptr()] = static_cast<DType>(index);
    face.dtypes.at(index) = nb::borrow(dtype);
  }
}

Device device_of(nb::handle tensor, const char* what) {
  if (nb::cast<bool>(tensor.attr("is_cpu"))) return kCpu;
  if (nb::cast<bool>(tensor.attr("is_cuda"))) return nb::cast<int>(tensor.attr("get_device")());
  throw Error(ErrorCode::kUnsupported,
              std::string(what) + " is on " + text_of(tensor.attr("device")) + ": CPU and CUDA are supported");
}

TensorView view_of(nb::handle tensor, const char* what, Device device) {
  TensorView view;
  if (tensor.is_none()) return view;
  if (device_of(tensor, what) != device) throw_elsewhere(tensor, what, device);
  const auto& known = torch_face().dtype_of;
  const nb::object dtype = tensor.attr("dtype");
  const auto found = known.find(dtype.ptr());
  if (found == known.end())
    throw Error(ErrorCode::kUnsupported, std::string(what) + " has dtype " + text_of(dtype) +
                                             ", supported are uint8, float8_e4m3fn, bfloat16, float16, float32, int32, "
                                             "int64, bool");
  const nb::object shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  const auto ndim = static_cast<int>(nb::len(shape));
  if (ndim < 1 || ndim > TensorView::kMaxDims)
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + " must have 1 to 3 dimensions: it has " + std::to_string(ndim));
  view.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
  view.dtype = found->second;
  view.ndim = ndim;
  for (int i = 0; i < ndim; ++i) {
    view.shape[i] = item(shape, i);
    view.strides[i] = item(strides, i);
  }
  return view;
}

Tensor hold(nb::handle tensor, const char* what) {
  if (tensor.is_none()) return {};
  const TensorView view = view_of(tensor, what, device_of(tensor, what));
  // Whoever drops the view last may not hold the interpreter's lock.
  return Tensor(view, std::shared_ptr<void>(new nb::object(nb::borrow(tensor)), [](void* kept) {
                  if (!nb::is_alive()) return;
                  nb::gil_scoped_acquire lock;
                  delete static_cast<nb::object*>(kept);
                }));
}

nb::object to_torch(const Tensor& tensor, Device device) {
  if (!tensor.given()) return nb::none();
  auto* parcel = new Parcel{{}, tensor};
  parcel->managed.tensor = {parcel->tensor.data,
                            device == kCpu ? DlDevice{kDlCpu, 0} : DlDevice{kDlCuda, device},
                            parcel->tensor.ndim,
                            dl_type(tensor.dtype),
                            parcel->tensor.shape.data(),
                            parcel->tensor.strides.data(),
                            0};
  parcel->managed.context = parcel;
  parcel->managed.deleter = [](DlManagedTensor* managed) { delete static_cast<Parcel*>(managed->context); };
  const nb::object capsule = nb::steal(PyCapsule_New(&parcel->managed, kCapsuleName, forget_capsule));
  nb::object made = torch_face().from_dlpack(capsule);
  if (tensor.dtype == DType::kFp8E4m3 || tensor.dtype == DType::kBool)
    made = made.attr("view")(torch_face().dtypes.at(static_cast<int>(tensor.dtype)));
  return made;
}

}  // namespace deep_ep::python
