// SPDX-License-Identifier: MIT
// The row operations for every CPU that the build targets. Compile with `-O3 -ffp-contract=off`: at -O2 g++ 12 leaves
// the loops scalar.
#include "host/rows_table.h"

namespace deep_ep::host {

extern const RowOps kBaselineRowOps;
constinit const RowOps kBaselineRowOps = row_ops_named("baseline");

}  // namespace deep_ep::host
