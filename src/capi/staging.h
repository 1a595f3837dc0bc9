// SPDX-License-Identifier: MIT
// What the short calls do with a caller's FP32 rows around a dispatch: in ordinary memory, or on a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "deep_ep/buffer.h"

namespace deep_ep::capi {

/// A caller's matrix, and the rows it travels in: of `width` elements, bf16 or fp32, zeros behind the columns.
struct Outgoing {
  const float* from = nullptr;
  std::int64_t rows = 0, columns = 0, width = 0;
  DType wire = DType::kFp32;
};

/// What came, and the matrix that it becomes: `rows_per_source` rows from each rank in turn, zeros from a rank that
/// sent nothing.
struct Incoming {
  const DispatchOutput& came;
  std::int64_t num_sources = 0, rows_per_source = 1, columns = 0;
  float* to = nullptr;
};

class Staging {
 public:
  virtual ~Staging() = default;
  /// The rows to send: the caller's memory itself where it will do.
  virtual Tensor pack(const Outgoing& out) = 0;
  /// A small table of integers, where the buffer can read it.
  virtual Tensor place(const std::vector<std::int32_t>& values, std::int64_t rows, std::int64_t columns) = 0;
  virtual std::vector<std::int32_t> read(const TensorView& integers) = 0;
  virtual void unpack(const Incoming& in) = 0;
};

std::unique_ptr<Staging> host_staging();
/// For a CUDA buffer: memory comes from its arena. Throws kUnsupported where the library was built without CUDA.
std::unique_ptr<Staging> cuda_staging(Buffer& buffer);

}  // namespace deep_ep::capi
