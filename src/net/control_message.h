// SPDX-License-Identifier: MIT
// The small messages between ranks that share no memory. What a message may change is computed by its receiver from
// who sent it, never read out of it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "net/flag.h"

namespace deep_ep::net {

/// A word to store, once everything that it publishes is there.
struct FlagMessage {
  Flag flag = Flag::kAnnounced;
  std::uint64_t epoch = 0;
  std::uint64_t value = 0;
  std::uint64_t puts = 0;  // of low-latency data
};

enum class ControlKind : std::uint8_t {
  kFlag,     // a piece of what a flag publishes, and the flag
  kCredit,   // forwarding slots of the sender are free again
  kDead,     // a rank has ended
  kBye,      // the sender closes its buffer in good order: that it is gone then is no failure
  kSeenOff,  // the answer: the sender may go
  kCall,     // is anybody there?
  kHere,     // the answer
};

/// In front of every control message.
struct ControlHead {
  ControlKind kind = ControlKind::kFlag;
  Flag flag = Flag::kAnnounced;
  std::uint16_t slots = 0;   // kCredit: a bit for each
  std::int32_t rank = -1;    // kDead
  std::uint32_t pieces = 1;  // kFlag: that belong to this flag
  std::uint32_t at = 0;      // kFlag: where this piece lies in what is published
  std::uint64_t epoch = 0;
  std::uint64_t value = 0;
  std::uint64_t puts = 0;
};

}  // namespace deep_ep::net
