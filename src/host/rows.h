// SPDX-License-Identifier: MIT
// What the host backend does to one row: copy, add, round, convert, quantise. Compiled for more than one instruction
// set and chosen once; every choice gives the same bits (a NaN in FP32 as some NaN).
//
// Rows may have any number of elements, zero included. They are aligned as their type wants; 16 bytes and more is
// fastest. Source and destination do not overlap. "A number type" is bf16, fp16 or fp32; any other DType throws
// kInvalidArgument.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/tensor.h"
#include "plan/fp8.h"

namespace deep_ep::host {

struct QuantizeRow {
  const void* src = nullptr;  // [hidden], a number type
  DType dtype = DType::kBf16;
  std::int64_t hidden = 0;
  std::uint8_t* codes = nullptr;  // [hidden], e4m3
  void* scales = nullptr;  // [num_scales(hidden, kind)]: float, or int32 for kUe8m0 (unused bytes of the last word: 0)
  std::ptrdiff_t scale_stride = 1;  // in scales
  plan::Fp8Scale kind = plan::Fp8Scale::kExact;
  // Further places of the codes, [hidden] each, written as by copy_to_all(): flush() as after copy().
  std::uint8_t* const* copies = nullptr;
  int num_copies = 0;
};

struct DequantizeRow {
  const std::uint8_t* codes = nullptr;  // [hidden], e4m3
  std::int64_t hidden = 0;
  const void* scales = nullptr;  // as in QuantizeRow
  std::ptrdiff_t scale_stride = 1;
  plan::Fp8Scale kind = plan::Fp8Scale::kExact;
  void* dst = nullptr;  // [hidden], a number type: code * scale in FP32, then rounded
  DType dtype = DType::kFp32;
};

// In LogFMT-10 (plan/logfmt.h), placed as plan::EncodedRow says. hidden is a multiple of 8.
struct LogEncodeRow {
  const void* src = nullptr;  // [hidden], a number type
  DType dtype = DType::kBf16;
  std::int64_t hidden = 0;
  std::uint8_t* low = nullptr;     // [hidden]
  std::uint8_t* high = nullptr;    // [hidden / 4]
  std::uint32_t* words = nullptr;  // one for each block
};

struct LogDecodeRow {
  const std::uint8_t* low = nullptr;  // as in LogEncodeRow
  const std::uint8_t* high = nullptr;
  const std::uint32_t* words = nullptr;
  std::int64_t hidden = 0;
  void* dst = nullptr;  // [hidden], a number type
  DType dtype = DType::kBf16;
};

/// Rows of words that become columns, a line of memory wide.
struct TurnRows {
  static constexpr int kRows = 16;
  const std::int32_t* rows[kRows] = {};  // null: its place stays as it is
  std::int64_t n = 0;                    // of each row
  std::int32_t* dst = nullptr;           // word i of row r goes to dst[i * stride + r]
  std::ptrdiff_t stride = 0;
};

struct SumRows {
  const void* const* rows = nullptr;  // [count], each [n] of a number type
  const float* weights = nullptr;     // [count]; null: all rows count once
  int count = 0;
  DType dtype = DType::kBf16;
  std::int64_t n = 0;
  void* dst = nullptr;  // [n], same type
  bool stream = false;  // write past the caches where it pays: for results that are not read at once. flush() as after
                        // copy()
};

struct RowOps {
  const char* isa;  // as EP_HOST_ISA names it

  /// Large rows are written past the caches, for a reader on another core: call flush() before telling it.
  void (*copy)(void* dst, const void* src, std::size_t bytes);
  /// One row to `count` places. Of large rows every other copy stays in the caches: for places that are used again and
  /// again and so are in the last cache anyway, as those of low latency.
  void (*copy_to_all)(std::byte* const* dst, int count, const void* src, std::size_t bytes);
  /// Orders what copy() wrote before any later store of this thread, a release store in particular.
  void (*flush)();
  void (*zero)(void* dst, std::size_t bytes);

  void (*quantize)(const QuantizeRow& row);
  void (*dequantize)(const DequantizeRow& row);
  void (*log_encode)(const LogEncodeRow& row);
  void (*log_decode)(const LogDecodeRow& row);

  /// Past the caches, where all rows are there and columns begin at lines: flush() as after copy().
  void (*turn)(const TurnRows& rows);

  /// dst[i] = the sum of all rows[.][i] in FP32, rounded once at the end. From 0, each row in turn: sum + row[i] or,
  /// with weights, fma(weight, row[i], sum).
  void (*sum)(const SumRows& sum);
  /// dst[i] = src[i], between number types, each value rounded at most once: to nearest, ties to even
  void (*cast)(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::int64_t n);
  /// The sum of a[i] * b[i] in FP32, in this order everywhere: lane l of 16 takes the elements i = l, l + 16, l + 32,
  /// ... in turn by lane = fma(a[i], b[i], lane), from 0; then the lanes are added 0 to 15: ((lane0 + lane1) + lane2) +
  /// ...
  float (*dot)(const void* a, const void* b, DType dtype, std::int64_t n);
};

/// The best table that this CPU can run, or the one that EP_HOST_ISA (baseline | v3 | v4) asks for. Chosen at the first
/// call. Throws kInvalidArgument where EP_HOST_ISA has another value, kUnsupported where this machine cannot run what
/// it asks for.
const RowOps& row_ops();

/// The choice itself; wanted may be null. For row_ops() and for tests.
const RowOps& choose_row_ops(const char* wanted);

/// The tables. v3 (x86-64 with AVX2, FMA and F16C) and v4 (AVX-512 too) are null where the build or this CPU has none.
const RowOps& baseline_row_ops();
const RowOps* v3_row_ops();
const RowOps* v4_row_ops();

}  // namespace deep_ep::host
