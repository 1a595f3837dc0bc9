// SPDX-License-Identifier: MIT
// Rows of bf16 and fp16 as they cross in a wire format of low-latency combine: where the parts of an encoded row lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/buffer.h"
#include "plan/align.h"
#include "plan/fp8.h"
#include "plan/logfmt.h"

namespace deep_ep::plan {

//   [ low: a byte for each channel | LogFMT: for each eight channels a byte of signs and one of ninth bits | words: one
//   for each 128 channels ]
// Low holds the low eight bits of a LogFMT code, or an FP8 code. In the bytes of eight, bit i is channel i's. A word is
// LogScale::word(), or an FP8 scale. A row is a multiple of 16 bytes, so its channels are a multiple of eight, and what
// is encoded is never longer than the row.
struct EncodedRow {
  std::size_t high_at = 0;
  std::size_t words_at = 0;
  std::size_t bytes = 0;

  static constexpr EncodedRow place(WireFormat format, std::int64_t hidden) {
    const auto channels = static_cast<std::size_t>(hidden);
    EncodedRow row;
    row.high_at = channels;
    row.words_at = align_up(channels + (format == WireFormat::kLogFmt10 ? channels / 4 : 0), 4);
    row.bytes = row.words_at + 4 * ((channels + kFp8Group - 1) / kFp8Group);
    return row;
  }
};
static_assert(kLogBlock == kFp8Group);

/// Bytes that a row takes in its slot.
inline std::size_t wire_row_bytes(WireFormat format, std::int64_t hidden, std::size_t row_bytes) {
  return format == WireFormat::kAsIs ? row_bytes : EncodedRow::place(format, hidden).bytes;
}

}  // namespace deep_ep::plan
