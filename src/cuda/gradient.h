// SPDX-License-Identifier: MIT
// What the backward pass of a weighted combine works out row by row, on a GPU. Plain declarations: no CUDA header is
// needed to include this.
#pragma once

#include "deep_ep/tensor.h"

namespace deep_ep::cuda {

/// For each row that came: rows_out = weight * gradient, rounded once; dots = the sum of gradient * row in the order of
/// host::RowOps::dot. Rows behind them become 0. bf16, fp16 or fp32, contiguous; complete when the call returns.
struct WeighRows {
  TensorView gradient, rows;                     // [num_rows, hidden]
  TensorView weights;                            // [num_rows] fp32
  const std::int32_t* num_rows_there = nullptr;  // device memory
  TensorView rows_out, dots;                     // [num_rows, hidden]; [num_rows] fp32
};
void weigh_rows(const WeighRows& weigh);

}  // namespace deep_ep::cuda
