// SPDX-License-Identifier: MIT
// What the GPUs can do at best with the bytes of an exchange: every row loaded once and stored wherever it must go, or
// loaded from everywhere and stored once, by so many SMs, with no counts, no flags and no arithmetic.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace deep_ep::bench {

/// One rank's rows and where they go. All pointers are of the device.
struct LimitRows {
  std::byte* rows;             // [num_tokens, row_bytes]
  std::byte* const* landing;   // [num_ranks]: memory of each rank, `copies_room` rows for each (source rank, token)
  const std::uint8_t* copies;  // [num_tokens, num_ranks]: rows of a token for a rank
  int num_tokens, num_ranks, rank;
  int copies_room;  // the largest of `copies`
  int row_bytes;    // a multiple of 16
};

/// All threads load and store 16 bytes at a time.
void launch_copy_by_stores(const LimitRows& rows, int blocks, cudaStream_t stream);
/// One thread per warp starts bulk copies through shared memory. sm_90 and later.
void launch_copy_by_bulk(const LimitRows& rows, int blocks, cudaStream_t stream);
/// Back: every copy is loaded, one row per token stored. By all threads (which XOR the copies), or by bulk copies.
void launch_gather_by_loads(const LimitRows& rows, int blocks, cudaStream_t stream);
void launch_gather_by_bulk(const LimitRows& rows, int blocks, cudaStream_t stream);
/// Before the first launch on a device.
void prepare_limits();

}  // namespace deep_ep::bench
