// SPDX-License-Identifier: MIT
// What the ranks of a TCP group say to each other: frames of a fixed header and a payload, all integers little-endian.
//
//   [ magic: u32 | version: u16 | kind: u16 | round: u64 | payload_bytes: u64 | payload ]
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bootstrap/proof.h"
#include "deep_ep/error.h"

namespace deep_ep::bootstrap {

using Bytes = std::vector<std::byte>;

constexpr std::uint32_t kMagic = 0x6d704544;  // "DEpm" in memory
constexpr std::uint16_t kVersion = 2;
constexpr std::size_t kHeaderBytes = 24;
constexpr std::size_t kMaxPayloadBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxJobBytes = 255;
constexpr std::size_t kMaxHelloBytes = 24 + kProofBytes + kMaxJobBytes;  // all that a stranger may send

enum class FrameKind : std::uint16_t {
  kHello = 1,      // to rank 0: who I am
  kWelcome = 2,    // from rank 0: all ranks are there; payload: its own proof, where there is a secret
  kComeAgain = 3,  // from rank 0: you are newer than I am; payload: the reason as text
  kFailed = 4,     // from rank 0: this round, or the meeting, failed; payload: a Failure
  kGiveUp = 5,     // to rank 0: my deadline has passed; tell all who is missing
  kBlob = 6,       // to rank 0: my blob of this round
  kGathered = 7,   // from rank 0: everybody's blobs
  kChallenge = 8,  // from rank 0, which has a secret: prove that you know it; payload: a nonce
  kProof = 9,      // to rank 0: the answer
};

struct FrameHeader {
  FrameKind kind{};
  std::uint64_t round = 0;  // number of the all_gather, from 1; 0 while meeting
  std::uint64_t payload_bytes = 0;
};

struct Frame {
  FrameKind kind{};
  std::uint64_t round = 0;
  Bytes payload;
};

struct Hello {
  std::uint64_t generation = 0;
  std::int32_t rank = 0;
  std::int32_t num_ranks = 0;
  std::string job;
  Nonce nonce{};  // random; rank 0's proof answers it
};

/// An Error under way.
struct Failure {
  ErrorCode code{};
  std::string text;
};

/// A whole frame, header included, ready to send.
Bytes encode(const Frame& frame);
Bytes encode(FrameKind kind, std::uint64_t round);
Bytes encode(const Hello& hello);
Bytes encode(const Failure& failure, std::uint64_t round);
Bytes encode_come_again(const std::string& reason);
Bytes encode_gathered(const std::vector<Bytes>& blobs, std::uint64_t round);

/// The header, or nothing and the reason. The payload's size is checked against `max_payload_bytes`.
std::optional<FrameHeader> decode_header(std::span<const std::byte, kHeaderBytes> bytes, std::size_t max_payload_bytes,
                                         std::string& reason);

/// Nothing if the payload is malformed.
std::optional<Hello> decode_hello(std::span<const std::byte> payload);
std::optional<Failure> decode_failure(std::span<const std::byte> payload);
std::optional<std::vector<Bytes>> decode_gathered(std::span<const std::byte> payload, std::size_t num_ranks);
std::string decode_text(std::span<const std::byte> payload);

/// Bytes of the payload that encode_gathered() would make.
std::size_t gathered_bytes(const std::vector<Bytes>& blobs);

}  // namespace deep_ep::bootstrap
