// SPDX-License-Identifier: MIT
#include "torch_tensor.h"

#include <array>
#include <string>
#include <unordered_map>

#include "deep_ep/error.h"
#include "dlpack.h"

namespace deep_ep::python {

namespace {

constexpr char kCapsuleName[] = "dltensor";

// A tensor on its way out: the struct that DLPack passes around, and what it points to.
struct Parcel {
  dlpack::DlManagedTensor managed{};
  Tensor tensor;
};

// FP8 and bool leave as bytes, because old versions of torch do not read them from a capsule; they are viewed
// afterwards.
bool leaves_as_bytes(DType dtype) { return dtype == DType::kFp8E4m3 || dtype == DType::kBool; }

struct TorchFace {
  dlpack::Exchange exchange;  // knows nothing in a torch before 2.10: then the rest does the work
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
  auto* managed = static_cast<dlpack::DlManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  managed->deleter(managed);
}

// As str() says it. (nb::str of an attribute itself would take it for a string.)
std::string text_of(const nb::object& object) { return nb::str(object).c_str(); }

[[noreturn]] void throw_elsewhere(nb::handle tensor, const char* what, Device device) {
  const std::string wanted = device == kCpu ? "the CPU" : "cuda:" + std::to_string(device);
  throw Error(ErrorCode::kUnsupported, std::string(what) + " is on " + text_of(tensor.attr("device")) +
                                           ", where this call's tensors must be on " + wanted);
}

void* data_by_attribute(nb::handle tensor) {
  return reinterpret_cast<void*>(nb::cast<std::uintptr_t>(tensor.attr("data_ptr")()));
}

std::int64_t item(const nb::object& tuple, int i) {
  return nb::cast<std::int64_t>(nb::borrow(PyTuple_GetItem(tuple.ptr(), i)));
}

}  // namespace

void use_torch(nb::object from_dlpack, nb::dict dtypes, nb::object tensor_type) {
  TorchFace& face = torch_face();
  face.exchange.find(std::move(tensor_type));
  face.from_dlpack = std::move(from_dlpack);
  face.dtype_of.clear();
  for (auto [dtype, code] : dtypes) {
    const int index = nb::cast<int>(code);
    face.dtype_of[dtype.ptr()] = static_cast<DType>(index);
    face.dtypes.at(index) = nb::borrow(dtype);
  }
}

Device device_of(nb::handle tensor, const char* what) {
  if (!nb::hasattr(tensor, "is_cpu"))
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + " must be a tensor: it is " + text_of(tensor.type().attr("__name__")));
  if (nb::cast<bool>(tensor.attr("is_cpu"))) return kCpu;
  if (nb::cast<bool>(tensor.attr("is_cuda"))) return nb::cast<int>(tensor.attr("get_device")());
  throw Error(ErrorCode::kUnsupported,
              std::string(what) + " is on " + text_of(tensor.attr("device")) + ": CPU and CUDA are supported");
}

namespace {

// Of any tensor, subclasses and versions of torch without an exchange included; or says what is wrong with it.
TensorView by_attributes(nb::handle tensor, const char* what, Device& device) {
  device = device_of(tensor, what);
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
  TensorView view;
  view.data = data_by_attribute(tensor);
  view.dtype = found->second;
  view.ndim = ndim;
  for (int i = 0; i < ndim; ++i) {
    view.shape[i] = item(shape, i);
    view.strides[i] = item(strides, i);
  }
  return view;
}

}  // namespace

TensorView view_of(nb::handle tensor, const char* what, Device device) {
  TensorView view;
  if (tensor.is_none()) return view;
  const TorchFace& face = torch_face();
  Device where = kCpu;
  if (!face.exchange.knows(tensor) || !face.exchange.view(tensor, view, where))
    view = by_attributes(tensor, what, where);
  if (where != device) throw_elsewhere(tensor, what, device);
  return view;
}

const void* data_of(nb::handle tensor, const char* what) {
  const TorchFace& face = torch_face();
  TensorView view;
  Device device = kCpu;
  if (face.exchange.knows(tensor) && face.exchange.view(tensor, view, device)) return view.data;
  device_of(tensor, what);
  return data_by_attribute(tensor);
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
  const TorchFace& face = torch_face();
  if (face.exchange.makes_tensors()) return face.exchange.tensor(tensor, device);
  auto* parcel = new Parcel{{}, tensor};
  const DType sent = leaves_as_bytes(tensor.dtype) ? DType::kU8 : tensor.dtype;
  parcel->managed = {dlpack::dl_tensor(parcel->tensor, dlpack::dl_type(sent), device), parcel,
                     [](dlpack::DlManagedTensor* managed) { delete static_cast<Parcel*>(managed->context); }};
  const nb::object capsule = nb::steal(PyCapsule_New(&parcel->managed, kCapsuleName, forget_capsule));
  nb::object made = face.from_dlpack(capsule);
  return leaves_as_bytes(tensor.dtype) ? made.attr("view")(face.dtypes.at(static_cast<int>(tensor.dtype))) : made;
}

}  // namespace deep_ep::python
