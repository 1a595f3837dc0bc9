// SPDX-License-Identifier: MIT
// Every row operation of every instruction set against plain loops over plan/number.h, and the FP8 rule against double
// arithmetic.
#include "host/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "deep_ep/error.h"
#include "plan/fp8.h"
#include "plan/number.h"
#include "row_tables.h"

namespace deep_ep::host {
namespace {

using plan::Fp8Scale;

constexpr DType kNumberTypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};
constexpr Fp8Scale kScaleKinds[] = {Fp8Scale::kExact, Fp8Scale::kPowerOfTwo, Fp8Scale::kUe8m0};
constexpr std::int64_t kLengths[] = {0,  1,   3,   7,   8,   9,   15,  16,  17,  31,
                                     33, 100, 127, 128, 129, 264, 511, 512, 640, 7168};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float at(const void* row, DType dtype, std::int64_t i) {
  if (dtype == DType::kBf16) return plan::from_bf16(static_cast<const std::uint16_t*>(row)[i]);
  if (dtype == DType::kFp16) return plan::from_fp16(static_cast<const std::uint16_t*>(row)[i]);
  return static_cast<const float*>(row)[i];
}

void set(void* row, DType dtype, std::int64_t i, float x) {
  if (dtype == DType::kBf16) {
    static_cast<std::uint16_t*>(row)[i] = plan::to_bf16(x);
  } else if (dtype == DType::kFp16) {
    static_cast<std::uint16_t*>(row)[i] = plan::to_fp16(x);
  } else {
    static_cast<float*>(row)[i] = x;
  }
}

// A row with what breaks kernels strewn in. Aligned to 16 bytes and no better, with a canary behind its end.
class Row {
 public:
  static constexpr std::uint8_t kCanary = 0xa5;
  Row(DType dtype, std::int64_t n) : dtype_(dtype), n_(n), bytes_(static_cast<std::size_t>(n) * item_bytes(dtype)) {
    storage_.resize(bytes_ + 64 + kCanaryBytes, kCanary);
    const std::size_t off = reinterpret_cast<std::uintptr_t>(storage_.data()) % 32;
    data_ = storage_.data() + (off <= 16 ? 16 - off : 48 - off);  // 16 modulo 32
  }
  Row(DType dtype, std::int64_t n, std::uint32_t seed) : Row(dtype, n) {
    static constexpr float kOdd[] = {0.0f,    -0.0f, kInf,   -kInf,    kNan,     -kNan,  1e-40f,
                                     -1e-45f, 6e-8f, -3e-6f, 65519.0f, 65520.0f, 3.4e38f};
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n; ++i) {
      const bool odd = random() % 16 == 0;
      set(data_, dtype, i,
          odd ? kOdd[random() % std::size(kOdd)]
              : normal(random) * std::ldexp(1.0f, static_cast<int>(random() % 20) - 10));
    }
  }
  Row(const Row&) = delete;
  void* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  std::uint8_t* codes() const { return data_; }
  float operator[](std::int64_t i) const { return at(data_, dtype_, i); }
  std::size_t bytes() const { return bytes_; }
  bool canary_is_whole() const {
    return std::all_of(data_ + bytes_, data_ + bytes_ + kCanaryBytes, [](std::uint8_t b) { return b == kCanary; });
  }
  void expect_equal(const Row& want, const std::string& where) const {
    ASSERT_TRUE(canary_is_whole()) << where;
    for (std::int64_t i = 0; i < n_; ++i) {
      if (dtype_ == DType::kFp32 && std::isnan(want[i])) {
        ASSERT_TRUE(std::isnan((*this)[i])) << where << " at " << i;
        continue;
      }
      const std::size_t item = item_bytes(dtype_);
      ASSERT_EQ(std::memcmp(data_ + i * item, want.data_ + i * item, item), 0)
          << where << " at " << i << ": " << (*this)[i] << " vs " << want[i];
    }
  }

 private:
  static constexpr std::size_t kCanaryBytes = 32;
  DType dtype_;
  std::int64_t n_;
  std::size_t bytes_;
  std::vector<std::uint8_t> storage_;
  std::uint8_t* data_ = nullptr;
};

template <class Body>  // body(ops, dtype, n, where)
void for_each_case(Body body) {
  for (const RowOps* ops : tables()) {
    for (const DType dtype : kNumberTypes) {
      for (const std::int64_t n : kLengths) {
        const std::string where =
            std::string(ops->isa) + " dtype " + std::to_string(static_cast<int>(dtype)) + " n " + std::to_string(n);
        body(*ops, dtype, n, where);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Rows, sum_is_the_chain_of_adds_or_fmas_rounded_once) {
  for_each_case([](const RowOps& ops, DType dtype, std::int64_t n, const std::string& where) {
    const Row a(dtype, n, 11), b(dtype, n, 12), c(dtype, n, 13);
    const Row* const rows[] = {&a, &b, &c};
    const float weights[] = {0.3f, -1.7f, 1.0f};
    for (const int count : {0, 1, 2, 3}) {
      for (const bool weighted : {false, true}) {
        const Row got(dtype, n), want(dtype, n);
        for (std::int64_t i = 0; i < n; ++i) {
          float sum = 0.0f;
          for (int r = 0; r < count; ++r)
            sum = weighted ? std::fma(weights[r], (*rows[r])[i], sum) : sum + (*rows[r])[i];
          set(want.data(), dtype, i, sum);
        }
        const void* const data[] = {a.data(), b.data(), c.data()};
        ops.sum({data, weighted ? weights : nullptr, count, dtype, n, got.data()});
        got.expect_equal(want, where + " rows " + std::to_string(count));
        for (const int skipped : {0, 1, 8, 24}) {  // streamed, from several places inside a line of memory
          const Row streamed(dtype, skipped + n), want_there(dtype, skipped + n);
          const std::size_t skipped_bytes = skipped * item_bytes(dtype);
          std::memcpy(want_there.codes() + skipped_bytes, want.data(), want.bytes());
          ops.sum({data, weighted ? weights : nullptr, count, dtype, n, streamed.codes() + skipped_bytes, true});
          ops.flush();
          streamed.expect_equal(want_there, where + " rows " + std::to_string(count) + " streamed");
        }
      }
    }
  });
}

TEST(Rows, cast_equals_the_conversion_of_each_element_between_all_number_types) {
  for_each_case([](const RowOps& ops, DType from, std::int64_t n, const std::string& where) {
    for (const DType to : kNumberTypes) {
      const Row src(from, n, 6), got(to, n), want(to, n);
      for (std::int64_t i = 0; i < n; ++i) set(want.data(), to, i, src[i]);
      ops.cast(got.data(), to, src.data(), from, n);
      got.expect_equal(want, where);
    }
  });
}

TEST(Rows, dot_adds_in_the_documented_order) {
  for_each_case([](const RowOps& ops, DType dtype, std::int64_t n, const std::string& where) {
    const Row a(dtype, n, 7), b(dtype, n, 8);
    std::vector<float> x(n), y(n);
    for (std::int64_t i = 0; i < n; ++i) {  // finite ones, or most sums would be NaN
      x[i] = std::isfinite(a[i]) && std::fabs(a[i]) < 1e4f ? a[i] : 1.0f;
      y[i] = std::isfinite(b[i]) && std::fabs(b[i]) < 1e4f ? b[i] : 1.0f;
      set(a.data(), dtype, i, x[i]);
      set(b.data(), dtype, i, y[i]);
    }
    float want = 0.0f;
    for (std::int64_t lane = 0; lane < 16; ++lane) {
      float sum = 0.0f;
      for (std::int64_t i = lane; i < n; i += 16) sum = std::fma(x[i], y[i], sum);
      want = lane == 0 ? sum : want + sum;
    }
    EXPECT_EQ(ops.dot(a.data(), b.data(), dtype, n), want) << where;
  });
}

// All codes and all float exponents through whole rows: the vector code has its own conversions.
TEST(Rows, every_code_and_a_million_floats_convert_as_single_elements_do) {
  std::vector<std::uint16_t> codes(65536), narrow(1 << 20);
  std::vector<float> wide(codes.size()), floats(narrow.size());
  std::mt19937 random(9);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint16_t>(i);
  for (float& x : floats) x = plan::float_of(static_cast<std::int32_t>(random()));
  for (const RowOps* ops : tables()) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      ops->cast(wide.data(), DType::kFp32, codes.data(), dtype, static_cast<std::int64_t>(codes.size()));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        ASSERT_EQ(plan::bits_of(wide[i]), plan::bits_of(at(codes.data(), dtype, static_cast<std::int64_t>(i))))
            << ops->isa << " code " << i;
      }
      ops->cast(narrow.data(), dtype, floats.data(), DType::kFp32, static_cast<std::int64_t>(floats.size()));
      for (std::size_t i = 0; i < floats.size(); ++i) {
        const std::uint16_t want = dtype == DType::kBf16 ? plan::to_bf16(floats[i]) : plan::to_fp16(floats[i]);
        ASSERT_EQ(narrow[i], want) << ops->isa << " " << std::hexfloat << floats[i];
      }
    }
  }
}

TEST(Rows, copy_and_zero_touch_their_bytes_and_no_others) {
  for (const RowOps* ops : tables()) {
    for (const std::int64_t bytes : {0, 1, 16, 48, 1024, 2032, 2048, 2064, 4096, 14336, 14337, 40000}) {
      const Row src(DType::kU8, bytes), dst(DType::kU8, bytes);
      for (std::int64_t i = 0; i < bytes; ++i) src.codes()[i] = static_cast<std::uint8_t>(i * 31 + 7);
      ops->copy(dst.data(), src.data(), dst.bytes());
      ops->flush();
      EXPECT_EQ(std::memcmp(dst.data(), src.data(), dst.bytes()), 0) << ops->isa << " " << bytes;
      EXPECT_TRUE(dst.canary_is_whole()) << ops->isa << " " << bytes;
      ops->zero(dst.data(), dst.bytes());
      EXPECT_TRUE(std::all_of(dst.codes(), dst.codes() + bytes, [](std::uint8_t b) { return b == 0; }));
      EXPECT_TRUE(dst.canary_is_whole()) << ops->isa << " " << bytes;
    }
  }
}

TEST(Rows, copy_to_all_writes_every_place_whole_and_nothing_beside) {
  for (const RowOps* ops : tables()) {
    for (const std::int64_t bytes : {0, 48, 2032, 2048, 2064, 7168, 14337}) {
      for (int count = 0; count <= 5; ++count) {
        const Row src(DType::kU8, bytes);
        for (std::int64_t i = 0; i < bytes; ++i) src.codes()[i] = static_cast<std::uint8_t>(i * 31 + 7);
        constexpr std::int64_t kApart = 16384 + 16;  // from the second place on, no two begin alike in their lines
        std::vector<std::uint8_t> memory(5 * kApart + 64, Row::kCanary);
        std::uint8_t* line = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
        std::vector<std::uint8_t> want = memory;
        std::vector<std::byte*> places;
        for (int i = 0; i < count; ++i) {
          places.push_back(reinterpret_cast<std::byte*>(line + i * kApart));
          std::copy_n(src.codes(), bytes, want.data() + (line - memory.data()) + i * kApart);
        }
        ops->copy_to_all(places.data(), count, src.data(), src.bytes());
        ops->flush();
        EXPECT_EQ(memory, want) << ops->isa << " " << bytes << " bytes to " << count;
      }
    }
  }
}

TEST(Rows, turn_makes_columns_of_the_rows_that_are_there) {
  for (const RowOps* ops : tables()) {
    for (const std::ptrdiff_t stride : {16, 20, 32, 48}) {
      for (const std::ptrdiff_t first : {0, 4}) {  // words from a line's start
        for (const int there : {0xffff, 0x7fff, 0x0001, 0x8421}) {
          constexpr std::int64_t kColumns = 7;
          std::vector<std::int32_t> in(16 * kColumns), memory(48 * (kColumns + 2), -1);
          std::iota(in.begin(), in.end(), 100);
          std::int32_t* line = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) / 4;
          TurnRows rows;
          for (int r = 0; r < 16; ++r) rows.rows[r] = (there >> r & 1) != 0 ? in.data() + r * kColumns : nullptr;
          rows.n = kColumns;
          rows.dst = line + first;
          rows.stride = stride;
          std::vector<std::int32_t> want = memory;
          for (int r = 0; r < 16; ++r)
            for (int i = 0; i < kColumns && rows.rows[r] != nullptr; ++i)
              want[rows.dst - memory.data() + i * stride + r] = in[r * kColumns + i];
          ops->turn(rows);
          ops->flush();
          EXPECT_EQ(memory, want) << ops->isa << " stride " << stride << " from " << first << " there " << there;
        }
      }
    }
  }
}

struct Quantized {
  std::vector<std::uint8_t> codes;
  std::vector<std::int32_t> words;  // scales as stored, stride 3, the gaps left at -1
};

Quantized quantize(const RowOps& ops, const Row& row, DType dtype, std::int64_t hidden, Fp8Scale kind) {
  Quantized q{std::vector<std::uint8_t>(hidden + 8, 0xa5),
              std::vector<std::int32_t>(plan::num_scales(hidden, kind) * 3 + 1, -1)};
  // Further places, whose lines are those of memory or are not: each first and second of a pair, and one that has none.
  const std::int64_t lines = (hidden + 63) / 64 * 64 + 64;
  const Row places(DType::kU8, 5 * lines + 256);
  std::uint8_t* const line = places.codes() + (64 - reinterpret_cast<std::uintptr_t>(places.codes()) % 64);
  std::uint8_t* copies[] = {line, line + lines + 48, line + 2 * lines + 48, line + 4 * lines, line + 3 * lines + 48};
  ops.quantize({row.data(), dtype, hidden, q.codes.data(), q.words.data(), 3, kind, copies, 5});
  ops.flush();
  for (const std::uint8_t* copy : copies) {
    EXPECT_TRUE(std::equal(copy, copy + hidden, q.codes.begin())) << ops.isa << " hidden " << hidden;
    EXPECT_TRUE(std::all_of(copy + hidden, copy + hidden + 16, [](std::uint8_t b) { return b == Row::kCanary; }));
  }
  return q;
}

// scale and factor of a group from the words of the rule, in double and libm where the implementation uses FP32 and
// bits.
plan::Fp8Scaling rule(float amax, Fp8Scale kind) {
  const float floored = std::fmax(amax, 1e-4f);
  const float exact = floored * (1.0f / 448.0f);
  if (kind == Fp8Scale::kExact) return {exact, 448.0f / floored};
  const double e = std::ceil(std::log2(static_cast<double>(exact)));
  return {static_cast<float>(std::exp2(e)), static_cast<float>(std::exp2(-e))};
}

float stored_scale(const Quantized& q, std::int64_t group, Fp8Scale kind) {
  if (kind != Fp8Scale::kUe8m0) return plan::float_of(q.words[group * 3]);
  const std::uint32_t word = static_cast<std::uint32_t>(q.words[group / 4 * 3]);
  return static_cast<float>(std::ldexp(1.0, static_cast<int>((word >> (8 * (group % 4))) & 0xffu) - 127));
}

void expect_rule(const Quantized& q, const std::vector<float>& x, Fp8Scale kind, const std::string& where) {
  const std::int64_t hidden = static_cast<std::int64_t>(x.size());
  for (std::int64_t begin = 0; begin < hidden; begin += 128) {
    const std::int64_t end = std::min(begin + 128, hidden);
    float amax = 0.0f;
    for (std::int64_t i = begin; i < end; ++i) amax = std::fmax(amax, std::fabs(x[i]));  // fmax leaves NaN out
    const plan::Fp8Scaling want = rule(amax, kind);
    ASSERT_EQ(stored_scale(q, begin / 128, kind), want.scale) << where << " group " << begin / 128 << " amax " << amax;
    for (std::int64_t i = begin; i < end; ++i) {
      const float product = x[i] * want.factor;
      const std::uint8_t sign = std::signbit(x[i]) ? 0x80 : 0;
      const std::uint8_t code = std::isnan(product) ? sign | 0x7f : plan::to_e4m3(product);
      ASSERT_EQ(q.codes[i], code) << where << " at " << i << " x " << x[i];
    }
  }
  for (std::size_t i = 0; i < q.words.size(); ++i) {
    const bool is_scale = i % 3 == 0 && i / 3 < static_cast<std::size_t>(plan::num_scales(hidden, kind));
    if (!is_scale) {
      ASSERT_EQ(q.words[i], -1) << where << " gap " << i;
    }
  }
  for (std::int64_t i = hidden; i < hidden + 8; ++i) ASSERT_EQ(q.codes[i], 0xa5) << where;
}

TEST(Rows, quantize_follows_the_rule_for_odd_values_too) {
  for_each_case([](const RowOps& ops, DType dtype, std::int64_t n, const std::string& where) {
    const Row row(dtype, n, 10);
    std::vector<float> x(n);
    for (std::int64_t i = 0; i < n; ++i) x[i] = row[i];
    for (const Fp8Scale kind : kScaleKinds) expect_rule(quantize(ops, row, dtype, n, kind), x, kind, where);
  });
}

// One finite magnitude for each group, over the whole range and at powers of two times 448, where ceil(log2) turns.
TEST(Rows, quantize_follows_the_rule_over_the_whole_range_of_magnitudes) {
  for (const RowOps* ops : tables()) {
    for (int exponent = -126; exponent < 128; ++exponent) {
      const Row row(DType::kFp32, 512);
      std::vector<float> x(512);
      const float edge = std::ldexp(448.0f, exponent - 8);
      for (int group = 0; group < 4; ++group) {
        const float top = group == 0   ? edge
                          : group == 1 ? std::nextafterf(edge, kInf)
                          : group == 2 ? std::nextafterf(edge, 0.0f)
                                       : edge * 1.37f;
        for (int i = 0; i < 128; ++i)
          x[group * 128 + i] = row.floats()[group * 128 + i] = top * static_cast<float>(i - 64) / 64.0f;
      }
      for (const Fp8Scale kind : kScaleKinds) {
        expect_rule(quantize(*ops, row, DType::kFp32, 512, kind), x, kind,
                    std::string(ops->isa) + " 2^" + std::to_string(exponent));
      }
    }
  }
}

// Row for row and in every mode the tables agree, NaN codes included.
TEST(Rows, every_table_quantizes_to_the_same_bytes) {
  for_each_case([](const RowOps& ops, DType dtype, std::int64_t n, const std::string& where) {
    const Row row(dtype, n, 11);
    for (const Fp8Scale kind : kScaleKinds) {
      const Quantized got = quantize(ops, row, dtype, n, kind);
      const Quantized want = quantize(baseline_row_ops(), row, dtype, n, kind);
      EXPECT_EQ(got.codes, want.codes) << where;
      EXPECT_EQ(got.words, want.words) << where;
    }
  });
}

TEST(Rows, unused_bytes_of_the_last_ue8m0_word_are_zero) {
  const Row row(DType::kFp32, 640);
  std::fill(row.floats(), row.floats() + 640, 448.0f);
  for (const RowOps* ops : tables()) {
    const Quantized q = quantize(*ops, row, DType::kFp32, 640, Fp8Scale::kUe8m0);
    EXPECT_EQ(q.words[0], 0x7f7f7f7f);
    EXPECT_EQ(q.words[3], 0x0000007f);
  }
}

TEST(Rows, dequantize_multiplies_every_code_by_its_scale) {
  for_each_case([](const RowOps& ops, DType dtype, std::int64_t n, const std::string& where) {
    std::vector<std::uint8_t> codes(n);
    for (std::int64_t i = 0; i < n; ++i)
      codes[i] = static_cast<std::uint8_t>(i * 5 + 3);  // all 256 of them in 256 elements
    for (const Fp8Scale kind : kScaleKinds) {
      std::vector<std::int32_t> words(plan::num_scales(n, kind) * 2 + 1);
      for (std::size_t i = 0; i < words.size(); ++i) {
        words[i] = kind == Fp8Scale::kUe8m0 ? static_cast<std::int32_t>(0x7e807c7fu + i)
                                            : plan::bits_of(0.001f * static_cast<float>(i + 1));
      }
      const Row got(dtype, n), want(dtype, n);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t group = i / 128;
        const float scale = kind == Fp8Scale::kUe8m0
                                ? std::ldexp(1.0f, ((words[group / 4 * 2] >> (8 * (group % 4))) & 0xff) - 127)
                                : plan::float_of(words[group * 2]);
        set(want.data(), dtype, i, plan::from_e4m3(codes[i]) * scale);
      }
      ops.dequantize({codes.data(), n, words.data(), 2, kind, got.data(), dtype});
      got.expect_equal(want, where);
    }
  });
}

// Half a step of e4m3 is 1/16 of a normal value; below its normals half a step is 2^-10, of the scale. FP32 rounding
// adds a hair to either.
TEST(Rows, a_round_trip_through_fp8_stays_within_half_a_step) {
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  constexpr std::int64_t kHidden = 7168;
  const Row row(DType::kFp32, kHidden), back(DType::kFp32, kHidden);
  for (std::int64_t i = 0; i < kHidden; ++i) row.floats()[i] = normal(random) * std::exp(2.0f * normal(random));
  for (const RowOps* ops : tables()) {
    for (const Fp8Scale kind : kScaleKinds) {
      const Quantized q = quantize(*ops, row, DType::kFp32, kHidden, kind);
      ops->dequantize({q.codes.data(), kHidden, q.words.data(), 3, kind, back.data(), DType::kFp32});
      for (std::int64_t i = 0; i < kHidden; ++i) {
        const float scale = stored_scale(q, i / 128, kind);
        const float bound = std::max(std::fabs(row[i]) / 16.0f, scale * std::ldexp(1.0f, -10)) * 1.0001f;
        ASSERT_LE(std::fabs(back[i] - row[i]), bound) << ops->isa << " at " << i;
      }
    }
  }
}

TEST(Rows, a_type_that_is_no_number_is_refused) {
  const Row dst(DType::kFp32, 8), row(DType::kFp32, 8);
  const void* const rows[] = {row.data()};
  for (const RowOps* ops : tables()) {
    for (const DType dtype : {DType::kU8, DType::kFp8E4m3, DType::kI32, DType::kI64, DType::kBool}) {
      try {
        ops->sum({rows, nullptr, 1, dtype, 8, dst.data()});
        ADD_FAILURE() << ops->isa << " accepted " << static_cast<int>(dtype);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      }
    }
  }
}

TEST(Rows, the_wanted_table_is_the_one_that_runs) {
  EXPECT_STREQ(choose_row_ops("baseline").isa, "baseline");
  const RowOps& best = choose_row_ops(nullptr);
  EXPECT_EQ(&best, tables().back());
  for (const char* wrong : {"", "V3", "avx512"}) {
    try {
      choose_row_ops(wrong);
      ADD_FAILURE() << "accepted '" << wrong << "'";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find("EP_HOST_ISA"), std::string::npos);
    }
  }
  for (const auto& [name, table] : {std::pair{"v3", v3_row_ops()}, std::pair{"v4", v4_row_ops()}}) {
    if (table != nullptr) {
      EXPECT_EQ(&choose_row_ops(name), table);
      EXPECT_STREQ(table->isa, name);
    } else {
      EXPECT_THROW(choose_row_ops(name), Error);
    }
  }
}

}  // namespace
}  // namespace deep_ep::host
