// SPDX-License-Identifier: MIT
// Kinds of exchanges, their inputs, and what is kept of their results to be compared with the host backend's.
#pragma once

#include <sstream>

#include "gpu.h"

namespace deep_ep::test {

struct Case {
  int ranks = 2;
  int tokens = 40;
  std::int64_t hidden = 256;
  int topk = 4;
  int experts = 16;
  DType dtype = DType::kBf16;
  OutputLayout layout = OutputLayout::kByRank;
  int alignment = 1;
  bool idx64 = true;
  bool weights = true;
  bool fp8 = false, round_scale = false, ue8m0 = false;
  bool column_major = false;
  int caller_scales = 0;
  int side = 0;
  bool replicas = false;
  bool mask_weights = true;
  int max_rows = 0;
  int sms = 0;
  bool specials = false;    // NaN and infinities among the values
  bool every_peak = false;  // among the groups of 128 channels every finite largest magnitude of a 16-bit type
  std::vector<int> nodes = {};
  std::string network = {};  // between these; none: they share memory
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.ranks << " ranks, " << c.tokens << " tokens of " << c.hidden << " " << name(c.dtype) << ", top-"
             << c.topk << " of " << c.experts << ", layout " << static_cast<int>(c.layout) << ", fp8 " << c.fp8
             << c.round_scale << c.ue8m0 << ", column-major " << c.column_major << ", max_rows " << c.max_rows;
}

// One rank's inputs in ordinary memory.
struct Inputs {
  Tensor x, scales, idx, weights, side, home_weights, bias;
};

inline Tensor random_bytes(std::mt19937& random, DType dtype, std::initializer_list<std::int64_t> shape) {
  Tensor tensor = Tensor::allocate(dtype, shape);
  for (std::size_t i = 0; i < tensor.bytes(); ++i) tensor.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(random());
  return tensor;
}

inline std::uint16_t half_bits(float x) {  // of a small positive normal number
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (((bits >> 13) - (112 << 10)) & 0x7fff));
}

inline Tensor random_numbers(std::mt19937& random, DType dtype, std::initializer_list<std::int64_t> shape,
                             bool specials = false) {
  Tensor tensor = Tensor::allocate(dtype, shape);
  if (dtype == DType::kU8 || dtype == DType::kFp8E4m3) return random_bytes(random, dtype, shape);
  std::uniform_real_distribution<float> range(-3, 3);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    float x = range(random);
    if (std::abs(x) < 0.01f) x = 0.5f;
    if (random() % 64 == 0) x *= 1000;
    const unsigned special = specials ? random() % 997 : 999;
    if (dtype == DType::kFp32) {
      tensor.as<float>()[i] = special == 0 ? NAN : special == 1 ? -INFINITY : special == 2 ? -0.0f : x;
    } else if (dtype == DType::kBf16) {
      std::uint32_t bits;
      std::memcpy(&bits, &x, 4);
      tensor.as<std::uint16_t>()[i] = special == 0   ? 0xffc1
                                      : special == 1 ? 0xff80
                                      : special == 2 ? 0x8000
                                                     : bits >> 16;
    } else {
      tensor.as<std::uint16_t>()[i] = special == 0 ? 0xfe01 : special == 1 ? 0x7c00 : special == 2 ? 3 : half_bits(x);
    }
  }
  return tensor;
}

// Each group's first channel is its largest; over all ranks' groups that is every number in turn.
inline void fill_with_peaks(std::mt19937& random, const Case& c, int rank, const Tensor& x) {
  constexpr std::int64_t kGroup = 128;
  const int finite = c.dtype == DType::kFp16 ? 0x7c00 : 0x7f80;
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const auto peak = static_cast<unsigned>((i + rank * x.numel()) / kGroup % finite);
    const unsigned magnitude = i % kGroup == 0 ? peak : random() % (peak + 1);
    x.as<std::uint16_t>()[i] = static_cast<std::uint16_t>(magnitude | (random() % 2) << 15);
  }
}

inline Inputs inputs_of(const Case& c, int rank) {
  std::mt19937 random(static_cast<unsigned>(rank * 7919 + c.hidden + c.topk * 31));
  const int tokens = rank == 1 && c.tokens > 3 ? c.tokens - 3 : c.tokens;
  Inputs in;
  in.x = random_numbers(random, c.dtype, {tokens, c.hidden}, c.specials);
  if (c.every_peak) fill_with_peaks(random, c, rank, in.x);
  in.idx = Tensor::allocate(c.idx64 ? DType::kI64 : DType::kI32, {tokens, c.topk});
  for (std::int64_t i = 0; i < in.idx.numel(); ++i) {
    const int id = random() % 8 == 0 ? -1 : static_cast<int>(random() % c.experts);
    if (c.idx64) {
      in.idx.as<std::int64_t>()[i] = id;
    } else {
      in.idx.as<std::int32_t>()[i] = id;
    }
  }
  if (c.weights) in.weights = random_numbers(random, DType::kFp32, {tokens, c.topk});
  if (c.caller_scales > 0) in.scales = random_bytes(random, DType::kI32, {tokens, c.caller_scales});
  if (c.side > 0) in.side = random_bytes(random, DType::kI32, {tokens, c.side});
  in.home_weights = random_numbers(random, DType::kFp32, {tokens, c.topk});
  in.bias = random_numbers(random, c.dtype, {tokens, c.hidden});
  return in;
}

inline std::shared_ptr<const Placement> placement_of(const Case& c) {
  std::vector<std::vector<int>> hosted(c.ranks);
  for (int expert = 0; expert < c.experts; ++expert) {
    hosted[expert % c.ranks].push_back(expert);
    if (expert % 3 == 0 && c.ranks > 1) hosted[(expert + 1) % c.ranks].push_back(expert);
  }
  return Placement::from_lists(hosted, c.experts, Placement::Policy::kLocalFirst);
}

// What is compared, by name; rows of kPadded that nothing came for are not.
using Result = std::vector<std::pair<std::string, std::vector<std::byte>>>;

inline void keep(Result& result, const std::string& name, const TensorView& tensor) {
  if (!tensor.given()) return;
  auto bytes = bytes_of(tensor);
  // A NaN of arithmetic is a NaN; its bits are the machine's choice where rows are FP32.
  for (std::size_t i = 0; tensor.dtype == DType::kFp32 && i < bytes.size() / 4; ++i) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    if (value != value) std::memset(bytes.data() + 4 * i, 0xff, 4);
  }
  result.emplace_back(name, std::move(bytes));
}

// Zeroes rows that hold nothing, in a copy: undefined on both sides.
inline void keep_rows(Result& result, const std::string& name, const TensorView& tensor, const Handle& handle,
                      std::int64_t valid) {
  if (!tensor.given()) return;
  std::vector<std::byte> bytes = bytes_of(tensor);
  if (handle.layout == OutputLayout::kPadded) {
    const auto counts = bytes_of(handle.slot_rows);
    const std::int64_t rows = tensor.shape[1], slots = tensor.shape[0];
    const std::int64_t words = slots * rows > 0 ? static_cast<std::int64_t>(bytes.size()) / (slots * rows) : 0;
    for (std::int64_t s = 0; s < slots; ++s)
      for (std::int64_t r = reinterpret_cast<const std::int32_t*>(counts.data())[s]; r < rows; ++r) {
        if (tensor.ndim == 3 && tensor.strides[2] != 1) {
          for (std::int64_t j = 0; j < tensor.shape[2]; ++j)
            std::memset(bytes.data() + 4 * (s * tensor.strides[0] + r * tensor.strides[1] + j * tensor.strides[2]), 0,
                        4);
        } else {
          std::memset(bytes.data() + (s * rows + r) * words, 0, words);
        }
      }
  } else if (tensor.ndim == 2 && tensor.strides[1] != 1 && tensor.shape[1] > 1) {
    std::vector<std::byte> dense;  // column-major: only what the view shows, the alignment's gap is nobody's
    std::vector<std::byte> all(4 * static_cast<std::size_t>(tensor.strides[1] * tensor.shape[1]));
    if (!all.empty()) device::copy(all.data(), tensor.data, all.size());
    for (std::int64_t i = 0; i < valid; ++i)
      for (std::int64_t j = 0; j < tensor.shape[1]; ++j) {
        const std::byte* at = all.data() + 4 * (i * tensor.strides[0] + j * tensor.strides[1]);
        dense.insert(dense.end(), at, at + 4);
      }
    bytes = dense;
  } else if (tensor.shape[0] > 0) {
    bytes.resize(bytes.size() / tensor.shape[0] * valid);
  }
  result.emplace_back(name, std::move(bytes));
}

/// Compares what two backends gave each rank, name by name.
inline void expect_equal(const std::vector<Result>& host, const std::vector<Result>& device) {
  for (std::size_t rank = 0; rank < host.size(); ++rank) {
    ASSERT_EQ(host[rank].size(), device[rank].size());
    for (std::size_t i = 0; i < host[rank].size(); ++i) {
      const auto& [what, expected] = host[rank][i];
      const auto& seen = device[rank][i].second;
      ASSERT_EQ(expected.size(), seen.size()) << what << " of rank " << rank;
      if (expected == seen) continue;
      std::size_t at = 0;
      while (expected[at] == seen[at]) ++at;
      ADD_FAILURE() << what << " of rank " << rank << " differs first at byte " << at << " of " << expected.size()
                    << ": " << static_cast<int>(expected[at]) << " on the host, " << static_cast<int>(seen[at])
                    << " on the GPU";
      break;
    }
  }
}

}  // namespace deep_ep::test
