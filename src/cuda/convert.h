// SPDX-License-Identifier: MIT
// Copies between a caller's FP32 matrix and the rows of an exchange, on a GPU: what the short C calls do around a
// dispatch. Each call is complete when it returns. Plain declarations: no CUDA header is needed to include this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/tensor.h"

namespace deep_ep::cuda {

/// Rows of `columns` FP32 elements become rows of `width`, bf16 or fp32, with zeros behind.
struct PackRows {
  const float* from = nullptr;
  std::int64_t rows = 0, columns = 0, width = 0;
  TensorView to;  // [rows, width]
};
void pack_rows(const PackRows& pack);

/// The way back. Row r of the matrix is the (r % rows_per_source)-th that came from rank r / rows_per_source, or zero
/// where nothing came from there.
struct UnpackRows {
  TensorView from, scales;                      // bf16, fp32, or fp8 with one fp32 scale for 128 elements
  const std::int32_t* first_arrival = nullptr;  // [ranks + 1], device memory
  std::int64_t rows = 0, rows_per_source = 1, columns = 0;
  float* to = nullptr;
};
void unpack_rows(const UnpackRows& unpack);

/// Bytes between ordinary and device memory, either way.
void copy_bytes(void* to, const void* from, std::size_t bytes);

}  // namespace deep_ep::cuda
