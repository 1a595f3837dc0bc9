// SPDX-License-Identifier: MIT
// Configurations that do not open a buffer, and what an open one says it supports.
#include <gtest/gtest.h>

#include "backends/mistakes.h"

namespace deep_ep::test {
namespace {

TEST(OpenErrors, ranks_that_disagree_on_the_config_hear_the_field_and_both_values) {
  const auto outcomes = run_threads(kRanks, [](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = small_config();
    config.max_experts = rank == kWrongRank ? 48 : 32;
    AnyBuffer::open(std::move(group), config);
  });
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    for (const char* part : {"max_experts", "48", "32"})
      EXPECT_TRUE(contains(outcome.message, part)) << outcome.message;
  }
}

TEST(OpenErrors, what_keeps_one_rank_from_opening_is_told_to_all_at_once) {
  const std::pair<const char*, std::function<void(Config&, Options&)>> wrong[] = {
      {"max_experts", [](Config& c, Options&) { c.max_experts = 0; }},
      {"open_timeout", [](Config& c, Options&) { c.open_timeout = 0ms; }},
      {"num_workers", [](Config&, Options& o) { o.num_workers = -1; }},
      {"", [](Config&, Options& o) { o.backend = BackendKind::kCuda, o.cuda_device = 1000; }},
  };
  for (const auto& [field, make] : wrong) {
    const auto outcomes = run_threads(kRanks, [&](int rank, std::shared_ptr<Bootstrap> group) {
      Config config = small_config();
      Options options;
      if (rank == kWrongRank) make(config, options);
      Buffer::open(std::move(group), config, options);
    });
    const Outcome& culprit = outcomes[kWrongRank];
    EXPECT_TRUE(culprit.code.has_value() && culprit.code != ErrorCode::kTimeout) << culprit.message;
    EXPECT_TRUE(contains(culprit.message, field)) << culprit.message;
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank == kWrongRank) continue;
      EXPECT_EQ(outcomes[rank].code, culprit.code) << outcomes[rank].message;
      const std::string named = "rank " + std::to_string(kWrongRank) + " could not open the buffer: ";
      EXPECT_TRUE(contains(outcomes[rank].message, named)) << outcomes[rank].message;
      EXPECT_TRUE(contains(outcomes[rank].message, field)) << outcomes[rank].message;
    }
  }
}

TEST(OpenErrors, a_config_that_makes_no_sense_names_its_field) {
  const std::pair<const char*, std::function<void(Config&)>> wrong[] = {
      {"max_experts", [](Config& c) { c.max_experts = 0; }},
      {"num_tickets", [](Config& c) { c.num_tickets = 1; }},
      {"ranks_per_node",
       [](Config& c) {
         c.ranks_per_node = {2, 2};
       }},
      {"ranks_per_node", [](Config& c) { c.ranks_per_node = {0}; }},
      {"timeout", [](Config& c) { c.timeout = 0ms; }},
      {"low_latency", [](Config& c) { c.low_latency.max_tokens_per_rank = -1; }},
  };
  for (const auto& [field, make] : wrong) {
    const auto outcomes = run_threads(kRanks, [&](int, std::shared_ptr<Bootstrap> group) {
      Config config = small_config();
      make(config);
      AnyBuffer::open(std::move(group), config);
    });
    for (const Outcome& outcome : outcomes) {
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << field << ": " << outcome.message;
      EXPECT_TRUE(contains(outcome.message, field)) << field << ": " << outcome.message;
    }
  }
}

TEST(Supports, no_shape_that_is_required_is_refused) {
  Config config = small_config();
  config.max_experts = 1024;
  config.low_latency = {.max_tokens_per_rank = 64, .row_bytes = 8192 * 4, .num_topk = 32, .side_bytes = 1024};
  run_ranks(2, config, [](AnyBuffer& buffer) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32, DType::kFp8E4m3, DType::kU8}) {
      for (const std::int64_t hidden : {16, 128, 2048, 7168, 8192}) {
        for (const int topk : {1, 2, 6, 8, 9, 16, 32}) {
          for (const int experts : {1, 8, 64, 100, 256, 1024}) {
            for (const bool low_latency : {false, true}) {
              const bool fp8 = dtype != DType::kU8 && dtype != DType::kFp8E4m3;
              const CallShape shape{dtype, hidden, 64, topk, experts, fp8, low_latency};
              const Support support = buffer.supports(shape);
              ASSERT_TRUE(support) << name(dtype) << " hidden " << hidden << " topk " << topk << " experts " << experts
                                   << ": " << support.reason;
            }
          }
        }
      }
    }
    const Support odd = buffer.supports({DType::kBf16, 12, 4, 4, 16, false, false});
    EXPECT_FALSE(odd);
    EXPECT_TRUE(contains(odd.reason, "16")) << odd.reason;
    EXPECT_FALSE(buffer.supports({DType::kBf16, 64, 4, 4, 1025, false, false}));
    EXPECT_FALSE(buffer.supports({DType::kBf16, 8192, 100000, 32, 16, false, true}));
  });
}

}  // namespace
}  // namespace deep_ep::test
