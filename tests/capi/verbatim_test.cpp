// SPDX-License-Identifier: MIT
// The short calls as users write them, in C++; the C program beside this file writes the same in C.
#include <gtest/gtest.h>

#include <string>

#include "deep_ep.h"

TEST(CApi, the_short_calls_compile_verbatim_in_cpp) {
  deep_ep_init_config config = {};
  config.size = sizeof(config);
  deep_ep_group* alone = nullptr;
  ASSERT_EQ(deep_ep_group_in_process(1, &alone), DEEP_EP_OK);
  config.group = alone;
  config.hidden = 8;
  config.max_batch = 2;
  config.arena_bytes = 8u << 20;
  ASSERT_EQ(deep_ep_init(&config), DEEP_EP_OK) << deep_ep_last_error();

  const int size = 4;
  const float input[size] = {1.0f, -2.0f, 0.5f, 448.0f};
  float output[size] = {};
  deep_ep_all_to_all(input, output, size, FP8);
  for (int i = 0; i < size; ++i) EXPECT_EQ(output[i], input[i]) << "exact in FP8 at scale 1: " << i;

  const int batch_size = 2;
  float query[batch_size * 8], result[batch_size * 8] = {};
  for (int i = 0; i < batch_size * 8; ++i) query[i] = 0.1f * static_cast<float>(i);
  deep_ep_low_latency_all_to_all(query, result, batch_size);
  for (int i = 0; i < batch_size * 8; ++i) EXPECT_EQ(result[i], query[i]);

  deep_ep_set_sm_limit(24);
  EXPECT_EQ(deep_ep_sm_limit(), 24);
  deep_ep_set_sm_limit(0);
  EXPECT_EQ(deep_ep_finalize(), DEEP_EP_OK);
  deep_ep_group_free(alone);
}

TEST(CApi, a_value_that_no_enum_has_is_refused_and_harms_nothing) {
  deep_ep_placement_lists lists = {};
  lists.size = sizeof(lists);
  lists.num_ranks = 1;
  lists.num_experts = 1;
  lists.policy = static_cast<deep_ep_replica_policy>(-3);
  deep_ep_placement* placement = nullptr;
  EXPECT_EQ(deep_ep_placement_from_lists(&lists, &placement), DEEP_EP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(deep_ep_last_error()).find("-3"), std::string::npos) << deep_ep_last_error();
}

TEST(CApi, a_callback_that_throws_is_an_error_and_not_the_end) {
  deep_ep_group* group = nullptr;
  const auto throws = [](void*, const void*, size_t, deep_ep_gathered*) -> int { throw 42; };
  ASSERT_EQ(deep_ep_group_callback(0, 1, throws, nullptr, &group), DEEP_EP_OK);
  deep_ep_buffer* buffer = nullptr;
  EXPECT_EQ(deep_ep_buffer_open(group, nullptr, nullptr, &buffer), DEEP_EP_SYSTEM);
  EXPECT_EQ(buffer, nullptr);
  deep_ep_group_free(group);
}
