// SPDX-License-Identifier: MIT
// All row operations as one table, for the instruction set that the file including this is compiled for.
#pragma once

#include "host/rows_impl.h"
#include "host/rows_logfmt.h"

namespace deep_ep::host {
namespace {

constexpr RowOps row_ops_named(const char* isa) {
  return {isa, copy, copy_to_all, flush, zero, quantize, dequantize, log_encode, log_decode, turn, sum, cast, dot};
}

}  // namespace
}  // namespace deep_ep::host
