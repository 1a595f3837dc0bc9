// SPDX-License-Identifier: MIT
// The row operations of every instruction set that this machine can run.
#pragma once

#include <vector>

#include "host/rows.h"

namespace deep_ep::host {

inline std::vector<const RowOps*> tables() {
  std::vector<const RowOps*> all{&baseline_row_ops()};
  for (const RowOps* each : {v3_row_ops(), v4_row_ops()})
    if (each != nullptr) all.push_back(each);
  return all;
}

}  // namespace deep_ep::host
