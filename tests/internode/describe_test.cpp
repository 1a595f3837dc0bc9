// SPDX-License-Identifier: MIT
// What a buffer between nodes says about its network.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "deep_ep/buffer.h"
#include "ranks.h"

namespace deep_ep::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Describe, a_buffer_between_nodes_says_what_became_of_each_setting_of_its_network) {
  for (const Outcome& outcome : run_threads(2, [](int, const std::shared_ptr<Bootstrap>& group) {
         Config config = small_config();
         config.ranks_per_node = {1, 1};
         config.network.provider = "loopback";
         const auto buffer = Buffer::open(group, config);
         EXPECT_THAT(buffer->describe(), AllOf(HasSubstr("ranks_per_node = [1, 1]\n"),
                                               HasSubstr("network.interface = memory of this process\n"),
                                               HasSubstr("network.refused = 0\n")));
       }))
    EXPECT_FALSE(outcome.failed) << outcome.message;
}

TEST(Describe, a_buffer_inside_one_node_has_no_network) {
  for (const Outcome& outcome : run_threads(2, [](int, const std::shared_ptr<Bootstrap>& group) {
         EXPECT_THAT(Buffer::open(group, small_config())->describe(), Not(HasSubstr("network.interface")));
       }))
    EXPECT_FALSE(outcome.failed) << outcome.message;
}

// Without a GPU too: it is refused before one is looked for.
TEST(Describe, a_buffer_on_gpus_refuses_a_network_between_its_nodes) {
  if (!has_backend(BackendKind::kCuda)) GTEST_SKIP() << "built without CUDA";
  for (const Outcome& outcome : run_threads(2, [](int, const std::shared_ptr<Bootstrap>& group) {
         Config config = small_config();
         config.ranks_per_node = {1, 1};
         config.network.provider = "tcp";
         Options options;
         options.backend = BackendKind::kCuda;
         Buffer::open(group, config, options);
       })) {
    EXPECT_EQ(outcome.code, ErrorCode::kUnsupported) << outcome.message;
    EXPECT_THAT(outcome.message, AllOf(HasSubstr("network.provider: 'tcp'"), HasSubstr("2 nodes")));
  }
}

}  // namespace
}  // namespace deep_ep::test
