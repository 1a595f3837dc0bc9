// SPDX-License-Identifier: MIT
// A SwiGLU expert: y = W2 (silu(W1 x) * (W3 x)).
#pragma once

#include <vector>

#include "numbers.h"

namespace moe {

/// Weights in BF16, input channel slowest: w1 and w3 are [hidden, inter], w2 is [inter, hidden].
struct Expert {
  int hidden = 0;
  int inter = 0;
  std::vector<Bf16> w1, w3, w2;
};

/// Rows that the matrix product takes at a time. Groups of a multiple of this waste nothing; others work as well.
constexpr int kRowsAtOnce = 4;

/// x: [rows, hidden] FP32; y: [rows, hidden] BF16.
///
/// A row of y depends on its row of x and on nothing else, not on the rows beside it or how many there are: each
/// product is added to an FP32 sum in ascending order of the input channel, multiplication and addition rounded apart.
/// That is what makes "the same layer without communication", where an expert sees other batches, comparable bit by
/// bit.
void run_expert(const Expert& expert, const float* x, std::size_t rows, Bf16* y);

}  // namespace moe
