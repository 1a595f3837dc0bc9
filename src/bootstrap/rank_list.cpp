// SPDX-License-Identifier: MIT
// Ranks in words, for error messages.
#include "bootstrap/rank_list.h"

#include <algorithm>

#include "deep_ep/error.h"

namespace deep_ep::bootstrap {

std::string list_ranks(std::span<const int> ranks) {
  constexpr std::size_t kMostNamed = 16;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  const std::size_t named = std::min(ranks.size(), kMostNamed);
  for (std::size_t i = 0; i < named; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
  }
  if (named < ranks.size()) text += " and " + std::to_string(ranks.size() - named) + " more";
  return text;
}

void require_rank(int rank, int num_ranks) {
  if (num_ranks < 1) {
    throw Error(ErrorCode::kInvalidArgument, "num_ranks: " + std::to_string(num_ranks) + " vs at least 1");
  }
  if (rank < 0 || rank >= num_ranks) {
    throw Error(ErrorCode::kInvalidArgument,
                "rank: " + std::to_string(rank) + " vs num_ranks " + std::to_string(num_ranks));
  }
}

}  // namespace deep_ep::bootstrap
