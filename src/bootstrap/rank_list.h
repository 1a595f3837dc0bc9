// SPDX-License-Identifier: MIT
// Ranks in words, for error messages.
#pragma once

#include <span>
#include <string>

namespace deep_ep::bootstrap {

/// "rank 3", "ranks 1, 3" or, beyond sixteen of them, "ranks 1, 2, ..., 16 and 40 more".
std::string list_ranks(std::span<const int> ranks);

/// Throws kInvalidArgument unless num_ranks >= 1 and 0 <= rank < num_ranks.
void require_rank(int rank, int num_ranks);

}  // namespace deep_ep::bootstrap
