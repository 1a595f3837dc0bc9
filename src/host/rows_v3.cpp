// SPDX-License-Identifier: MIT
// The row operations for x86-64 with AVX2, FMA and F16C. Compile with `-O3 -ffp-contract=off -mavx2 -mfma -mf16c` on
// x86-64 and leave the file out elsewhere. Not -march=x86-64-v3: these three extensions are what rows.cpp asks the CPU
// for, and nothing else may be used.
#include "host/rows_table.h"

namespace deep_ep::host {

extern const RowOps kV3RowOps;
constinit const RowOps kV3RowOps = row_ops_named("v3");

}  // namespace deep_ep::host
