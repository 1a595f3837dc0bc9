// SPDX-License-Identifier: MIT
// Checks on arguments: the message names what was wrong and both values.
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

#include "deep_ep/error.h"

namespace deep_ep {

/// Throws kInvalidArgument with the formatted text unless `holds`.
template <typename... Args>
void require(bool holds, fmt::format_string<Args...> text, Args&&... args) {
  if (!holds) throw Error(ErrorCode::kInvalidArgument, fmt::format(text, std::forward<Args>(args)...));
}

/// "x rows == topk_idx rows: 7 vs 8".
template <typename A, typename B>
void require_eq(const A& a, const B& b, std::string_view what) {
  if (!(a == b)) throw Error(ErrorCode::kInvalidArgument, fmt::format("{}: {} vs {}", what, a, b));
}

}  // namespace deep_ep
