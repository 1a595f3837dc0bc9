// SPDX-License-Identifier: MIT
#include "deep_ep/error.h"

#include <fmt/format.h>

namespace deep_ep {

namespace {

std::string describe(const WaitRecord& wait) {
  return fmt::format("timeout: rank {} waited for rank {} in {}, epoch {}, expected {} seen {}{}", wait.rank, wait.peer,
                     wait.phase, wait.epoch, wait.expected, wait.seen,
                     wait.peer_gone ? " (its process has ended)" : "");
}

}  // namespace

const char* name(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument: return "invalid argument";
    case ErrorCode::kUnsupported: return "unsupported";
    case ErrorCode::kSystem: return "system";
    case ErrorCode::kTimeout: return "timeout";
  }
  return "error";
}

Error::Error(ErrorCode code, const std::string& what_happened)
    : std::runtime_error(fmt::format("{}: {}", name(code), what_happened)), code_(code) {}

Error::Error(const WaitRecord& wait) : std::runtime_error(describe(wait)), code_(ErrorCode::kTimeout), wait_(wait) {}

}  // namespace deep_ep
