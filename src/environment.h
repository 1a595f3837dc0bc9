// SPDX-License-Identifier: MIT
// The one place that reads environment variables. Absent means the default; present and malformed is an error.
#pragma once

#include <optional>
#include <string>

namespace deep_ep {

/// The value of an environment variable, which may be empty; nothing if it is not set. Not safe while another thread
/// calls setenv(), which no library can prevent.
std::optional<std::string> environment(const char* name);

/// A decimal integer from `lowest` to `highest`, or `fallback` (not checked) if the variable is not set. Throws
/// kInvalidArgument naming the variable and its value if it is anything else, the empty string included.
int environment_int(const char* name, int fallback, int lowest, int highest);

}  // namespace deep_ep
