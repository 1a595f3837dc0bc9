// SPDX-License-Identifier: MIT
// What a buffer between nodes says about its network.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "deep_ep/buffer.h"
#include "memory.h"
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

TEST(Describe, a_buffer_on_gpus_says_how_its_memory_gets_to_the_network) {
  if (!on_cuda()) GTEST_SKIP() << "of the CUDA backend: EP_TEST_BACKEND=cuda, on a machine with a GPU";
  for (const Outcome& outcome : run_threads(2, [](int, const std::shared_ptr<Bootstrap>& group) {
         Config config = small_config();
         config.ranks_per_node = {1, 1};
         config.network.provider = "loopback";
         Options options;
         options.backend = BackendKind::kCuda;
         options.cuda_device = 0;
         EXPECT_THAT(Buffer::open(group, config, options)->describe(),
                     AllOf(HasSubstr("network.interface"),
                           HasSubstr("network.gpu_memory = staged through pinned host memory")));
       }))
    EXPECT_FALSE(outcome.failed) << outcome.message;
}

}  // namespace
}  // namespace deep_ep::test
