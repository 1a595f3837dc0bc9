// SPDX-License-Identifier: MIT
// SwiGLU with a blocked matrix product whose order of additions does not depend on the blocking.
#include "expert.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moe {
namespace {

// Four FP32 lanes: what every x86-64 and ARMv8 machine has. The lanes are different output channels, so they never meet
// in a sum, and a machine with wider ones would give the same bits.
using Lanes [[gnu::vector_size(16)]] = float;
constexpr int kLanes = 4;
constexpr int kColumnsAtOnce = 2 * kLanes;

Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

/// Columns first .. first + kColumnsAtOnce - 1 of a [inputs, outputs] matrix, widened and packed, so that the inner
/// loop reads one straight run of memory.
void pack_columns(const Bf16* matrix, int inputs, int outputs, int first, float* packed) {
  for (int i = 0; i < inputs; ++i) {
    const Bf16* row = matrix + static_cast<std::size_t>(i) * outputs + first;
    for (int c = 0; c < kColumnsAtOnce; ++c) packed[i * kColumnsAtOnce + c] = widen(row[c]);
  }
}

/// [rows, inputs] -> blocks of kRowsAtOnce rows, [block][input][row in block]; missing rows of the last block are
/// zeros.
std::vector<float> pack_rows(const float* x, std::size_t rows, int inputs) {
  const std::size_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  std::vector<float> packed(blocks * kRowsAtOnce * inputs, 0.0F);
  for (std::size_t r = 0; r < rows; ++r) {
    float* block = packed.data() + r / kRowsAtOnce * kRowsAtOnce * inputs + r % kRowsAtOnce;
    for (int i = 0; i < inputs; ++i) block[i * kRowsAtOnce] = x[r * inputs + i];
  }
  return packed;
}

/// One tile of the product: kRowsAtOnce rows by kColumnsAtOnce columns, held in registers over the whole sum.
void tile(const float* rows, const float* columns, int inputs, float out[kRowsAtOnce][kColumnsAtOnce]) {
  Lanes left[kRowsAtOnce] = {};
  Lanes right[kRowsAtOnce] = {};
  for (int i = 0; i < inputs; ++i) {
    const Lanes w_left = load(columns + i * kColumnsAtOnce);
    const Lanes w_right = load(columns + i * kColumnsAtOnce + kLanes);
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float x = rows[i * kRowsAtOnce + r];
      left[r] += w_left * x;
      right[r] += w_right * x;
    }
  }
  for (int r = 0; r < kRowsAtOnce; ++r) {
    std::memcpy(out[r], &left[r], sizeof(Lanes));
    std::memcpy(out[r] + kLanes, &right[r], sizeof(Lanes));
  }
}

/// y = x W, [rows, outputs]. `x` comes from pack_rows.
std::vector<float> multiply(const std::vector<float>& x, std::size_t rows, const std::vector<Bf16>& matrix,
                            int inputs) {
  const int outputs = static_cast<int>(matrix.size() / inputs);
  std::vector<float> y(rows * outputs);
  std::vector<float> columns(static_cast<std::size_t>(inputs) * kColumnsAtOnce);
  float part[kRowsAtOnce][kColumnsAtOnce];
  for (int first = 0; first < outputs; first += kColumnsAtOnce) {
    pack_columns(matrix.data(), inputs, outputs, first, columns.data());
    for (std::size_t row = 0; row < rows; row += kRowsAtOnce) {
      tile(x.data() + row * inputs, columns.data(), inputs, part);
      const std::size_t real = std::min<std::size_t>(kRowsAtOnce, rows - row);
      for (std::size_t r = 0; r < real; ++r) std::memcpy(&y[(row + r) * outputs + first], part[r], sizeof(part[r]));
    }
  }
  return y;
}

float silu(float z) { return z / (1.0F + std::exp(-z)); }

}  // namespace

void run_expert(const Expert& expert, const float* x, std::size_t rows, Bf16* y) {
  if (rows == 0) return;
  const std::vector<float> input = pack_rows(x, rows, expert.hidden);
  std::vector<float> inner = multiply(input, rows, expert.w1, expert.hidden);
  const std::vector<float> gate = multiply(input, rows, expert.w3, expert.hidden);
  for (std::size_t i = 0; i < inner.size(); ++i) inner[i] = silu(inner[i]) * gate[i];
  const std::vector<float> output =
      multiply(pack_rows(inner.data(), rows, expert.inter), rows, expert.w2, expert.inter);
  for (std::size_t i = 0; i < output.size(); ++i) y[i] = narrow(output[i]);
}

}  // namespace moe
