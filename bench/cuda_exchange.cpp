// SPDX-License-Identifier: MIT
// High-throughput dispatch and combine of the CUDA backend, beside what the same SMs can do with the same bytes
// (bench/gpu_limits.h), measured in the same run. Writes JSON; bench/gpu_tables.py makes tables and plots from it.
#include <cuda_runtime.h>
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/gpu_limits.h"
#include "bench/gpu_ranks.h"
#include "bench/gpu_report.h"
#include "bench/workload.h"
#include "deep_ep/buffer.h"

namespace deep_ep::bench {
namespace {

struct Command {
  Workload work;
  std::vector<int> sms = {4, 8, 16, 24, 48, 64};
  std::vector<int> tokens = {4096};
  std::vector<std::string> routings = {"uniform"};
  bool grouped = false, counted = true, pairs = false;
  std::size_t arena_gib = 4;
  std::string commit, out;
};

constexpr std::int64_t kFp8Group = 128;
constexpr int kPairSms = 24;

// The limits of one routing: rows of `row_bytes` go as dispatch's would.
class Limit {
 public:
  Limit(GpuRank& self, const Workload& work, const Routing& routing, bool grouped) : self_(self), work_(work) {
    std::vector<std::uint8_t> copies(std::size_t(work.num_tokens) * work.num_ranks, 0);
    for (std::size_t i = 0; i < routing.topk_idx.size(); ++i) {
      std::uint8_t& n = copies[i / work.num_topk * work.num_ranks + work.rank_of(routing.topk_idx[i])];
      n = grouped ? n + 1 : 1;
    }
    room_ = grouped ? work.num_topk : 1;
    copies_ = on_gpu(copies);
    rows_ = std::make_unique<GpuMemory>(std::size_t(work.num_tokens) * work.row_bytes());
    landing_ = std::make_unique<SharedGpuMemory>(
        self, std::size_t(work.num_ranks) * work.num_tokens * room_ * work.row_bytes());
    addresses_ = on_gpu(landing_->all());
  }

  nlohmann::json dispatch(int row_bytes, int sms) {
    const LimitRows rows = rows_of(row_bytes);
    return better("stores", time([&] { launch_copy_by_stores(rows, sms, self_.stream()); }),
                  time([&] { launch_copy_by_bulk(rows, sms, self_.stream()); }));
  }
  nlohmann::json combine(int sms) {
    const LimitRows rows = rows_of(static_cast<int>(work_.row_bytes()));
    return better("loads", time([&] { launch_gather_by_loads(rows, sms, self_.stream()); }),
                  time([&] { launch_gather_by_bulk(rows, sms, self_.stream()); }));
  }

 private:
  LimitRows rows_of(int row_bytes) const {
    return {rows_->get(),
            addresses_->as<std::byte* const>(),
            copies_->as<const std::uint8_t>(),
            work_.num_tokens,
            work_.num_ranks,
            self_.rank(),
            room_,
            row_bytes};
  }
  static nlohmann::json better(const char* plain_name, const Summary& plain, const Summary& bulk) {
    const bool by_bulk = bulk.median_us < plain.median_us;
    return {{"us", by_bulk ? bulk.median_us : plain.median_us}, {"by", by_bulk ? "bulk copies" : plain_name}};
  }
  template <class Launch>
  Summary time(const Launch& launch) {
    const Summary summary = self_.time({.reps = std::max(10, work_.reps / 2)}, launch);
    gpu(cudaGetLastError());
    return summary;
  }

  GpuRank& self_;
  const Workload work_;
  int room_ = 1;
  std::unique_ptr<GpuMemory> copies_, rows_, addresses_;
  std::unique_ptr<SharedGpuMemory> landing_;
};

// One rank's inputs for one routing.
struct Inputs {
  Routing routing;
  std::unique_ptr<GpuMemory> x, topk_idx, topk_weights;

  Inputs(const Workload& work, int rank) : routing(make_routing(work, rank, work.num_tokens)) {
    std::vector<std::uint16_t> rows(std::size_t(work.num_tokens) * work.hidden);
    fill_rows(work, rank, work.num_tokens, rows.data());
    x = on_gpu(rows);
    topk_idx = on_gpu(routing.topk_idx);
    topk_weights = on_gpu(routing.topk_weights);
  }
};

class Measurement {
 public:
  Measurement(GpuRank& self, const Command& command, const Workload& work, Buffer& buffer)
      : self_(self), command_(command), work_(work), buffer_(buffer), in_(work, self.rank()) {}

  void run(GpuReport& report) {
    for (const bool grouped : {false, true}) {
      if (grouped && !command_.grouped) continue;
      Limit limit(self_, work_, in_.routing, grouped);
      for (const int sms : command_.sms) report.add(at(sms, grouped, limit));
    }
  }

 private:
  nlohmann::json at(int sms, bool grouped, Limit& limit) {
    nlohmann::json operations;
    std::int64_t rows = 0;
    for (const bool fp8 : {false, true}) {
      const DispatchInput fresh = input(sms, grouped, fp8);
      const DispatchOutput out = buffer_.dispatch(fresh);
      rows = out.handle->num_rows;
      DispatchInput again = fresh;
      again.topk_idx = again.topk_weights = {};
      again.num_experts = 0;
      again.layout = OutputLayout::kByRank;
      again.handle = out.handle;
      const auto scales = static_cast<int>((work_.hidden + kFp8Group - 1) / kFp8Group * 4);
      const nlohmann::json best = limit.dispatch(
          fp8 ? static_cast<int>((work_.hidden + scales + 15) / 16 * 16) : static_cast<int>(work_.row_bytes()), sms);
      const std::string name = fp8 ? "dispatch_fp8" : "dispatch_bf16";
      operations[name] = report([&] { buffer_.dispatch(again); }, best);
      if (command_.counted) operations[name + "_counted"] = report([&] { buffer_.dispatch(fresh); }, best);
      if (!fp8) operations["combine_bf16"] = report([&] { buffer_.combine(combine(sms, out)); }, limit.combine(sms));
    }
    buffer_.check();
    if (self_.rank() == 0) {
      fmt::print(stderr, "{} tokens, {}, {}{} SMs:", work_.num_tokens, work_.routing, grouped ? "by expert, " : "",
                 sms);
      for (const auto& [name, op] : operations.items())
        fmt::print(stderr, " {} {:.0f} ({:.0f} %)", name, op["time"]["median_us"].get<double>(),
                   100 * op["of_limit"].get<double>());
      fmt::print(stderr, "\n");
    }
    return {{"tokens", work_.num_tokens},
            {"routing", work_.routing},
            {"layout", grouped ? "by_expert" : "by_rank"},
            {"sms", sms},
            {"rows_of_rank_0", rows},
            {"operations", operations}};
  }

  DispatchInput input(int sms, bool grouped, bool fp8) const {
    DispatchInput in;
    in.x = TensorView(in_.x->get(), DType::kBf16, {work_.num_tokens, work_.hidden});
    in.topk_idx = TensorView(in_.topk_idx->get(), DType::kI64, {work_.num_tokens, work_.num_topk});
    in.topk_weights = TensorView(in_.topk_weights->get(), DType::kFp32, {work_.num_tokens, work_.num_topk});
    in.num_experts = work_.num_experts;
    in.layout = grouped ? OutputLayout::kByExpert : OutputLayout::kByRank;
    if (fp8) in.fp8 = Fp8Options{};
    in.num_workers = sms;
    in.stream = self_.stream();
    return in;
  }

  CombineInput combine(int sms, const DispatchOutput& out) const {
    CombineInput in;
    in.x = out.x;
    in.handle = out.handle;
    in.num_workers = sms;
    in.stream = self_.stream();
    return in;
  }

  template <class Call>
  nlohmann::json report(const Call& call, const nlohmann::json& limit) {
    const Summary time = self_.time({.reps = work_.reps, .warmup = work_.warmup}, call);
    return {{"time", to_json(time)}, {"limit", limit}, {"of_limit", limit["us"].get<double>() / time.median_us}};
  }

  GpuRank& self_;
  const Command& command_;
  const Workload work_;
  Buffer& buffer_;
  Inputs in_;
};

// How fast each rank alone copies to each other one, and to itself.
nlohmann::json measure_pairs(GpuRank& self, int sms) {
  constexpr int kRows = 4096, kRowBytes = 14336;
  const GpuMemory rows(std::size_t{kRows} * kRowBytes);
  const SharedGpuMemory landing(self, std::size_t{kRows} * kRowBytes * self.num_ranks());
  const auto addresses = on_gpu(landing.all());
  nlohmann::json gb_per_s = nlohmann::json::array();
  for (int from = 0; from < self.num_ranks(); ++from) {
    nlohmann::json& row = gb_per_s.emplace_back(nlohmann::json::array());
    for (int to = 0; to < self.num_ranks(); ++to) {
      std::vector<std::uint8_t> copies(std::size_t{kRows} * self.num_ranks(), 0);
      for (int i = 0; i < kRows; ++i) copies[std::size_t(i) * self.num_ranks() + to] = 1;
      const auto there = on_gpu(copies);
      const LimitRows limit{rows.get(),
                            addresses->as<std::byte* const>(),
                            there->as<const std::uint8_t>(),
                            kRows,
                            self.num_ranks(),
                            self.rank(),
                            1,
                            kRowBytes};
      const Summary time = self.time({.reps = 10}, [&] {
        if (self.rank() == from) launch_copy_by_bulk(limit, sms, self.stream());
      });
      row.push_back(std::size_t{kRows} * kRowBytes / (time.median_us * 1000));
    }
  }
  return {{"sms", sms}, {"gb_per_s", gb_per_s}};
}

void run_rank(GpuRank& self, const Command& command) {
  Config config;
  config.arena_bytes = command.arena_gib << 30;
  Options options;
  options.backend = BackendKind::kCuda;
  options.cuda_device = self.device();
  prepare_limits();
  auto buffer = Buffer::open(self.group(), config, options);
  GpuReport report(self, "cuda_exchange", command.commit, command.out);
  report["hidden"] = command.work.hidden;
  report["topk"] = command.work.num_topk;
  report["experts"] = command.work.num_experts;
  report["reps"] = command.work.reps;
  report["seed"] = command.work.seed;
  report["clock"] = kGpuClockBoundary;
  if (command.pairs) report["pairs"] = measure_pairs(self, kPairSms);
  for (const int tokens : command.tokens) {
    for (const std::string& routing : command.routings) {
      Workload work = command.work;
      work.num_tokens = tokens;
      work.routing = routing;
      Measurement(self, command, work, *buffer).run(report);
    }
  }
  report.finish();
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  using namespace deep_ep::bench;
  Command command;
  command.work.num_ranks = 2;
  command.work.num_experts = 256;
  command.work.warmup = 6;
  CLI::App app(
      "Measures dispatch and combine of the CUDA backend beside the limit of the same SMs. A process per rank where "
      "every rank has a GPU, else "
      "threads that share them");
  add_options(app, command.work);
  app.remove_option(app.get_option("--tokens"));
  app.add_option("--tokens", command.tokens, "tokens of each rank, one table each")->capture_default_str();
  app.add_option("--sms", command.sms, "SMs of each rank")->capture_default_str();
  app.add_option("--routings", command.routings, "uniform, zipf, groups (4 of 8)")
      ->check(CLI::IsMember({"uniform", "zipf", "groups"}))
      ->capture_default_str();
  app.add_flag("--grouped", command.grouped, "also the output grouped by expert");
  app.add_flag("!--cached-only", command.counted, "without dispatches that count first");
  app.add_flag("--pairs", command.pairs, "also how fast each rank copies to each other one, alone, with 24 SMs");
  app.add_option("--arena-gib", command.arena_gib, "of each rank")->capture_default_str();
  app.add_option("--commit", command.commit, "written into the report");
  app.add_option("--out", command.out, "file for the JSON report; without it: standard output");
  CLI11_PARSE(app, argc, argv);
  command.work.reps = std::min(command.work.reps, kMaxReps);
  if (const std::string wrong = complaint(command.work); !wrong.empty()) {
    fmt::print(stderr, "cuda_exchange: {}\n", wrong);
    return 2;
  }
  return run_gpu_ranks(command.work.num_ranks, [&](GpuRank& self) { run_rank(self, command); });
}
