// SPDX-License-Identifier: MIT
// The engine over libfabric. Only where the library was built with its headers (EP_WITH_LIBFABRIC).
#pragma once

#include <memory>

#include "net/engines.h"

namespace deep_ep::net {

std::unique_ptr<Fabric> open_libfabric(const EngineInput& input);

}  // namespace deep_ep::net
