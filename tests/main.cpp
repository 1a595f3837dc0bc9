// SPDX-License-Identifier: MIT
// The main() of every GoogleTest program here. Where the backend under test is missing, nothing runs and all tests are
// reported as skipped, with the reason; the last line sums up what happened.
#include <gtest/gtest.h>

#include <cstdio>

#include "memory.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::string backend = name(deep_ep::test::backend_under_test());
  const testing::UnitTest& all = *testing::UnitTest::GetInstance();
  if (const std::string missing = deep_ep::test::obstacle(); !missing.empty()) {
    std::printf("%s\ndeep_ep tests on %s: 0 passed, 0 failed, %d skipped\n", missing.c_str(), backend.c_str(),
                all.total_test_count());
    constexpr int kSkipped = 77;  // what ctest is told that this means
    return kSkipped;
  }
  const int code = RUN_ALL_TESTS();
  std::printf("deep_ep tests on %s: %d passed, %d failed, %d skipped\n", backend.c_str(), all.successful_test_count(),
              all.failed_test_count(), all.skipped_test_count());
  return code;
}
