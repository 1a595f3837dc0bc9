// SPDX-License-Identifier: MIT
// What is written of one source token: its row as it travels, with scales, weights and side tensors. Both kinds of
// dispatch send these.
#pragma once

#include <cstring>
#include <memory>
#include <span>

#include "backend.h"
#include "host/delivery.h"
#include "host/rows.h"
#include "plan/message.h"

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
  TokenInTransit read(int token) const {
    TokenInTransit read;
    read.token = token;
    read.row = source(token);
    const TensorView& given = call_.in.scales;
    if (call_.quantize) {
      quantize(token, codes_.get(), scales_.get());
      read.row = codes_.get();
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

  /// Writes a token's scales (row by row) and side tensors where the message has them, and its row there or, if there
  /// are any, to these places instead.
  void write(int token, std::byte* message, const plan::MessageLayout& at, std::span<std::byte* const> places) const {
    auto* scales = reinterpret_cast<std::int32_t*>(message + at.scales_at);
    if (call_.quantize) {
      std::byte* const first = places.empty() ? message + at.row_at : places.front();
      quantize(token, reinterpret_cast<std::uint8_t*>(first), scales, places.empty() ? places : places.subspan(1));
    } else {
      if (places.empty()) std::memcpy(message + at.row_at, source(token), call_.shape.row_bytes);
      ops_.copy_to_all(places.data(), static_cast<int>(places.size()), source(token), call_.shape.row_bytes);
      const TensorView& given = call_.in.scales;
      for (int i = 0; i < call_.shape.num_scales; ++i)
        scales[i] = given.as<const std::int32_t>()[token * given.strides[0] + i * given.strides[1]];
    }
    for (int i = 0; i < call_.shape.num_side; ++i) {
      const std::size_t bytes = call_.shape.side_bytes[i];
      std::memcpy(message + at.side_at[i], call_.in.side[i].as<const std::byte>() + token * bytes, bytes);
    }
  }

 private:
  const std::byte* source(int token) const {
    const TensorView& x = call_.in.x;
    return x.as<const std::byte>() + token * call_.hidden * static_cast<std::int64_t>(item_bytes(x.dtype));
  }

  void quantize(int token, std::uint8_t* codes, std::int32_t* scales, std::span<std::byte* const> copies = {}) const {
    ops_.quantize({.src = source(token),
                   .dtype = call_.in.x.dtype,
                   .hidden = call_.hidden,
                   .codes = codes,
                   .scales = scales,
                   .scale_stride = 1,
                   .kind = call_.scale_kind,
                   .copies = reinterpret_cast<std::uint8_t* const*>(copies.data()),
                   .num_copies = static_cast<int>(copies.size())});
  }

  const DispatchCall& call_;
  const RowOps& ops_;
  std::unique_ptr<std::uint8_t[]> codes_;
  std::unique_ptr<std::int32_t[]> scales_;  // words: float or packed exponents
};

/// Tokens that one worker takes at a time: enough to hide the hand-over, few enough to share evenly.
inline constexpr std::int64_t kTokensPerPiece = 32;

}  // namespace deep_ep::host
