// SPDX-License-Identifier: MIT
// What one rank's process does, from meeting the others to comparing results.
#pragma once

#include "board.h"
#include "router.h"
#include "settings.h"
#include "text.h"

namespace moe {

/// What the parent prepared before it forked.
struct Job {
  const Settings& settings;
  const Corpus& corpus;
  const Router& router;
  int port = 0;
  Board& board;
};

/// Largest relative L2 error of the layer's output with FP8 dispatch.
/// E4M3 keeps 3 bits after the leading one, so rounding moves a value by at most 2^-4 of itself. An expert multiplies
/// two numbers that follow x (silu(W1 x) and W3 x): to first order each carries the input's relative error once, the
/// product both.
constexpr double kFp8Bound = 2 * 0x1p-4;

/// Runs the layer twice, BF16 and FP8, measures, checks, and writes everything to the rank's record. Returns the exit
/// status.
int run_rank(const Job& job, int rank);

}  // namespace moe
