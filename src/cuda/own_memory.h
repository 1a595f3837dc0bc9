// SPDX-License-Identifier: MIT
// Memory of one rank alone, on its GPU and pinned on the host. cudaFree and cudaFreeHost wait until all kernels of the
// GPU have ended, and every other thread of the process that launches one waits with them: a rank that closes its
// buffer would hold up the very peers on that GPU for whom a kernel of a third one waits. Nothing here waits.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/window.h"

namespace deep_ep::cuda {

/// Device memory, in pages: for pieces of a MiB and more. Whoever drops it knows that no kernel uses it any more.
std::shared_ptr<std::byte> own_device_memory(int device, Sharing sharing, std::size_t bytes);

/// Zeroed memory that kernels write and the host reads, at one address for both. It goes back to a pool of this
/// process.
std::shared_ptr<std::byte> own_pinned_memory(std::size_t bytes);

}  // namespace deep_ep::cuda
