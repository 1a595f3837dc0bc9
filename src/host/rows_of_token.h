// SPDX-License-Identifier: MIT
// What is written of one source token: its row as it travels, with scales, weights and side tensors. Both kinds of
// dispatch send these.
#pragma once

#include <cstring>
#include <memory>

#include "backend.h"
#include "host/delivery.h"
#include "host/rows.h"

namespace deep_ep::host {

/// Reads tokens for one worker: quantises a row once, however many ranks it goes to.
class TokenReader {
 public:
  TokenReader(const DispatchCall& call, const RowOps& ops) : call_(call), ops_(ops) {
    if (call.quantize) {
      codes_ = std::make_unique<std::uint8_t[]>(call.shape.row_bytes);
      scales_ = std::make_unique<std::int32_t[]>(call.shape.num_scales);
    }
  }

  /// Turns to a token: what is read of it stays valid until the next call. Where it goes is the caller's to add.
  TokenInTransit read(int token) {
    token_ = token;
    read_row();
    TokenInTransit read;
    read.token = token;
    read.row = row_;
    const TensorView& given = call_.in.scales;
    if (call_.quantize) {
      read.scales = scales_.get();
    } else if (given.given()) {
      read.scales = given.as<const std::int32_t>() + token * given.strides[0];
      read.scale_stride = given.strides[1];
    }
    if (call_.in.topk_weights.given())
      read.weights = call_.in.topk_weights.as<const float>() + static_cast<std::int64_t>(token) * call_.num_topk;
    for (int i = 0; i < call_.shape.num_side; ++i)
      read.side[i] = call_.in.side[i].as<const std::byte>() + token * call_.shape.side_bytes[i];
    return read;
  }

  const void* row() const { return row_; }

  void write_scales(std::int32_t* dst, std::int64_t stride) const {
    const TensorView& given = call_.in.scales;
    for (int i = 0; i < call_.shape.num_scales; ++i)
      dst[i * stride] = call_.quantize
                            ? scales_[i]
                            : given.as<const std::int32_t>()[token_ * given.strides[0] + i * given.strides[1]];
  }

  float weight(int k) const {
    return call_.in.topk_weights.as<const float>()[static_cast<std::int64_t>(token_) * call_.num_topk + k];
  }

  void write_side(int i, std::byte* dst) const {
    const std::size_t bytes = call_.shape.side_bytes[i];
    std::memcpy(dst, call_.in.side[i].as<const std::byte>() + token_ * bytes, bytes);
  }

 private:
  void read_row() {
    const TensorView& x = call_.in.x;
    const auto* source =
        x.as<const std::byte>() + token_ * call_.hidden * static_cast<std::int64_t>(item_bytes(x.dtype));
    if (!call_.quantize) {
      row_ = source;
      return;
    }
    ops_.quantize({.src = source,
                   .dtype = x.dtype,
                   .hidden = call_.hidden,
                   .codes = codes_.get(),
                   .scales = scales_.get(),
                   .scale_stride = 1,
                   .kind = call_.scale_kind});
    row_ = codes_.get();
  }

  const DispatchCall& call_;
  const RowOps& ops_;
  int token_ = 0;
  const void* row_ = nullptr;
  std::unique_ptr<std::uint8_t[]> codes_;
  std::unique_ptr<std::int32_t[]> scales_;  // words: float or packed exponents
};

/// Tokens that one worker takes at a time: enough to hide the hand-over, few enough to share evenly.
inline constexpr std::int64_t kTokensPerPiece = 32;

}  // namespace deep_ep::host
