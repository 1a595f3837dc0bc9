// SPDX-License-Identifier: MIT
// Wire formats of rows: every instruction set against the oracle, and the errors that include/deep_ep/buffer.h
// promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "host/wire_rows.h"
#include "oracle_numbers.h"
#include "row_tables.h"

namespace deep_ep::host {
namespace {

constexpr WireFormat kFormats[] = {WireFormat::kLogFmt10, WireFormat::kFp8};
constexpr DType kTypes[] = {DType::kBf16, DType::kFp16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallestNormal = 0x1p-126f;

// Rows by what is hard about them. Values still have to be rounded to the row's type.
struct Kind {
  const char* name;
  float (*value)(std::mt19937& random, std::int64_t channel);
};

float normal(std::mt19937& random) { return std::normal_distribution<float>()(random); }

const Kind kKinds[] = {
    {"random", [](std::mt19937& random, std::int64_t) { return normal(random); }},
    {"spread", [](std::mt19937& random, std::int64_t) { return normal(random) * std::exp(4.0f * normal(random)); }},
    {"zeros of both signs", [](std::mt19937&, std::int64_t i) { return i % 3 == 0 ? -0.0f : 0.0f; }},
    {"one magnitude", [](std::mt19937&, std::int64_t i) { return i % 2 == 0 ? -0.15625f : 0.15625f; }},
    {"one huge value",
     [](std::mt19937& random, std::int64_t i) { return i % 128 == 5 ? 6e4f : 1e-3f * normal(random); }},
    {"one value, else zeros", [](std::mt19937&, std::int64_t i) { return i % 128 == 127 ? -3.0f : 0.0f; }},
    {"sixteen octaves and more",
     [](std::mt19937&, std::int64_t i) { return std::ldexp(1.3f, static_cast<int>(i % 31) - 16); }},
    {"subnormal", [](std::mt19937& random, std::int64_t) { return normal(random) * 1e-39f; }},
    {"about the smallest normal", [](std::mt19937& random, std::int64_t) { return normal(random) * kSmallestNormal; }},
    {"the largest", [](std::mt19937& random, std::int64_t) { return 3.39e38f * (normal(random) > 0 ? 1.0f : -0.9f); }},
    {"all exponents", [](std::mt19937& random,
                         std::int64_t) { return std::ldexp(normal(random), static_cast<int>(random() % 250) - 125); }},
    {"some infinite",
     [](std::mt19937& random, std::int64_t i) { return i % 11 == 3 ? (i % 2 == 0 ? kInf : -kInf) : normal(random); }},
    {"all infinite", [](std::mt19937&, std::int64_t) { return kInf; }},
    {"some NaN", [](std::mt19937& random, std::int64_t i) { return i % 13 == 2 ? kNan : normal(random); }},
    {"all NaN", [](std::mt19937&, std::int64_t) { return -kNan; }},
};

class Row {
 public:
  Row(DType dtype, std::int64_t hidden) : dtype_(dtype), bytes_(hidden * item_bytes(dtype)) {}
  Row(DType dtype, std::int64_t hidden, const Kind& kind) : Row(dtype, hidden) {
    std::mt19937 random(static_cast<unsigned>(hidden));
    for (std::int64_t i = 0; i < hidden; ++i)
      oracle::encode(dtype, kind.value(random, i), bytes_.data() + i * item_bytes(dtype));
  }
  std::byte* data() { return bytes_.data(); }
  float operator[](std::int64_t i) const { return oracle::decode(dtype_, bytes_.data() + i * item_bytes(dtype_)); }
  std::vector<float> values() const {
    std::vector<float> all(bytes_.size() / item_bytes(dtype_));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = (*this)[static_cast<std::int64_t>(i)];
    return all;
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

// One row there and back.
struct Crossing {
  Crossing(const RowOps& ops, WireFormat format, DType dtype, std::int64_t hidden, const Kind& kind)
      : row(dtype, hidden, kind), slot(plan::EncodedRow::place(format, hidden).bytes + kCanary, std::byte{0xa5}) {
    auto handle = std::make_shared<Handle>();
    handle->num_topk = 1;
    CombineCall call;
    call.in.wire = format;
    call.in.handle = handle;
    call.hidden = hidden;
    call.dtype = dtype;
    call.row_bytes = static_cast<std::size_t>(hidden) * item_bytes(dtype);
    write_wire_row(call, ops, slot.data(), row.data());
    const WireReader reader(call, ops);
    const std::byte* read = reader.read(slot.data(), 0);
    for (std::int64_t i = 0; i < hidden; ++i) back.push_back(oracle::decode(dtype, read + i * item_bytes(dtype)));
  }
  bool canary_is_whole() const {
    return std::all_of(slot.end() - kCanary, slot.end(), [](std::byte b) { return b == std::byte{0xa5}; });
  }

  static constexpr int kCanary = 32;
  Row row;
  std::vector<std::byte> slot;
  std::vector<float> back;
};

template <class Body>  // body(crossing, format, dtype, where)
void for_each_crossing(const Body& body) {
  for (const RowOps* ops : tables()) {
    for (const WireFormat format : kFormats) {
      for (const DType dtype : kTypes) {
        for (const std::int64_t hidden : {8, 16, 120, 128, 136, 256, 264, 7168}) {
          for (const Kind& kind : kKinds) {
            const Crossing crossing(*ops, format, dtype, hidden, kind);
            const std::string where = std::string(ops->isa) + " " + name(format) + " " + name(dtype) + " hidden " +
                                      std::to_string(hidden) + ", " + kind.name;
            body(crossing, format, dtype, where);
            if (testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

TEST(Wire, what_comes_back_is_what_the_oracle_says) {
  for_each_crossing([](const Crossing& crossing, WireFormat format, DType dtype, const std::string& where) {
    const std::vector<float> want = oracle::after_crossing(format, dtype, crossing.row.values());
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_TRUE(same(crossing.back[i], want[i])) << where << " at " << i << ": " << crossing.row.values()[i]
                                                   << " came back as " << crossing.back[i] << ", not " << want[i];
    ASSERT_TRUE(crossing.canary_is_whole()) << where;
  });
}

TEST(Wire, every_instruction_set_writes_the_same_bytes) {
  for (const RowOps* ops : tables()) {
    for (const WireFormat format : kFormats) {
      for (const DType dtype : kTypes) {
        for (const Kind& kind : kKinds) {
          const Crossing got(*ops, format, dtype, 1032, kind), want(baseline_row_ops(), format, dtype, 1032, kind);
          EXPECT_EQ(got.slot, want.slot) << ops->isa << " " << name(format) << " " << kind.name;
        }
      }
    }
  }
}

struct Extremes {
  float largest = 0.0f, smallest = kInf;  // finite magnitudes that are not 0
};

Extremes block_of(const Crossing& crossing, std::size_t channel) {
  Extremes block;
  const std::vector<float> row = crossing.row.values();
  const std::size_t first = channel / 128 * 128;
  for (std::size_t i = first; i < std::min(first + 128, row.size()); ++i) {
    if (!std::isfinite(row[i]) || row[i] == 0.0f) continue;
    block.largest = std::max(block.largest, std::fabs(row[i]));
    block.smallest = std::min(block.smallest, std::fabs(row[i]));
  }
  return block;
}

// Half a unit in the last place of a value in this type.
float rounding(DType dtype, float x) {
  const int mantissa_bits = dtype == DType::kBf16 ? 7 : 10;
  const int lowest_exponent = dtype == DType::kBf16 ? -126 : -14;
  return std::ldexp(0.5f, std::max(x != 0.0f ? std::ilogb(x) : lowest_exponent, lowest_exponent) - mantissa_bits);
}

TEST(Wire, logfmt_keeps_its_error_bound) {
  for_each_crossing([](const Crossing& crossing, WireFormat format, DType dtype, const std::string& where) {
    if (format != WireFormat::kLogFmt10 || crossing.back.size() > 1024) return;
    for (std::size_t i = 0; i < crossing.back.size(); ++i) {
      const float x = crossing.row[static_cast<std::int64_t>(i)], y = crossing.back[i];
      if (!std::isfinite(x) || x == 0.0f) {
        ASSERT_TRUE(same(x, y)) << where << " at " << i;
        continue;
      }
      const Extremes block = block_of(crossing, i);
      // Octaves of the piecewise linear logarithm: at most 0.09 more than those of the logarithm, on either side.
      const float octaves = std::min(16.01f, std::log2(block.largest / block.smallest) + 0.18f);
      const float share = std::min(0.016f, std::max(0.0005f, 0.000985f * octaves));
      const float bound = share * std::max(std::fabs(x), kSmallestNormal) + rounding(dtype, y);
      const bool may_vanish = std::fabs(x) < block.largest * 0x1p-16f;
      if (may_vanish && y == 0.0f) continue;
      ASSERT_LE(std::fabs(y - x), bound) << where << " at " << i << ": " << x << " came back as " << y;
    }
  });
}

TEST(Wire, fp8_keeps_its_error_bound) {
  for_each_crossing([](const Crossing& crossing, WireFormat format, DType dtype, const std::string& where) {
    if (format != WireFormat::kFp8 || crossing.back.size() > 1024) return;
    const std::vector<float> row = crossing.row.values();
    for (std::size_t i = 0; i < row.size(); ++i) {
      const auto first = row.begin() + static_cast<std::ptrdiff_t>(i / 128 * 128);
      const auto end = row.begin() + static_cast<std::ptrdiff_t>(std::min(i / 128 * 128 + 128, row.size()));
      if (std::isnan(row[i]) || std::any_of(first, end, [](float x) { return std::isinf(x); })) {
        ASSERT_TRUE(std::isnan(crossing.back[i])) << where << " at " << i;
        continue;
      }
      const float largest = std::max(block_of(crossing, i).largest, 1e-4f);
      // FP32 rounds the product with the scale: a hair more.
      const float bound =
          std::max(std::fabs(row[i]) / 16.0f, largest * 0x1p-18f) * 1.0001f + rounding(dtype, crossing.back[i]);
      ASSERT_LE(std::fabs(crossing.back[i] - row[i]), bound) << where << " at " << i << ": " << row[i];
    }
  });
}

TEST(Wire, logfmt_returns_a_bf16_block_of_less_than_four_octaves_as_it_was) {
  const Kind narrow{"3.9 octaves", [](std::mt19937& random, std::int64_t) {
                      const std::int32_t bits = (120 << 23) + static_cast<std::int32_t>(random() % (39u << 23) / 10);
                      float x = 0;
                      std::memcpy(&x, &bits, sizeof x);
                      return random() % 2 == 0 ? x : -x;
                    }};
  for (const RowOps* ops : tables()) {
    const Crossing crossing(*ops, WireFormat::kLogFmt10, DType::kBf16, 7168, narrow);
    EXPECT_EQ(crossing.back, crossing.row.values()) << ops->isa;
  }
}

TEST(Wire, logfmt_errs_by_less_than_half_a_percent_on_normal_rows) {
  const Crossing crossing(row_ops(), WireFormat::kLogFmt10, DType::kBf16, 7168, kKinds[0]);
  double error = 0, size = 0;
  for (std::size_t i = 0; i < crossing.back.size(); ++i) {
    const double x = crossing.row[static_cast<std::int64_t>(i)];
    error += (crossing.back[i] - x) * (crossing.back[i] - x);
    size += x * x;
  }
  EXPECT_LT(std::sqrt(error / size), 0.005);
  EXPECT_GT(std::sqrt(error / size), 0.001);  // ten bits do not hold it all
}

TEST(Wire, an_encoded_row_is_never_longer_than_the_row) {
  for (const WireFormat format : kFormats) {
    for (std::int64_t hidden = 8; hidden <= 16384; hidden += 8) {
      const auto at = plan::EncodedRow::place(format, hidden);
      ASSERT_LE(plan::align_up(at.bytes, 16), static_cast<std::size_t>(hidden) * 2) << name(format) << " " << hidden;
      ASSERT_EQ(at.words_at % 4, 0u);
    }
  }
  EXPECT_EQ(plan::wire_row_bytes(WireFormat::kLogFmt10, 7168, 14336), 9184u);
  EXPECT_EQ(plan::wire_row_bytes(WireFormat::kFp8, 7168, 14336), 7392u);
  EXPECT_EQ(plan::wire_row_bytes(WireFormat::kAsIs, 7168, 14336), 14336u);
}

}  // namespace
}  // namespace deep_ep::host
