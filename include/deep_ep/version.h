// SPDX-License-Identifier: MIT
// The version of this library. The only place that says it: CMakeLists.txt reads the three numbers. C and C++.
#pragma once

#define DEEP_EP_VERSION_MAJOR 0
#define DEEP_EP_VERSION_MINOR 1
#define DEEP_EP_VERSION_PATCH 0

#define DEEP_EP_QUOTE(x) #x
#define DEEP_EP_DOTTED(x, y, z) DEEP_EP_QUOTE(x) "." DEEP_EP_QUOTE(y) "." DEEP_EP_QUOTE(z)
/// As a string: "0.1.0".
#define DEEP_EP_VERSION DEEP_EP_DOTTED(DEEP_EP_VERSION_MAJOR, DEEP_EP_VERSION_MINOR, DEEP_EP_VERSION_PATCH)
