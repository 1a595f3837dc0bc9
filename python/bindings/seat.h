// SPDX-License-Identifier: MIT
// A Buffer as Python holds it.
#pragma once

#include <memory>

#include "deep_ep/buffer.h"
#include "torch_tensor.h"

namespace deep_ep::python {

/// A Buffer that tickets keep open.
using BufferPtr = std::shared_ptr<Buffer>;

/// One rank's Buffer, where its tensors are, and the streams of the call that is being made.
struct Seat {
  BufferPtr buffer;
  Device device = kCpu;
  Stream calls = nullptr;  // operations are enqueued here
  Stream user = nullptr;   // and their results are used here

  Buffer* operator->() const { return buffer.get(); }
};

/// Streams as torch numbers them, where 0 is CUDA's default stream; to the library a null stream is its own.
inline Stream stream_of(std::uintptr_t handle) {
  constexpr std::uintptr_t kDefaultStream = 1;  // cudaStreamLegacy
  return reinterpret_cast<Stream>(handle == 0 ? kDefaultStream : handle);
}

}  // namespace deep_ep::python
