// SPDX-License-Identifier: MIT
// The version of this library. The only place that says it: CMakeLists.txt reads the three numbers. C and C++.
#pragma once

#define DEEP_EP_VERSION_MAJOR 0
#define DEEP_EP_VERSION_MINOR 1
#define DEEP_EP_VERSION_PATCH 0

#define DEEP_EP_QUOTE_(x) #x
#define DEEP_EP_DOTTED_(x, y, z) DEEP_EP_QUOTE_(x) "." DEEP_EP_QUOTE_(y) "." DEEP_EP_QUOTE_(z)
/// As a string: "0.1.0".
#define DEEP_EP_VERSION DEEP_EP_DOTTED_(DEEP_EP_VERSION_MAJOR, DEEP_EP_VERSION_MINOR, DEEP_EP_VERSION_PATCH)
