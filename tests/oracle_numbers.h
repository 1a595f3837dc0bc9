// SPDX-License-Identifier: MIT
// What the oracle knows of number formats beyond oracle.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "oracle.h"

namespace deep_ep::oracle {

// FP8 of one row: codes and one stored word per 128 channels, or per 512 with four exponents in a word.
void quantize(const Fp8Options& options, const Array& x, std::int64_t row, std::byte* codes, std::byte* scales);
std::int64_t fp8_words(const Fp8Options& options, std::int64_t hidden);

// What is left of a value in a type.
float rounded(DType dtype, float value);

// What comes home of a row of `dtype` that crosses in a wire format.
std::vector<float> after_crossing(WireFormat wire, DType dtype, const std::vector<float>& row);

}  // namespace deep_ep::oracle
