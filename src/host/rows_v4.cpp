// SPDX-License-Identifier: MIT
// The row operations for x86-64 with AVX-512 (F, BW, DQ, VL) besides what rows_v3.cpp has. Compile with its flags and
// `-mavx512f -mavx512bw -mavx512dq -mavx512vl`.
#include "host/rows_table.h"

namespace deep_ep::host {

extern const RowOps kV4RowOps;
constinit const RowOps kV4RowOps = row_ops_named("v4");

}  // namespace deep_ep::host
