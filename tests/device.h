// SPDX-License-Identifier: MIT
// The GPUs that tests may use: rank r has GPU r modulo their number. Copies and memory are stream-ordered, on streams
// of our own: cudaMalloc, cudaFree and the default stream would wait for kernels of other ranks, which may wait for
// this one.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace deep_ep::test::device {

/// Why there is none; "" if there is one.
std::string obstacle();
/// The GPU of a rank.
int of_rank(int rank);
/// Makes that rank's GPU the calling thread's, and sets up what copies need, before any rank waits for another.
void use_for(int rank);
/// Whether this is memory of a GPU.
bool holds(const void* data);
/// To, from or between GPUs; done when it returns.
void copy(void* to, const void* from, std::size_t bytes);
/// Memory of the calling thread's GPU.
std::shared_ptr<void> allocate(std::size_t bytes);

}  // namespace deep_ep::test::device
