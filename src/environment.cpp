// SPDX-License-Identifier: MIT
// The one place that reads environment variables.
#include "environment.h"

#include <charconv>
#include <cstdlib>

#include "deep_ep/error.h"

namespace deep_ep {

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

int environment_int(const char* name, int fallback, int lowest, int highest) {
  const auto text = environment(name);
  if (!text) return fallback;
  int value = 0;
  const char* end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || stop != end || value < lowest || value > highest) {
    throw Error(ErrorCode::kInvalidArgument, std::string("environment variable ") + name + ": '" + *text +
                                                 "' is not an integer from " + std::to_string(lowest) + " to " +
                                                 std::to_string(highest));
  }
  return value;
}

}  // namespace deep_ep
