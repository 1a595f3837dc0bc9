// SPDX-License-Identifier: MIT
#include "net/wire.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstring>

#include "check.h"

namespace deep_ep::net {

namespace {

// Mixes one word into a digest; every bit of both changes about half of the result. Not a secret: it finds damage and
// strangers, the rendezvous keeps out enemies.
std::uint64_t mix(std::uint64_t digest, std::uint64_t word) {
  digest = (digest ^ word) * 0x9e37'79b9'7f4a'7c15;
  digest ^= digest >> 32;
  digest *= 0xd6e8'feb8'6659'fd93;
  return digest ^ digest >> 29;
}

std::uint64_t digest_of(std::span<const std::byte> bytes, std::uint64_t digest) {
  for (; bytes.size() >= 8; bytes = bytes.subspan(8)) {
    std::uint64_t word;
    std::memcpy(&word, bytes.data(), 8);
    digest = mix(digest, word);
  }
  std::uint64_t last = 0;
  if (!bytes.empty()) std::memcpy(&last, bytes.data(), bytes.size());
  return mix(digest, last);
}

std::uint64_t digest_of(const MessageHeader& header, std::span<const std::byte> payload) {
  const auto* first = reinterpret_cast<const std::byte*>(&header);
  return digest_of(payload, digest_of({first, offsetof(MessageHeader, digest)}, 1));
}

struct WordFormat {
  int source_bits, channel_bits, epoch_bits, check_bits;

  static constexpr WordFormat of(std::size_t immediate_bytes) {
    return immediate_bytes >= 8 ? WordFormat{16, 8, 16, 24} : WordFormat{12, 4, 8, 8};
  }
};
static_assert(kNumChannels <= 1 << WordFormat::of(4).channel_bits);
static_assert(kEpochReach < 1 << (WordFormat::of(4).epoch_bits - 1));

constexpr std::uint64_t low_bits(std::uint64_t value, int bits) { return value & ((std::uint64_t{1} << bits) - 1); }

}  // namespace

Gate::Gate(std::uint64_t job, int rank, int num_ranks)
    : job_(job), rank_(rank), num_ranks_(num_ranks), last_sent_(num_ranks), arrived_(num_ranks) {}

bool Gate::can_name(int num_ranks, std::size_t immediate_bytes) {
  return immediate_bytes >= 4 && num_ranks <= 1 << WordFormat::of(immediate_bytes).source_bits;
}

std::uint64_t Gate::check(int source, int target, const Notice& notice) const {
  return mix(mix(mix(job_, static_cast<std::uint64_t>(source)), static_cast<std::uint64_t>(target)),
             std::uint64_t{notice.epoch} << 8 | notice.channel);
}

// Differences of unsigned numbers, so that epochs may wrap.
bool Gate::is_near(std::uint32_t epoch) const { return epoch - epoch_ + kEpochReach <= 2 * kEpochReach; }

std::uint64_t Gate::seal(int target, const Notice& notice, std::size_t immediate_bytes) const {
  const auto format = WordFormat::of(immediate_bytes);
  std::uint64_t word = static_cast<std::uint64_t>(rank_);
  word = word << format.channel_bits | notice.channel;
  word = word << format.epoch_bits | low_bits(notice.epoch, format.epoch_bits);
  return word << format.check_bits | low_bits(check(rank_, target, notice), format.check_bits);
}

std::optional<Gate::OpenNotice> Gate::open(std::uint64_t word, std::size_t immediate_bytes) {
  const auto format = WordFormat::of(immediate_bytes);
  const auto take = [&](int bits) {
    const std::uint64_t value = low_bits(word, bits);
    word >>= bits;
    return value;
  };
  const std::uint64_t sum = take(format.check_bits);
  const auto low_epoch = static_cast<std::uint32_t>(take(format.epoch_bits));
  const auto channel = static_cast<std::uint8_t>(take(format.channel_bits));
  const auto source = static_cast<int>(take(format.source_bits));
  // The epoch nearest to ours with these low bits.
  const std::uint32_t half = 1u << (format.epoch_bits - 1);
  const auto ahead = static_cast<std::uint32_t>(low_bits(low_epoch - epoch_ + half, format.epoch_bits));
  const Notice notice{channel, epoch_ + ahead - half};
  const bool holds = word == 0 && source < num_ranks_ && channel < kNumChannels && is_near(notice.epoch) &&
                     sum == low_bits(check(source, rank_, notice), format.check_bits);
  if (!holds) {
    refuse(fmt::format("a notice that says source {}, channel {}, epoch {} (here: epoch {})", source, channel,
                       notice.epoch, epoch_));
    return std::nullopt;
  }
  return OpenNotice{source, notice};
}

Blob Gate::seal(int target, std::uint32_t epoch, std::span<const std::byte> payload, MessageKind kind) {
  MessageHeader header;
  header.payload_bytes = static_cast<std::uint32_t>(payload.size());
  header.job = job_;
  header.sequence = ++last_sent_[target];
  header.source = static_cast<std::uint32_t>(rank_);
  header.target = static_cast<std::uint32_t>(target);
  header.epoch = epoch;
  header.kind = static_cast<std::uint32_t>(kind);
  header.digest = digest_of(header, payload);
  Blob wire(sizeof header + payload.size());
  std::memcpy(wire.data(), &header, sizeof header);
  if (!payload.empty()) std::memcpy(wire.data() + sizeof header, payload.data(), payload.size());
  return wire;
}

std::optional<Gate::OpenMessage> Gate::open(std::span<const std::byte> message) {
  const auto refused = [this](const std::string& why) {
    refuse(why);
    return std::nullopt;
  };
  MessageHeader header;
  if (message.size() < sizeof header)
    return refused(fmt::format("a message of {} bytes has no header", message.size()));
  std::memcpy(&header, message.data(), sizeof header);
  const auto payload = message.subspan(sizeof header);
  if (header.magic != MessageHeader::kMagic) return refused("a message that is none of ours");
  if (header.job != job_) return refused("a message of another job");
  if (header.payload_bytes != payload.size())
    return refused(fmt::format("a message that says {} bytes and has {}", header.payload_bytes, payload.size()));
  if (header.digest != digest_of(header, payload)) return refused("a damaged message");
  if (header.source >= static_cast<std::uint32_t>(num_ranks_) || header.target != static_cast<std::uint32_t>(rank_))
    return refused(fmt::format("a message from {} to {} at rank {}", header.source, header.target, rank_));
  if (!is_near(header.epoch))
    return refused(fmt::format("a message from rank {} in epoch {} (here: {})", header.source, header.epoch, epoch_));
  const auto kind = static_cast<MessageKind>(header.kind);
  const bool is_notice = kind == MessageKind::kNotice;
  if (header.kind > static_cast<std::uint32_t>(MessageKind::kNotice) ||
      (is_notice && (payload.size() != 1 || std::to_integer<int>(payload[0]) >= kNumChannels)))
    return refused(fmt::format("a message of kind {} with {} bytes", header.kind, payload.size()));
  if (!arrived_[header.source].take(header.sequence)) {
    ++duplicates_;
    return std::nullopt;
  }
  return OpenMessage{static_cast<int>(header.source), kind, header.epoch, payload};
}

void Gate::refuse(const std::string& why) {
  ++refused_;
  last_refusal_ = why;
}

}  // namespace deep_ep::net
