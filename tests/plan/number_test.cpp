// SPDX-License-Identifier: MIT
// The conversions of plan/number.h against a reference that reads each format's definition in double arithmetic and
// searches its values.
#include "plan/number.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace deep_ep::plan {
namespace {

// A binary format as its definition has it. Values are exact in double.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // else only the all-ones code is special
  int sign_shift() const { return exponent_bits + mantissa_bits; }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kBf16{8, 7, true};
constexpr Format kFp16{5, 10, true};
constexpr Format kE4m3{4, 3, false};

double value(const Format& f, std::uint32_t code) {
  const double sign = (code >> f.sign_shift()) & 1u ? -1.0 : 1.0;
  const int field = static_cast<int>(code >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1);
  const int mantissa = static_cast<int>(code) & ((1 << f.mantissa_bits) - 1);
  const bool top = field == (1 << f.exponent_bits) - 1;
  if (f.has_infinity && top) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  if (!f.has_infinity && top && mantissa == (1 << f.mantissa_bits) - 1) return std::numeric_limits<double>::quiet_NaN();
  if (field == 0) return sign * std::ldexp(mantissa, 1 - f.bias() - f.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << f.mantissa_bits), field - f.bias() - f.mantissa_bits);
}

// The nearest of all finite values by search; an exact middle goes to the even code. One step above the largest counts
// as a value too (as infinity where there is one), which is how IEEE 754 defines overflow.
class Nearest {
 public:
  explicit Nearest(const Format& f) : format_(f) {
    for (std::uint32_t code = 0; std::isfinite(value(f, code)); ++code) values_.push_back(value(f, code));
    const double last_step = values_.back() - values_[values_.size() - 2];
    if (f.has_infinity) values_.push_back(values_.back() + last_step);
  }
  std::uint32_t operator()(float x) const {
    const std::uint32_t sign = std::signbit(x) ? 1u << format_.sign_shift() : 0u;
    const double magnitude = std::fabs(static_cast<double>(x));
    const auto above = std::lower_bound(values_.begin(), values_.end(), magnitude);
    if (above == values_.end()) return sign | static_cast<std::uint32_t>(values_.size() - 1);
    const std::uint32_t high = static_cast<std::uint32_t>(above - values_.begin());
    if (*above == magnitude) return sign | high;
    const double to_high = *above - magnitude;
    const double to_low = magnitude - values_[high - 1];
    if (to_high == to_low) return sign | (high % 2 == 0 ? high : high - 1);
    return sign | (to_high < to_low ? high : high - 1);
  }
  const std::vector<double>& values() const { return values_; }

 private:
  Format format_;
  std::vector<double> values_;  // [code], ascending, signs left out
};

std::uint32_t raw(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float from_raw(std::uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

void expect_same_value(float got, double want, std::uint32_t code) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << code;
    EXPECT_NE(raw(got) & 0x00400000u, 0u) << "signalling NaN from " << code;
    return;
  }
  EXPECT_EQ(raw(got), raw(static_cast<float>(want))) << code;
}

// What a conversion gets wrong first: the values themselves, the middles between neighbours, and the floats next to
// both.
std::vector<float> hard_inputs(const Nearest& nearest) {
  std::vector<float> inputs{0.0f, std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::min(),
                            std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity()};
  const std::vector<double>& values = nearest.values();
  for (std::size_t i = 0; i + 1 < values.size(); ++i) {
    for (const double exact : {values[i], (values[i] + values[i + 1]) / 2}) {
      const float x = static_cast<float>(exact);
      inputs.push_back(x);
      inputs.push_back(std::nextafterf(x, 0.0f));
      inputs.push_back(std::nextafterf(x, std::numeric_limits<float>::infinity()));
    }
  }
  const std::size_t positive = inputs.size();
  for (std::size_t i = 0; i < positive; ++i) inputs.push_back(-inputs[i]);
  return inputs;
}

// Every exponent, mantissas at random.
std::vector<float> random_inputs(int count) {
  std::mt19937 random(7);
  std::vector<float> inputs;
  for (int i = 0; i < count; ++i) {
    const float x = from_raw(static_cast<std::uint32_t>(random()));
    if (!std::isnan(x)) inputs.push_back(x);
  }
  return inputs;
}

template <class Convert>
void expect_nearest(const Format& format, Convert convert) {
  const Nearest nearest(format);
  std::vector<float> inputs = hard_inputs(nearest);
  const std::vector<float> more = random_inputs(300000);
  inputs.insert(inputs.end(), more.begin(), more.end());
  for (const float x : inputs) ASSERT_EQ(convert(x), nearest(x)) << std::hexfloat << x;
}

TEST(Number, every_bf16_code_widens_to_its_value) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    expect_same_value(from_bf16(static_cast<std::uint16_t>(code)), value(kBf16, code), code);
  }
}

TEST(Number, every_fp16_code_widens_to_its_value) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    expect_same_value(from_fp16(static_cast<std::uint16_t>(code)), value(kFp16, code), code);
  }
}

TEST(Number, every_e4m3_code_widens_to_its_value) {
  for (std::uint32_t code = 0; code < 256; ++code) {
    expect_same_value(from_e4m3(static_cast<std::uint8_t>(code)), value(kE4m3, code), code);
  }
}

TEST(Number, every_code_survives_a_round_trip) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const std::uint16_t c = static_cast<std::uint16_t>(code);
    EXPECT_EQ(to_bf16(from_bf16(c)), std::isnan(value(kBf16, code)) ? kBf16Nan : c);
    EXPECT_EQ(to_fp16(from_fp16(c)), std::isnan(value(kFp16, code)) ? kFp16Nan : c);
  }
  for (std::uint32_t code = 0; code < 256; ++code) EXPECT_EQ(to_e4m3(from_e4m3(static_cast<std::uint8_t>(code))), code);
}

TEST(Number, bf16_takes_the_nearest_value_and_even_at_a_tie) {
  expect_nearest(kBf16, [](float x) { return to_bf16(x); });
}

TEST(Number, fp16_takes_the_nearest_value_and_even_at_a_tie) {
  expect_nearest(kFp16, [](float x) { return to_fp16(x); });
}

TEST(Number, e4m3_takes_the_nearest_value_and_even_at_a_tie) {
  expect_nearest(kE4m3, [](float x) { return to_e4m3(x); });
}

TEST(Number, every_kind_of_nan_becomes_the_one_nan_of_its_format) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu}) {
    EXPECT_EQ(to_bf16(from_raw(bits)), kBf16Nan);
    EXPECT_EQ(to_bf16(from_raw(bits | 0x80000000u)), kBf16Nan);
    EXPECT_EQ(to_fp16(from_raw(bits)), kFp16Nan);
    EXPECT_EQ(to_fp16(from_raw(bits | 0x80000000u)), kFp16Nan);
    EXPECT_EQ(to_e4m3(from_raw(bits)), 0x7f);
    EXPECT_EQ(to_e4m3(from_raw(bits | 0x80000000u)), 0xff);
  }
}

TEST(Number, e4m3_saturates_instead_of_reaching_its_nan) {
  for (const float x : {448.0f, 463.99f, 464.0f, 480.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(to_e4m3(x), 0x7e) << x;
    EXPECT_EQ(to_e4m3(-x), 0xfe) << x;
  }
}

TEST(Number, fp16_and_bf16_overflow_to_infinity_exactly_from_the_middle_on) {
  EXPECT_EQ(to_fp16(std::nextafterf(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(to_fp16(65520.0f), 0x7c00);
  EXPECT_EQ(to_bf16(from_raw(0x7f7f7fffu)), 0x7f7f);
  EXPECT_EQ(to_bf16(from_raw(0x7f7f8000u)), 0x7f80);
}

}  // namespace
}  // namespace deep_ep::plan
