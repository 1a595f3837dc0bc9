// SPDX-License-Identifier: MIT
// The GPUs that this process sees.
#pragma once

#include <string>
#include <vector>

#include "deep_ep/machine.h"

namespace deep_ep::cuda {

/// Takes no memory on any of them. Throws kSystem where there is no GPU or no driver, with CUDA's reason.
std::vector<GpuInfo> gpus();

/// "0000:1B:00.0"
std::string pci_address(int device);

}  // namespace deep_ep::cuda
