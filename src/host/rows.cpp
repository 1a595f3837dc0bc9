// SPDX-License-Identifier: MIT
// Chooses the row operations that fit this CPU, once.
#include "host/rows.h"

#include <cstdlib>
#include <string>
#include <string_view>

#include "deep_ep/error.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace deep_ep::host {

extern const RowOps kBaselineRowOps;  // rows_baseline.cpp
#ifdef __x86_64__
extern const RowOps kV3RowOps;  // rows_v3.cpp
extern const RowOps kV4RowOps;  // rows_v4.cpp
#endif

[[noreturn]] void throw_not_a_number_type(DType dtype);  // declared for rows_impl.h, which this file does not need
void throw_not_a_number_type(DType dtype) {
  throw Error(ErrorCode::kInvalidArgument,
              std::string("dtype of a row to compute with: ") + name(dtype) + " vs bf16, fp16 or fp32");
}

const RowOps& baseline_row_ops() { return kBaselineRowOps; }

const RowOps* v3_row_ops() {
#ifdef __x86_64__
  // The builtin asks for the operating system's support too; for F16C, which not every compiler's builtin knows, that
  // of AVX2 is enough.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kV3RowOps;
#endif
  return nullptr;
}

const RowOps* v4_row_ops() {
#ifdef __x86_64__
  if (v3_row_ops() != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kV4RowOps;
#endif
  return nullptr;
}

const RowOps& choose_row_ops(const char* wanted) {
  const RowOps *v4 = v4_row_ops(), *v3 = v3_row_ops();
  if (wanted == nullptr) return v4 != nullptr ? *v4 : v3 != nullptr ? *v3 : kBaselineRowOps;
  const std::string_view name = wanted;
  if (name == kBaselineRowOps.isa) return kBaselineRowOps;
  if (name != "v3" && name != "v4")
    throw Error(ErrorCode::kInvalidArgument, std::string("EP_HOST_ISA: '") + wanted + "' vs baseline, v3 or v4");
  const RowOps* table = name == "v3" ? v3 : v4;
  if (table == nullptr)
    throw Error(ErrorCode::kUnsupported, std::string("EP_HOST_ISA: '") + wanted + "' vs a machine without " +
                                             (name == "v3" ? "AVX2, FMA and F16C" : "AVX-512") + ", which has " +
                                             (v3 != nullptr ? "v3" : "baseline"));
  return *table;
}

const RowOps& row_ops() {
  // A static that throws stays unset, so every call reports a wrong value.
  static const RowOps& chosen = choose_row_ops(std::getenv("EP_HOST_ISA"));
  return chosen;
}

}  // namespace deep_ep::host
