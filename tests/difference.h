// SPDX-License-Identifier: MIT
// What came, compared bit for bit with what the oracle expects of a World: the first difference in words, or "".
#pragma once

#include <cstdint>
#include <string>

#include "world.h"

namespace deep_ep::test {

/// In ordinary memory, and no longer than what came: low-latency outputs of a GPU have room for the most that can come,
/// the valid rows first, ids behind them -1.
DispatchOutput what_came(const DispatchOutput& output);

/// What a rank got of a dispatch, in every documented field.
std::string difference(const World& world, int rank, const DispatchOutput& got, bool cached = false);

/// The same for a bounded call: tensors have max_rows rows, the valid ones first, ids beyond them -1.
std::string difference_bounded(const World& world, int rank, const DispatchOutput& got, std::int64_t max_rows);

/// Two tensors; `what` begins the message.
std::string difference(const char* what, const TensorView& got, const oracle::Array& expected);

/// What a token's home got of a combine.
std::string difference(const oracle::Combined& expected, const CombineOutput& got);

}  // namespace deep_ep::test
