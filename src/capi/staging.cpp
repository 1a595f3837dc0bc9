// SPDX-License-Identifier: MIT
#include "capi/staging.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "host/rows.h"
#ifdef EP_WITH_CUDA
#include "cuda/convert.h"
#endif

namespace deep_ep::capi {

namespace {

bool as_it_is(const Outgoing& out) { return out.wire == DType::kFp32 && out.width == out.columns; }

// FP32 as it is, to the last bit of a NaN.
void copy_numbers(void* to, DType to_dtype, const void* from, DType from_dtype, std::int64_t n) {
  if (n == 0) return;
  if (to_dtype == from_dtype) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * item_bytes(to_dtype));
  } else {
    host::row_ops().cast(to, to_dtype, from, from_dtype, n);
  }
}

class HostStaging final : public Staging {
 public:
  Tensor pack(const Outgoing& out) override {
    if (as_it_is(out)) return {TensorView(out.from, DType::kFp32, {out.rows, out.width}), nullptr};
    const std::size_t row_bytes = static_cast<std::size_t>(out.width) * item_bytes(out.wire);
    const std::size_t used = static_cast<std::size_t>(out.columns) * item_bytes(out.wire);
    rows_.resize(row_bytes * static_cast<std::size_t>(out.rows));
    for (std::int64_t i = 0; i < out.rows; ++i) {
      std::byte* row = rows_.data() + row_bytes * static_cast<std::size_t>(i);
      copy_numbers(row, out.wire, out.from + i * out.columns, DType::kFp32, out.columns);
      std::memset(row + used, 0, row_bytes - used);
    }
    return {TensorView(rows_.data(), out.wire, {out.rows, out.width}), nullptr};
  }
  Tensor place(const std::vector<std::int32_t>& values, std::int64_t rows, std::int64_t columns) override {
    Tensor tensor = Tensor::allocate(DType::kI32, {rows, columns});
    std::copy(values.begin(), values.end(), tensor.as<std::int32_t>());
    return tensor;
  }
  std::vector<std::int32_t> read(const TensorView& integers) override {
    return {integers.as<std::int32_t>(), integers.as<std::int32_t>() + integers.numel()};
  }
  void unpack(const Incoming& in) override {
    const auto* first = in.came.handle->first_arrival.as<std::int32_t>();
    for (std::int64_t source = 0; source < in.num_sources; ++source) {
      float* to = in.to + source * in.rows_per_source * in.columns;
      for (std::int64_t i = 0; i < in.rows_per_source; ++i, to += in.columns) {
        if (first[source] == first[source + 1]) {
          std::fill_n(to, in.columns, 0.0f);
        } else {
          unpack_row(in.came, first[source] + i, in.columns, to);
        }
      }
    }
  }

 private:
  static void unpack_row(const DispatchOutput& came, std::int64_t row, std::int64_t columns, float* to) {
    const TensorView& x = came.x;
    const std::byte* from = x.as<std::byte>() + x.strides[0] * row * static_cast<std::int64_t>(item_bytes(x.dtype));
    if (x.dtype != DType::kFp8E4m3) return copy_numbers(to, DType::kFp32, from, x.dtype, columns);
    host::DequantizeRow d;
    d.codes = reinterpret_cast<const std::uint8_t*>(from);
    d.hidden = columns;
    d.scales = came.scales.as<float>() + came.scales.strides[0] * row;
    d.scale_stride = came.scales.strides[1];
    d.dst = to;
    host::row_ops().dequantize(d);
  }

  std::vector<std::byte> rows_;  // kept, as the next call needs it again
};

#ifdef EP_WITH_CUDA

class CudaStaging final : public Staging {
 public:
  explicit CudaStaging(Buffer& buffer) : buffer_(buffer) {}

  Tensor pack(const Outgoing& out) override {
    if (as_it_is(out)) return {TensorView(out.from, DType::kFp32, {out.rows, out.width}), nullptr};
    Tensor rows = buffer_.allocate(out.wire, {out.rows, out.width});
    cuda::pack_rows({out.from, out.rows, out.columns, out.width, rows});
    return rows;
  }
  Tensor place(const std::vector<std::int32_t>& values, std::int64_t rows, std::int64_t columns) override {
    Tensor tensor = buffer_.allocate(DType::kI32, {rows, columns});
    cuda::copy_bytes(tensor.data, values.data(), tensor.bytes());
    return tensor;
  }
  std::vector<std::int32_t> read(const TensorView& integers) override {
    std::vector<std::int32_t> values(static_cast<std::size_t>(integers.numel()));
    cuda::copy_bytes(values.data(), integers.data, integers.bytes());
    return values;
  }
  void unpack(const Incoming& in) override {
    cuda::unpack_rows({in.came.x, in.came.scales, in.came.handle->first_arrival.as<std::int32_t>(),
                       in.num_sources * in.rows_per_source, in.rows_per_source, in.columns, in.to});
  }

 private:
  Buffer& buffer_;
};

#endif

}  // namespace

std::unique_ptr<Staging> host_staging() { return std::make_unique<HostStaging>(); }

std::unique_ptr<Staging> cuda_staging([[maybe_unused]] Buffer& buffer) {
#ifdef EP_WITH_CUDA
  return std::make_unique<CudaStaging>(buffer);
#else
  throw Error(ErrorCode::kUnsupported, "backend: this library was built without CUDA (DEEP_EP_CUDA=OFF)");
#endif
}

}  // namespace deep_ep::capi
