// SPDX-License-Identifier: MIT
// What can go wrong, sorted by what the caller can do about it.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace deep_ep {

enum class ErrorCode {
  kInvalidArgument = 1,  // fix the call; the message names the argument and both values; nothing was sent
  kUnsupported = 2,      // choose otherwise; the message says what is supported
  kSystem = 3,           // the machine refused; the message names the call and its code
  kTimeout = 4,          // a peer did not arrive before the deadline; wait() says who waited for whom
};

/// "invalid argument", "unsupported", "system", "timeout": how each message begins.
const char* name(ErrorCode code) noexcept;

/// One wait that ended at its deadline: who waited, where, for whom, and what was seen instead of what was expected.
struct WaitRecord {
  int rank = -1;            // the rank that waited
  std::string phase;        // the operation, as in "dispatch" or "low_latency_combine"
  int peer = -1;            // the rank it waited for
  std::uint64_t epoch = 0;  // number of the operation on this buffer, the same on every rank
  std::uint64_t expected = 0;
  std::uint64_t seen = 0;
  bool peer_gone = false;  // the peer's process is known to have ended
};

/// The only exception type that the library throws on purpose.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& what_happened);
  /// A timeout: `timeout: rank 0 waited for rank 3 in dispatch, epoch 7, expected 12 seen 0`.
  explicit Error(const WaitRecord& wait);

  ErrorCode code() const noexcept { return code_; }
  /// Present for kTimeout raised by a buffer's wait for a peer; not where ranks did not meet, of whom several may be
  /// missing.
  const std::optional<WaitRecord>& wait() const noexcept { return wait_; }

 private:
  ErrorCode code_;
  std::optional<WaitRecord> wait_;
};

}  // namespace deep_ep
