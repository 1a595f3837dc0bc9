// SPDX-License-Identifier: MIT
// The row arithmetic of src/host/rows.h by itself, for each instruction set that this machine can run: bytes read and
// written per second. Rows of one set fit a core's caches; "far" ones are taken in turn from more memory than any cache
// holds.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bench/shared_memory.h"
#include "host/rows.h"
#include "plan/number.h"

namespace deep_ep::bench {
namespace {

constexpr std::size_t kFarBytes = std::size_t{384} << 20;

// Rows to read and rows to write, one after the other and round again.
class Rows {
 public:
  Rows(std::int64_t hidden, bool far, std::size_t bytes_per_channel = 2)
      : row_bytes_(static_cast<std::size_t>(hidden) * bytes_per_channel),
        num_rows_(far ? kFarBytes / row_bytes_ : 1),
        source_(map_private(num_rows_ * row_bytes_)),
        target_(map_private(num_rows_ * row_bytes_)) {
    auto* codes = reinterpret_cast<std::uint16_t*>(source_.get());
    for (std::size_t i = 0; i < num_rows_ * row_bytes_ / 2; ++i)
      codes[i] = plan::to_bf16(static_cast<float>(i % 1021) * 0.25f - 100.0f);
  }
  void next() { row_ = row_ + 1 == num_rows_ ? 0 : row_ + 1; }
  std::byte* source() const { return source_.get() + row_ * row_bytes_; }
  std::byte* target() const { return target_.get() + row_ * row_bytes_; }
  std::size_t row_bytes() const { return row_bytes_; }

 private:
  std::size_t row_bytes_;
  std::size_t num_rows_;
  std::size_t row_ = 0;
  Mapping source_;
  Mapping target_;
};

// Bytes read and written by each turn.
void count_bytes(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * static_cast<std::int64_t>(bytes));
}

void copy(benchmark::State& state, const host::RowOps* ops, bool far) {
  Rows rows(state.range(0), far);
  for (auto _ : state) {
    if (ops != nullptr) {
      ops->copy(rows.target(), rows.source(), rows.row_bytes());
    } else {
      std::memcpy(rows.target(), rows.source(), rows.row_bytes());
    }
    benchmark::ClobberMemory();
    rows.next();
  }
  if (ops != nullptr) ops->flush();
  count_bytes(state, 2 * rows.row_bytes());
}

void quantize(benchmark::State& state, const host::RowOps* ops, bool far, plan::Fp8Scale kind) {
  const std::int64_t hidden = state.range(0);
  Rows rows(hidden, far);
  std::vector<float> scales(static_cast<std::size_t>(plan::num_fp8_groups(hidden)));
  for (auto _ : state) {
    ops->quantize(
        {rows.source(), DType::kBf16, hidden, reinterpret_cast<std::uint8_t*>(rows.target()), scales.data(), 1, kind});
    benchmark::ClobberMemory();
    rows.next();
  }
  count_bytes(state, rows.row_bytes() + rows.row_bytes() / 2);
}

// As many rows as a token has with four ranks, one after the other in memory.
void sum(benchmark::State& state, const host::RowOps* ops, bool far, bool weighted) {
  constexpr int kRows = 4;
  const float weights[kRows] = {0.25f, 0.5f, 0.125f, 0.75f};
  Rows rows(state.range(0), far);
  std::vector<std::byte> result(static_cast<std::size_t>(rows.row_bytes()));
  for (auto _ : state) {
    const void* from[kRows];
    for (const void*& row : from) {
      row = rows.source();
      rows.next();
    }
    ops->sum({from, weighted ? weights : nullptr, kRows, DType::kBf16, state.range(0), result.data()});
    benchmark::ClobberMemory();
  }
  count_bytes(state, kRows * rows.row_bytes());
}

template <class Function, class... Args>
void add_one(const std::string& name, Function function, Args... args) {
  benchmark::RegisterBenchmark(name.c_str(), function, args...)->ArgName("hidden")->Arg(2048)->Arg(7168);
}

void add_all(const host::RowOps& ops) {
  for (const bool far : {false, true}) {
    const std::string name = std::string(ops.isa) + (far ? "/far/" : "/near/");
    add_one(name + "copy", copy, &ops, far);
    add_one(name + "quantize", quantize, &ops, far, plan::Fp8Scale::kExact);
    add_one(name + "quantize_power_of_two", quantize, &ops, far, plan::Fp8Scale::kPowerOfTwo);
    add_one(name + "sum", sum, &ops, far, false);
    add_one(name + "sum_weighted", sum, &ops, far, true);
  }
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  using namespace deep_ep::bench;
  for (const bool far : {false, true}) {
    const deep_ep::host::RowOps* plain = nullptr;
    add_one(std::string("memcpy/") + (far ? "far" : "near"), copy, plain, far);
  }
  add_all(deep_ep::host::baseline_row_ops());
  if (const deep_ep::host::RowOps* v3 = deep_ep::host::v3_row_ops()) add_all(*v3);
  if (const deep_ep::host::RowOps* v4 = deep_ep::host::v4_row_ops()) add_all(*v4);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
