// SPDX-License-Identifier: MIT
// Rows of low-latency combine as they cross: written by their sender, read by the token's home.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "backend.h"
#include "host/rows.h"
#include "plan/wire.h"

namespace deep_ep::host {

/// Writes a row of call.dtype to its place, in the call's wire format: through the caches, for it is read soon.
inline void write_wire_row(const CombineCall& call, const RowOps& ops, std::byte* slot, const std::byte* row) {
  const auto at = plan::EncodedRow::place(call.in.wire, call.hidden);
  auto* const low = reinterpret_cast<std::uint8_t*>(slot);
  switch (call.in.wire) {
    case WireFormat::kAsIs: std::memcpy(slot, row, call.row_bytes); return;
    case WireFormat::kLogFmt10:
      return ops.log_encode({.src = row,
                             .dtype = call.dtype,
                             .hidden = call.hidden,
                             .low = low,
                             .high = low + at.high_at,
                             .words = reinterpret_cast<std::uint32_t*>(slot + at.words_at)});
    case WireFormat::kFp8:
      return ops.quantize(
          {.src = row, .dtype = call.dtype, .hidden = call.hidden, .codes = low, .scales = slot + at.words_at});
  }
}

/// Reads the rows of one token after the other, for one worker.
class WireReader {
 public:
  WireReader(const CombineCall& call, const RowOps& ops) : call_(call), ops_(ops) {
    if (call.in.wire != WireFormat::kAsIs)
      rows_ = std::make_unique<std::byte[]>(call.in.handle->num_topk * call.row_bytes);
  }

  /// The row in a slot, of call.dtype. Stays until that selection of another token is read.
  const std::byte* read(const std::byte* slot, int selection) const {
    if (call_.in.wire == WireFormat::kAsIs) return slot;
    const auto at = plan::EncodedRow::place(call_.in.wire, call_.hidden);
    const auto* const low = reinterpret_cast<const std::uint8_t*>(slot);
    std::byte* const row = rows_.get() + selection * call_.row_bytes;
    if (call_.in.wire == WireFormat::kLogFmt10) {
      ops_.log_decode({.low = low,
                       .high = low + at.high_at,
                       .words = reinterpret_cast<const std::uint32_t*>(slot + at.words_at),
                       .hidden = call_.hidden,
                       .dst = row,
                       .dtype = call_.dtype});
    } else {
      ops_.dequantize(
          {.codes = low, .hidden = call_.hidden, .scales = slot + at.words_at, .dst = row, .dtype = call_.dtype});
    }
    return row;
  }

 private:
  const CombineCall& call_;
  const RowOps& ops_;
  std::unique_ptr<std::byte[]> rows_;  // as they were read, one for each selection
};

}  // namespace deep_ep::host
