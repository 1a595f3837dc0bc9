// SPDX-License-Identifier: MIT
// Handles in Python's hands: small tensors made for a handle, and the way back from such a tensor to the handle.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <memory>

#include "deep_ep/buffer.h"

namespace deep_ep::python {

using HandlePtr = std::shared_ptr<const Handle>;

/// A handle's tensors, and what Python calls them.
inline constexpr std::array kHandleTensors{&Handle::dst_rank,      &Handle::dst_row,        &Handle::dst_arrival,
                                           &Handle::first_arrival, &Handle::src_token,      &Handle::arrival_row,
                                           &Handle::slot_rows,     &Handle::slot_first_row, &Handle::tokens_between};
inline constexpr std::array kHandleTensorNames{"dst_rank",      "dst_row",        "dst_arrival",
                                               "first_arrival", "src_token",      "arrival_row",
                                               "slot_rows",     "slot_first_row", "tokens_between"};
static_assert(kHandleTensors.size() == kHandleTensorNames.size());
/// Those that low latency makes besides; they are not saved.
inline constexpr std::array kLowLatencyTensors{&Handle::arrival_weights, &Handle::row_token, &Handle::source_range,
                                               &Handle::own_row, &Handle::own_weights};

/// One of a handle's tensors, which keeps the handle alive and from which it can be found again, through any alias of
/// its memory: DeepEP's users take handle tuples apart and put them together again.
Tensor tensor_of(const HandlePtr& handle, Tensor Handle::*field);

/// The handle of whose tensors the one with this memory is, or was cut from; null if there is none.
HandlePtr handle_at(const void* data);

/// A tensor without memory is found by an attribute, which its aliases lack: that of a rank that hosts no expert.
void put_beside(nanobind::handle tensor, const HandlePtr& handle);
HandlePtr handle_beside(nanobind::handle tensor);

/// Ordinary memory with the contents of a contiguous view.
Tensor copy_of(const TensorView& view);

}  // namespace deep_ep::python
