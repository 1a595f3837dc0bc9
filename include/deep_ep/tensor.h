// SPDX-License-Identifier: MIT
// Pointers with a shape: TensorView borrows memory, Tensor keeps it alive.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

namespace deep_ep {

/// A CUDA stream (cudaStream_t) without CUDA's headers; null: the buffer's own.
using Stream = void*;

enum class DType : std::uint8_t {
  kU8,       // opaque bytes
  kFp8E4m3,  // OCP FP8 E4M3 "fn": largest 448, no infinity, NaN 0x7f
  kBf16,
  kFp16,
  kFp32,
  kI32,
  kI64,
  kBool,  // one byte, 0 or 1
};

constexpr std::size_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::kU8:
    case DType::kFp8E4m3:
    case DType::kBool: return 1;
    case DType::kBf16:
    case DType::kFp16: return 2;
    case DType::kFp32:
    case DType::kI32: return 4;
    case DType::kI64: return 8;
  }
  return 0;
}

/// "u8", "fp8_e4m3", "bf16", ...: as error messages print it.
const char* name(DType dtype) noexcept;

/// A borrowed array of up to three dimensions. Strides count elements. A default-made view stands for "not given".
struct TensorView {
  static constexpr int kMaxDims = 3;

  void* data = nullptr;
  DType dtype = DType::kU8;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};

  TensorView() = default;
  /// A contiguous array, last dimension fastest.
  TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> shape);
  /// The same over memory that the library will only read.
  TensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape)
      : TensorView(const_cast<void*>(data), dtype, shape) {}

  /// False only for "not given": an array of zero rows is given even where its pointer is null.
  bool given() const { return ndim > 0; }
  std::int64_t size(int dim) const { return dim < ndim ? shape[dim] : 1; }
  std::int64_t numel() const;
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * item_bytes(dtype); }
  bool contiguous() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// A view that keeps its memory alive. Copies share the memory; the last one gives it back, on any thread.
struct Tensor : TensorView {
  std::shared_ptr<void> owner;

  Tensor() = default;
  Tensor(const TensorView& view, std::shared_ptr<void> owner) : TensorView(view), owner(std::move(owner)) {}
  /// Ordinary memory, uninitialised.
  static Tensor allocate(DType dtype, std::initializer_list<std::int64_t> shape);
};

/// "bf16[4096, 7168]", for messages.
std::string describe(const TensorView& view);

}  // namespace deep_ep
