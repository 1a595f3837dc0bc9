// SPDX-License-Identifier: MIT
// The traffic as a picture.
#pragma once

#include <filesystem>

#include "report.h"

namespace moe {

/// An SVG file: a heat map of the bytes between ranks with the nodes' borders, and the load of each expert below it.
void write_picture(const Report& report, const std::filesystem::path& file);

}  // namespace moe
