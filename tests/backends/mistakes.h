// SPDX-License-Identifier: MIT
// What tests of wrong calls share: one rank of a plain exchange makes a mistake.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "exchange.h"

namespace deep_ep::test {

inline constexpr int kRanks = 3;
inline constexpr int kWrongRank = 1;

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <typename Input>
struct Mistake {
  const char* name;
  std::function<void(Input&)> make;
  std::vector<std::string> named;  // what the message must name
};

inline Shape plain() {
  Shape s;
  s.ranks = kRanks;
  s.experts = 12;
  s.tokens = 10;
  s.uneven_tokens = false;
  s.side = {{DType::kI32, 2}};
  return s;
}

inline Config roomy(const World& world) {
  Config config = world.config();
  config.max_experts = 24;
  return config;
}

/// What a rank must hear of a call in which kWrongRank made this mistake.
inline void expect_refusal(const Outcome& outcome, int rank, const char* mistake,
                           const std::vector<std::string>& named) {
  EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << mistake << " on rank " << rank << ": " << outcome.message;
  if (rank != kWrongRank) {
    EXPECT_TRUE(contains(outcome.message, "rank " + std::to_string(kWrongRank))) << mistake << ": " << outcome.message;
    return;
  }
  EXPECT_EQ(outcome.message.rfind("invalid argument: ", 0), 0u) << outcome.message;
  for (const std::string& part : named)
    EXPECT_TRUE(contains(outcome.message, part)) << mistake << " lacks " << part << ": " << outcome.message;
}

/// Memory that mistakes point to.
struct Spare {
  oracle::Array bytes{DType::kU8, {1 << 20}};
  TensorView view(DType dtype, std::initializer_list<std::int64_t> shape) const {
    return {bytes.view().data, dtype, shape};
  }
};

inline void stretch(TensorView& view) { view.strides[0] = view.shape[1] + 1; }

}  // namespace deep_ep::test
