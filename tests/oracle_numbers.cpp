// SPDX-License-Identifier: MIT
// The oracle's number formats: each rounding by the definition, in double.
#include "oracle_numbers.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace deep_ep::oracle {

namespace {

// A binary floating-point format: sign, exponent field, mantissa field.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // e4m3 has none: only the all-ones code is special
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int field_mask() const { return (1 << exponent_bits) - 1; }
  int mantissa_mask() const { return (1 << mantissa_bits) - 1; }
};

constexpr Format kBf16Format{8, 7, true};
constexpr Format kFp16Format{5, 10, true};
constexpr Format kE4m3Format{4, 3, false};

float decode_bits(const Format& f, int code) {
  const int sign_bit = 1 << (f.exponent_bits + f.mantissa_bits);
  const float sign = (code & sign_bit) != 0 ? -1.0f : 1.0f;
  const int field = (code >> f.mantissa_bits) & f.field_mask();
  const int mantissa = code & f.mantissa_mask();
  if (field == f.field_mask() && f.has_infinity) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  if (!f.has_infinity && field == f.field_mask() && mantissa == f.mantissa_mask()) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (field == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - f.bias() - f.mantissa_bits);
  return sign * std::ldexp(static_cast<float>(mantissa + (1 << f.mantissa_bits)), field - f.bias() - f.mantissa_bits);
}

int encode_bits(const Format& f, float value) {
  const int largest_field = f.field_mask();
  if (std::isnan(value)) return (largest_field << f.mantissa_bits) | f.mantissa_mask();
  const int sign = std::signbit(value) ? 1 << (f.exponent_bits + f.mantissa_bits) : 0;
  const int beyond =
      f.has_infinity ? largest_field << f.mantissa_bits : ((largest_field << f.mantissa_bits) | f.mantissa_mask()) - 1;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0.0) return sign;
  if (std::isinf(value)) return sign | beyond;
  const int exponent = std::max(std::ilogb(magnitude), 1 - f.bias());
  // In units of the last place. Exact before the rounding: a double holds every float times a power of two.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, f.mantissa_bits - exponent)));
  // The codes of one exponent follow those of the one below, so a mantissa that overflowed simply carries on.
  const int code = ((exponent + f.bias() - 1) << f.mantissa_bits) + units;
  return sign | std::min(code, beyond);
}

std::int32_t magnitude_of(float x) {
  std::int32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

// One block in LogFMT-10 and back: the text of src/plan/logfmt.h, value by value.
void through_logfmt(const float* block, std::int64_t channels, float* back) {
  std::int64_t largest = 0, smallest = 0;
  for (std::int64_t c = 0; c < channels; ++c) {
    if (!std::isfinite(block[c]) || block[c] == 0.0f) continue;
    const std::int64_t magnitude = magnitude_of(block[c]);
    largest = std::max(largest, magnitude);
    smallest = smallest == 0 ? magnitude : std::min(smallest, magnitude);
  }
  const std::int64_t lowest = std::max(smallest, largest - 16 * 8388608) / 65536 * 65536;
  const std::int64_t step = (largest - lowest) / 508 / 8 * 8;
  for (std::int64_t c = 0; c < channels; ++c) {
    const std::int64_t magnitude = magnitude_of(block[c]);
    float value = 0.0f;
    if (!std::isfinite(block[c])) {
      value = std::fabs(block[c]);
    } else if (magnitude >= lowest) {
      const float inverse = step > 0 ? 1.0f / static_cast<float>(step) : 0.0f;
      const float steps = std::nearbyint(static_cast<float>(magnitude - lowest) * inverse);
      const auto bits =
          static_cast<std::int32_t>(lowest + std::min(static_cast<std::int64_t>(steps), std::int64_t{508}) * step);
      std::memcpy(&value, &bits, sizeof value);
    }
    back[c] = std::copysign(value, block[c]);
  }
}

}  // namespace

float decode(DType dtype, const std::byte* item) {
  std::uint16_t two = 0;
  float four = 0.0f;
  switch (dtype) {
    case DType::kFp8E4m3: return decode_bits(kE4m3Format, static_cast<int>(*item));
    case DType::kBf16: std::memcpy(&two, item, sizeof two); return decode_bits(kBf16Format, two);
    case DType::kFp16: std::memcpy(&two, item, sizeof two); return decode_bits(kFp16Format, two);
    case DType::kFp32: std::memcpy(&four, item, sizeof four); return four;
    case DType::kU8:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: break;
  }
  std::abort();  // a mistake in a test
}

void encode(DType dtype, float value, std::byte* item) {
  std::uint16_t two = 0;
  switch (dtype) {
    case DType::kFp8E4m3: *item = static_cast<std::byte>(encode_bits(kE4m3Format, value)); return;
    case DType::kBf16: two = static_cast<std::uint16_t>(encode_bits(kBf16Format, value)); break;
    case DType::kFp16: two = static_cast<std::uint16_t>(encode_bits(kFp16Format, value)); break;
    case DType::kFp32: std::memcpy(item, &value, sizeof value); return;
    case DType::kU8:
    case DType::kI32:
    case DType::kI64:
    case DType::kBool: std::abort();  // a mistake in a test
  }
  std::memcpy(item, &two, sizeof two);
}

// FP8 of one row: codes and one stored word per 128 channels, or per 512 with four exponents in a word.
void quantize(const Fp8Options& options, const Array& x, std::int64_t row, std::byte* codes, std::byte* scales) {
  const std::int64_t hidden = x.shape[1];
  const std::size_t item = item_bytes(x.dtype);
  for (std::int64_t first = 0, group = 0; first < hidden; first += 128, ++group) {
    const std::int64_t last = std::min<std::int64_t>(first + 128, hidden);
    float largest = 1e-4f;
    for (std::int64_t c = first; c < last; ++c) {
      largest = std::fmax(largest, std::fabs(decode(x.dtype, x.row(row) + c * item)));
    }
    const float reciprocal = 1.0f / 448.0f;
    float scale = largest * reciprocal;
    float factor = 448.0f / largest;
    if (options.round_scale) {
      int exponent = std::ilogb(scale);
      if (std::ldexp(1.0f, exponent) < scale) ++exponent;
      scale = std::ldexp(1.0f, exponent);
      factor = std::ldexp(1.0f, -exponent);
    }
    for (std::int64_t c = first; c < last; ++c) {
      encode(DType::kFp8E4m3, decode(x.dtype, x.row(row) + c * item) * factor, codes + c);
    }
    if (options.ue8m0) {
      scales[group] = static_cast<std::byte>(std::ilogb(scale) + 127);
    } else {
      std::memcpy(scales + group * sizeof(float), &scale, sizeof(float));
    }
  }
}

std::int64_t fp8_words(const Fp8Options& options, std::int64_t hidden) {
  const std::int64_t groups = (hidden + 127) / 128;
  return options.ue8m0 ? (groups + 3) / 4 : groups;
}

float rounded(DType dtype, float value) {
  std::array<std::byte, 4> item;
  encode(dtype, value, item.data());
  return decode(dtype, item.data());
}

std::vector<float> after_crossing(WireFormat wire, DType dtype, const std::vector<float>& row) {
  const auto hidden = static_cast<std::int64_t>(row.size());
  std::vector<float> back = row;
  switch (wire) {
    case WireFormat::kAsIs: return back;
    case WireFormat::kLogFmt10:
      for (std::int64_t c = 0; c < hidden; c += 128)
        through_logfmt(row.data() + c, std::min<std::int64_t>(128, hidden - c), back.data() + c);
      break;
    case WireFormat::kFp8: {
      Array x(DType::kFp32, {1, hidden}), scales(DType::kFp32, {1, fp8_words({}, hidden)});
      std::vector<std::byte> codes(row.size());
      std::memcpy(x.bytes.data(), row.data(), x.bytes.size());
      quantize({}, x, 0, codes.data(), scales.bytes.data());
      for (std::int64_t c = 0; c < hidden; ++c)
        back[c] = decode(DType::kFp8E4m3, &codes[c]) * scales.get<float>(c / 128);
      break;
    }
  }
  for (float& value : back) value = rounded(dtype, value);
  return back;
}

}  // namespace deep_ep::oracle
