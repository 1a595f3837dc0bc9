// SPDX-License-Identifier: MIT
#include "capi/border.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <optional>

#include "deep_ep/version.h"

namespace deep_ep::capi {

namespace {

// Fixed memory: recording an error must not need any, as it may be that there is none.
struct LastError {
  char text[2048] = "";
  bool waited = false;
  deep_ep_wait wait{};
};

thread_local LastError last_error;

template <std::size_t N>
void copy_text(char (&to)[N], const char* from) noexcept {
  std::snprintf(to, N, "%s", from);
}

deep_ep_status record(deep_ep_status status, const char* text) noexcept {
  copy_text(last_error.text, text);
  last_error.waited = false;
  return status;
}

void record_wait(const WaitRecord& wait) noexcept {
  deep_ep_wait& w = last_error.wait;
  w = {};
  w.size = sizeof(w);
  w.rank = wait.rank;
  w.peer = wait.peer;
  w.epoch = wait.epoch;
  w.expected = wait.expected;
  w.seen = wait.seen;
  w.peer_gone = wait.peer_gone ? 1 : 0;
  copy_text(w.phase, wait.phase.c_str());
  last_error.waited = true;
}

deep_ep_status status_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kInvalidArgument: return DEEP_EP_INVALID_ARGUMENT;
    case ErrorCode::kUnsupported: return DEEP_EP_UNSUPPORTED;
    case ErrorCode::kSystem: return DEEP_EP_SYSTEM;
    case ErrorCode::kTimeout: return DEEP_EP_TIMEOUT;
  }
  return DEEP_EP_SYSTEM;
}

// Larger than any version will be: such a size is not a struct's, but memory that nobody set.
constexpr std::size_t kAbsurdSize = 4096;

}  // namespace

deep_ep_status record_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    const deep_ep_status status = record(status_of(error.code()), error.what());
    if (error.wait()) record_wait(*error.wait());
    return status;
  } catch (const std::bad_alloc&) {
    return record(DEEP_EP_SYSTEM, "system: out of memory");
  } catch (const std::exception& error) {
    char text[sizeof(LastError::text)];
    std::snprintf(text, sizeof(text), "system: %s", error.what());
    return record(DEEP_EP_SYSTEM, text);
  } catch (...) {
    return record(DEEP_EP_SYSTEM, "system: an exception of unknown type, as a callback may throw");
  }
}

std::size_t checked_size(const void* theirs, const StructSize& size) {
  std::size_t bytes = 0;
  std::memcpy(&bytes, theirs, sizeof(bytes));
  require(bytes >= size.first && bytes <= kAbsurdSize,
          "{}.size: {}, sizes of this struct are {} .. {}; set it to its sizeof", size.name, bytes, size.first,
          kAbsurdSize);
  return bytes;
}

void read_struct(void* ours, const void* theirs, const StructSize& size) {
  const std::size_t bytes = checked_size(theirs, size);
  const auto* from = static_cast<const std::byte*>(theirs);
  for (std::size_t i = size.ours; i < bytes; ++i) {
    if (from[i] == std::byte{0}) continue;
    throw Error(ErrorCode::kUnsupported, fmt::format("{}: byte {} is set, but this library ({}) knows {} bytes of it",
                                                     size.name, i, DEEP_EP_VERSION, size.ours));
  }
  constexpr std::size_t kAfterSize = sizeof(std::size_t);
  std::memcpy(static_cast<std::byte*>(ours) + kAfterSize, from + kAfterSize, std::min(bytes, size.ours) - kAfterSize);
}

void write_struct(void* theirs, const void* ours, const StructSize& size) {
  const std::size_t bytes = checked_size(theirs, size);
  auto* to = static_cast<std::byte*>(theirs);
  constexpr std::size_t kAfterSize = sizeof(std::size_t);
  std::memcpy(to + kAfterSize, static_cast<const std::byte*>(ours) + kAfterSize,
              std::min(bytes, size.ours) - kAfterSize);
  if (bytes > size.ours) std::memset(to + size.ours, 0, bytes - size.ours);
}

}  // namespace deep_ep::capi

using deep_ep::capi::last_error;

extern "C" {

const char* deep_ep_status_name(deep_ep_status status) {
  switch (status) {
    case DEEP_EP_OK: return "ok";
    case DEEP_EP_INVALID_ARGUMENT: return deep_ep::name(deep_ep::ErrorCode::kInvalidArgument);
    case DEEP_EP_UNSUPPORTED: return deep_ep::name(deep_ep::ErrorCode::kUnsupported);
    case DEEP_EP_SYSTEM: return deep_ep::name(deep_ep::ErrorCode::kSystem);
    case DEEP_EP_TIMEOUT: return deep_ep::name(deep_ep::ErrorCode::kTimeout);
  }
  return "unknown";
}

const char* deep_ep_last_error(void) { return last_error.text; }

deep_ep_status deep_ep_last_wait(deep_ep_wait* wait) {
  if (wait == nullptr || !last_error.waited) return DEEP_EP_INVALID_ARGUMENT;
  try {
    deep_ep::capi::write(wait, last_error.wait, "wait", EP_END_OF(deep_ep_wait, peer));
    return DEEP_EP_OK;
  } catch (...) {
    return DEEP_EP_INVALID_ARGUMENT;
  }
}

const char* deep_ep_version(void) { return DEEP_EP_VERSION; }

}  // extern "C"
