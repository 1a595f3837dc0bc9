// SPDX-License-Identifier: MIT
// Which backend this run of the tests is about, and how tensors get into its memory and back. Test bodies hold ordinary
// memory; only this file, device.h and AnyBuffer know that a GPU has another.
#pragma once

#include <string>

#include "deep_ep/buffer.h"

namespace deep_ep::test {

enum class Backend { kHost, kCuda };

/// The host's, unless the environment variable EP_TEST_BACKEND says "cuda".
Backend backend_under_test();
std::string name(Backend backend);
inline bool on_cuda() { return backend_under_test() == Backend::kCuda; }

/// Why the backend under test cannot be tested here; "" if it can.
std::string obstacle();

/// What a view shows, in ordinary memory: the tensor itself where it lies there, else a copy with the same strides.
Tensor to_host(const TensorView& tensor);
Tensor to_host(const Tensor& tensor);  // keeps its memory alive
/// The tensor itself where the backend under test can read it, else a copy that it can.
Tensor to_backend(const TensorView& tensor);
/// Fills a tensor of the backend under test, which must have no holes.
void overwrite(const TensorView& tensor, const void* bytes);

/// Low-latency outputs of a GPU have room for the most that can come. How much came is in the handle's tensors.
bool has_room_to_spare(const Handle& handle);
std::int64_t arrivals_that_came(const Handle& handle);
std::int64_t rows_that_came(const Handle& handle);  // not of kPadded, which always has all its rows

/// Everything that an operation returns, in ordinary memory.
Handle to_host(const Handle& handle);
DispatchOutput to_host(const DispatchOutput& output);
CombineOutput to_host(const CombineOutput& output);

}  // namespace deep_ep::test
