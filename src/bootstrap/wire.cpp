// SPDX-License-Identifier: MIT
// Encoding and decoding of what the ranks of a TCP group say to each other.
#include "bootstrap/wire.h"

#include <algorithm>
#include <concepts>
#include <cstring>
#include <type_traits>

namespace deep_ep::bootstrap {
namespace {

constexpr std::size_t kMaxTextBytes = 4096;

template <std::integral T>
void put(Bytes& out, T value) {
  const auto bits = static_cast<std::make_unsigned_t<T>>(value);
  for (std::size_t i = 0; i < sizeof(T); ++i) out.push_back(static_cast<std::byte>((bits >> (8 * i)) & 0xff));
}

void put_bytes(Bytes& out, std::span<const std::byte> bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }

// Takes fields from the front of a payload; the caller checks once, by has(), that they are there.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  bool has(std::size_t num_bytes) const { return rest_.size() >= num_bytes; }
  std::size_t size() const { return rest_.size(); }

  template <std::integral T>
  T get() {
    std::make_unsigned_t<T> bits = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      bits |= static_cast<std::make_unsigned_t<T>>(static_cast<std::make_unsigned_t<T>>(rest_[i]) << (8 * i));
    }
    rest_ = rest_.subspan(sizeof(T));
    return static_cast<T>(bits);
  }

  std::span<const std::byte> get_bytes(std::size_t num_bytes) {
    const auto bytes = rest_.first(num_bytes);
    rest_ = rest_.subspan(num_bytes);
    return bytes;
  }

 private:
  std::span<const std::byte> rest_;
};

Bytes begin_frame(FrameKind kind, std::uint64_t round, std::size_t payload_bytes) {
  Bytes out;
  out.reserve(kHeaderBytes + payload_bytes);
  put(out, kMagic);
  put(out, kVersion);
  put(out, static_cast<std::uint16_t>(kind));
  put(out, round);
  put(out, static_cast<std::uint64_t>(payload_bytes));
  return out;
}

std::span<const std::byte> text_bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), std::min(text.size(), kMaxTextBytes)));
}

bool is_known(std::uint16_t kind) {
  return kind >= static_cast<std::uint16_t>(FrameKind::kHello) && kind <= static_cast<std::uint16_t>(FrameKind::kProof);
}

}  // namespace

Bytes encode(const Frame& frame) {
  Bytes out = begin_frame(frame.kind, frame.round, frame.payload.size());
  put_bytes(out, frame.payload);
  return out;
}

Bytes encode(FrameKind kind, std::uint64_t round) { return begin_frame(kind, round, 0); }

Bytes encode(const Hello& hello) {
  const auto job = text_bytes(hello.job);
  Bytes out = begin_frame(FrameKind::kHello, 0, 20 + kProofBytes + job.size());
  put(out, hello.generation);
  put(out, hello.rank);
  put(out, hello.num_ranks);
  put_bytes(out, hello.nonce);
  put(out, static_cast<std::uint32_t>(job.size()));
  put_bytes(out, job);
  return out;
}

Bytes encode(const Failure& failure, std::uint64_t round) {
  const auto text = text_bytes(failure.text);
  Bytes out = begin_frame(FrameKind::kFailed, round, 4 + text.size());
  put(out, static_cast<std::uint32_t>(failure.code));
  put_bytes(out, text);
  return out;
}

Bytes encode_come_again(const std::string& reason) {
  const auto text = text_bytes(reason);
  Bytes out = begin_frame(FrameKind::kComeAgain, 0, text.size());
  put_bytes(out, text);
  return out;
}

std::size_t gathered_bytes(const std::vector<Bytes>& blobs) {
  std::size_t total = 8 * blobs.size();
  for (const Bytes& blob : blobs) total += blob.size();
  return total;
}

Bytes encode_gathered(const std::vector<Bytes>& blobs, std::uint64_t round) {
  Bytes out = begin_frame(FrameKind::kGathered, round, gathered_bytes(blobs));
  for (const Bytes& blob : blobs) put(out, static_cast<std::uint64_t>(blob.size()));
  for (const Bytes& blob : blobs) put_bytes(out, blob);
  return out;
}

std::optional<FrameHeader> decode_header(std::span<const std::byte, kHeaderBytes> bytes, std::size_t max_payload_bytes,
                                         std::string& reason) {
  Reader reader(bytes);
  if (reader.get<std::uint32_t>() != kMagic) {
    reason = "it does not speak this library's protocol";
    return std::nullopt;
  }
  if (const auto version = reader.get<std::uint16_t>(); version != kVersion) {
    reason = "protocol version: " + std::to_string(version) + " vs " + std::to_string(kVersion);
    return std::nullopt;
  }
  const auto kind = reader.get<std::uint16_t>();
  if (!is_known(kind)) {
    reason = "unknown kind of frame: " + std::to_string(kind);
    return std::nullopt;
  }
  FrameHeader header;
  header.kind = static_cast<FrameKind>(kind);
  header.round = reader.get<std::uint64_t>();
  header.payload_bytes = reader.get<std::uint64_t>();
  if (header.payload_bytes > max_payload_bytes) {
    reason =
        "frame bytes: " + std::to_string(header.payload_bytes) + " vs at most " + std::to_string(max_payload_bytes);
    return std::nullopt;
  }
  return header;
}

std::optional<Hello> decode_hello(std::span<const std::byte> payload) {
  Reader reader(payload);
  if (!reader.has(20 + kProofBytes)) return std::nullopt;
  Hello hello;
  hello.generation = reader.get<std::uint64_t>();
  hello.rank = reader.get<std::int32_t>();
  hello.num_ranks = reader.get<std::int32_t>();
  const auto nonce = reader.get_bytes(kProofBytes);
  std::copy(nonce.begin(), nonce.end(), hello.nonce.begin());
  if (reader.get<std::uint32_t>() != reader.size()) return std::nullopt;
  hello.job = decode_text(reader.get_bytes(reader.size()));
  return hello;
}

std::optional<Failure> decode_failure(std::span<const std::byte> payload) {
  Reader reader(payload);
  if (!reader.has(4)) return std::nullopt;
  const auto code = reader.get<std::uint32_t>();
  if (code < static_cast<std::uint32_t>(ErrorCode::kInvalidArgument) ||
      code > static_cast<std::uint32_t>(ErrorCode::kTimeout)) {
    return std::nullopt;
  }
  return Failure{static_cast<ErrorCode>(code), decode_text(reader.get_bytes(reader.size()))};
}

std::optional<std::vector<Bytes>> decode_gathered(std::span<const std::byte> payload, std::size_t num_ranks) {
  Reader reader(payload);
  if (!reader.has(8 * num_ranks)) return std::nullopt;
  std::vector<std::uint64_t> sizes(num_ranks);
  for (auto& size : sizes) size = reader.get<std::uint64_t>();
  std::vector<Bytes> blobs;
  blobs.reserve(num_ranks);
  for (const std::uint64_t size : sizes) {
    if (!reader.has(size)) return std::nullopt;
    const auto bytes = reader.get_bytes(size);
    blobs.emplace_back(bytes.begin(), bytes.end());
  }
  if (reader.size() != 0) return std::nullopt;
  return blobs;
}

std::string decode_text(std::span<const std::byte> payload) {
  return std::string(reinterpret_cast<const char*>(payload.data()), payload.size());
}

}  // namespace deep_ep::bootstrap
