// SPDX-License-Identifier: MIT
// What stands in front of every message and inside every notice, and the gate that checks both before they are used.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "net/fabric.h"
#include "net/sequence_window.h"

namespace deep_ep::net {

enum class MessageKind : std::uint32_t {
  kPayload,  // the caller's
  kNotice,   // of a put, where the network carries none with it: channel as one byte
};

/// In front of each message's payload. Host byte order: the machines of one job are alike, and a message from one that
/// is not fails at `magic`.
struct MessageHeader {
  static constexpr std::uint32_t kMagic = 0x6465'6570;

  std::uint32_t magic = kMagic;
  std::uint32_t payload_bytes = 0;
  std::uint64_t job = 0;       // random, known to the ranks of one group only
  std::uint64_t sequence = 0;  // from 1, of this (source, target)
  std::uint32_t source = 0;
  std::uint32_t target = 0;
  std::uint32_t epoch = 0;
  std::uint32_t kind = 0;    // MessageKind
  std::uint64_t digest = 0;  // of all fields above and the payload
};
inline constexpr std::size_t kMaxWireBytes = sizeof(MessageHeader) + kMaxMessageBytes;

/// What one endpoint says to its peers and believes of what comes from them.
//
// A notice is one word, as wide as the network carries:
//   64 bits  [ source: 16 | channel: 8 | epoch modulo 2^16 | check: 24 ]
//   32 bits  [ source: 12 | channel: 4 | epoch modulo 2^8  | check: 8  ]
// The check is a digest of job, source, target, channel and the whole epoch, so that a stranger's word, or one of a
// distant epoch, is refused (but for one in 2^24 or 2^8: strangers have no key for our memory in the first place).
class Gate {
 public:
  Gate(std::uint64_t job, int rank, int num_ranks);

  void set_epoch(std::uint32_t epoch) { epoch_ = epoch; }

  /// Whether words of this width can name every rank.
  static bool can_name(int num_ranks, std::size_t immediate_bytes);
  std::uint64_t seal(int target, const Notice& notice, std::size_t immediate_bytes) const;
  /// The message as it travels.
  Blob seal(int target, std::uint32_t epoch, std::span<const std::byte> payload,
            MessageKind kind = MessageKind::kPayload);

  struct OpenNotice {
    int source;
    Notice notice;
  };
  struct OpenMessage {
    int source;
    MessageKind kind;
    std::uint32_t epoch;
    std::span<const std::byte> payload;  // inside the bytes that were opened
  };
  /// Nothing where it was refused; that is counted.
  std::optional<OpenNotice> open(std::uint64_t word, std::size_t immediate_bytes);
  std::optional<OpenMessage> open(std::span<const std::byte> message);

  void refuse(const std::string& why);
  void count_duplicate() { ++duplicates_; }
  std::uint64_t refused() const { return refused_; }
  std::uint64_t duplicates() const { return duplicates_; }
  const std::string& last_refusal() const { return last_refusal_; }

 private:
  std::uint64_t check(int source, int target, const Notice& notice) const;
  bool is_near(std::uint32_t epoch) const;

  const std::uint64_t job_;
  const int rank_, num_ranks_;
  std::uint32_t epoch_ = 0;
  std::vector<std::uint64_t> last_sent_;  // sequence, by target
  std::vector<SequenceWindow> arrived_;   // by source
  std::uint64_t refused_ = 0, duplicates_ = 0;
  std::string last_refusal_;
};

}  // namespace deep_ep::net
