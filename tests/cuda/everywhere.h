// SPDX-License-Identifier: MIT
// A kernel that wants every SM of a GPU whole: where a block of another kernel sits on one, it shows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deep_ep::test {

/// What one block saw. Times are those of the GPU's clock, in nanoseconds.
struct Stamp {
  std::uint64_t begin, end;
  std::uint32_t sm;
};

/// As many blocks as the current GPU has SMs, each with all the shared memory of one, so that no two share an SM and
/// none shares one with a block that has any. Each stays for so long and leaves a stamp.
void launch_everywhere(Stamp* stamps, std::uint64_t nanoseconds, cudaStream_t stream);

}  // namespace deep_ep::test
