// SPDX-License-Identifier: MIT
// Low-latency dispatch and combine of the CUDA backend, beside the floor measured in the same run: an empty kernel, one
// signal, and the bytes at the pace of plain stores (bench/gpu_floor.h). Writes JSON; bench/gpu_tables.py makes tables
// and plots of it.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "bench/gpu_floor.h"
#include "bench/gpu_ranks.h"
#include "bench/gpu_report.h"
#include "bench/workload.h"
#include "deep_ep/buffer.h"

namespace deep_ep::bench {
namespace {

struct Command {
  int ranks = 2, sms = 0, reps = 60;
  std::vector<int> tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256};
  std::vector<int> experts = {256};
  std::vector<std::string> routings = {"uniform"};
  bool models = false, overlap = false;
  std::uint64_t seed = 2026;
  std::string commit, out;
};

constexpr int kInGraph = 16, kAsCalled = 200, kTickets = 3, kRounds = 40;

// The floor
// ---------------------------------------------------------------------------------------------------------------------

struct Floor {
  double launch_us = 0, launch_in_graph_us = 0, signal_us = 0;
  double copy_gb_per_s = 0;   // into the next rank's memory, by the rank's SMs
  double local_gb_per_s = 0;  // into memory of its own GPU
};

// Ranks 0 and 1 answer each other by the first words of their memory; the others look on.
double measure_signal(GpuRank& self, const SharedGpuMemory& memory) {
  constexpr int kTrips = 200;
  const bool plays = self.num_ranks() > 1 && self.rank() < 2;
  const auto word = [&](int rank) { return reinterpret_cast<std::uint64_t*>(memory.of(rank)); };
  PingPong between{word(self.rank()), word(plays ? 1 - self.rank() : self.rank()), self.rank() == 0, 0, kTrips};
  gpu(cudaMemset(memory.get(), 0, sizeof(std::uint64_t)));
  return self
      .time({.reps = 20, .calls = 2 * kTrips},
            [&] {
              if (plays) launch_ping_pong(between, self.stream());
              between.base += kTrips;
            })
      .median_us;
}

Floor measure_floor(GpuRank& self, int sms) {
  Floor floor;
  const auto empty = [&] { launch_empty(sms, self.stream()); };
  floor.launch_us = self.time({.reps = 200}, empty).median_us;
  floor.launch_in_graph_us = self.time_in_graph({.reps = 60, .calls = kInGraph}, empty).median_us;
  constexpr std::size_t kBytes = std::size_t{16} << 20;
  const SharedGpuMemory landing(self, kBytes);
  floor.signal_us = measure_signal(self, landing);
  const GpuMemory from(kBytes);
  gpu(cudaMemset(from.get(), 1, kBytes));
  const auto pace = [&](std::byte* to) {
    const Summary time = self.time({.reps = 30}, [&] { launch_copy(from.get(), to, kBytes, sms, self.stream()); });
    return static_cast<double>(kBytes) / ((time.median_us - floor.launch_us) * 1000);
  };
  floor.copy_gb_per_s = pace(landing.of((self.rank() + 1) % self.num_ranks()));
  floor.local_gb_per_s = pace(landing.get());
  return floor;
}

// One shape
// ---------------------------------------------------------------------------------------------------------------------

struct Shape {
  std::string name;
  Workload work;
};

// What one rank brings, and how many messages and rows that is to ranks of its own GPU and of others.
struct Inputs {
  std::unique_ptr<GpuMemory> x, topk_idx, topk_weights;
  struct Count {
    double messages = 0, rows = 0;
  } here, there, own;  // of those here, the rank's own

  Inputs(const Workload& work, const GpuRank& self) {
    std::vector<std::uint16_t> values(std::size_t(work.num_tokens) * work.hidden);
    fill_rows(work, self.rank(), work.num_tokens, values.data());
    const Routing routing = make_routing(work, self.rank(), work.num_tokens);
    for (int token = 0; token < work.num_tokens; ++token) {
      std::vector<char> seen(work.num_ranks, 0);
      for (int k = 0; k < work.num_topk; ++k) {
        const int rank = work.rank_of(routing.topk_idx[std::size_t(token) * work.num_topk + k]);
        Count& count = self.near(rank) ? here : there;
        count.rows += 1;
        count.messages += seen[rank] == 0;
        if (rank == self.rank()) own.rows += 1, own.messages += seen[rank] == 0;
        seen[rank] = 1;
      }
    }
    x = on_gpu(values);
    topk_idx = on_gpu(routing.topk_idx);
    topk_weights = on_gpu(routing.topk_weights);
  }
};

class Measurement {
 public:
  Measurement(GpuRank& self, const Command& command, const Shape& shape, int sms)
      : self_(self), reps_(command.reps), shape_(shape), in_(shape.work, self) {
    const Workload& work = shape.work;
    Config config;
    config.arena_bytes =
        (std::size_t{1} << 30) + std::size_t(work.num_tokens) * work.num_experts * work.row_bytes() * 7;
    config.max_experts = 1024;
    config.low_latency = {work.num_tokens, std::size_t(work.row_bytes()), work.num_topk, 1024};
    config.timeout = std::chrono::milliseconds(5000);
    Options options;
    options.backend = BackendKind::kCuda;
    options.cuda_device = self.device();
    options.num_workers = sms;
    buffer_ = Buffer::open(self.group(), config, options);
    bf16_.x = TensorView(in_.x->get(), DType::kBf16, {work.num_tokens, work.hidden});
    bf16_.topk_idx = TensorView(in_.topk_idx->get(), DType::kI64, {work.num_tokens, work.num_topk});
    bf16_.topk_weights = TensorView(in_.topk_weights->get(), DType::kFp32, {work.num_tokens, work.num_topk});
    bf16_.num_experts = work.num_experts;
    bf16_.layout = OutputLayout::kPadded;
    bf16_.max_tokens_per_rank = work.num_tokens;
    bf16_.stream = self.stream();
    fp8_ = bf16_;
    fp8_.fp8 = Fp8Options{};
    rows_ = buffer_->low_latency_dispatch(bf16_).receive();
    combine_.x = rows_.x;
    combine_.handle = rows_.handle;
    combine_.weights = bf16_.topk_weights;
    combine_.order = SumOrder::by_topk();
    combine_.stream = self.stream();
    reduced_ = combine_;
    reduced_.order.round_per_rank = true;
    reduced_.pre_reduce = true;
    buffer_->check();
  }

  nlohmann::json run(const Floor& floor) {
    const auto dispatch = [this](const DispatchInput& in) {
      return [this, in] { return buffer_->low_latency_dispatch(in); };
    };
    const auto combine = [this](const CombineInput& in) {
      return [this, in] { return buffer_->low_latency_combine(in); };
    };
    const Workload& work = shape_.work;
    nlohmann::json run = {{"shape", shape_.name},
                          {"tokens", work.num_tokens},
                          {"hidden", work.hidden},
                          {"experts", work.num_experts},
                          {"topk", work.num_topk},
                          {"routing", work.routing},
                          {"dispatch", one_way(dispatch(at_once(fp8_)), dispatch(fp8_))},
                          {"combine", one_way(combine(at_once(combine_)), combine(combine_))},
                          {"pre_reduced", one_way(combine(at_once(reduced_)), combine(reduced_))},
                          {"round_trip", round_trip(combine_)},
                          {"round_trip_pre_reduced", round_trip(reduced_)}};
    run["dispatch"]["bf16"] = in_graph([&] { dispatch(at_once(bf16_))().receive(); }).median_us;
    run["combine"]["logfmt10"] = in_format(WireFormat::kLogFmt10);
    run["combine"]["fp8"] = in_format(WireFormat::kFp8);
    buffer_->check();
    add_floors(run, floor);
    return run;
  }

  // The time of a kernel that fills every SM between send and receive, beside its time alone.
  nlohmann::json overlap() {
    const GpuMemory sink(sizeof(float));
    int all = 0;
    gpu(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, self_.device()));
    const auto work = [&] { launch_grind(8 * all, 60000, sink.as<float>(), self_.stream()); };
    const Summary alone = self_.time({.reps = 20, .warmup = 2}, work);
    Ticket<DispatchOutput> ticket;
    const Summary between = self_.time({.reps = 20,
                                        .warmup = 2,
                                        .before = [&] { ticket = buffer_->low_latency_dispatch(fp8_); },
                                        .after = [&] { ticket.receive(); }},
                                       work);
    buffer_->check();
    return {{"grind_alone_us", alone.median_us}, {"grind_between_send_and_receive_us", between.median_us}};
  }

 private:
  template <class Input>
  static Input at_once(Input in) {
    in.at_once = true;
    return in;
  }

  Summary in_graph(const std::function<void()>& call) {
    return self_.time_in_graph({.reps = reps_, .warmup = 6, .calls = kInGraph}, call);
  }
  double in_format(WireFormat wire) {
    CombineInput in = at_once(combine_);
    in.wire = wire;
    return in_graph([&] { buffer_->low_latency_combine(in).receive(); }).median_us;
  }
  double as_called(const std::function<void()>& call) {
    return self_.time_as_called({.reps = 8, .warmup = 1, .calls = kAsCalled}, call).median_us;
  }

  // `whole` sends and receives in one kernel, `split` in two.
  template <class Whole, class Split>
  nlohmann::json one_way(const Whole& whole, const Split& split) {
    const Summary us = in_graph([&] { whole().receive(); });
    const auto [send, recv] = apart(split);
    return {{"us", us.median_us}, {"p99", us.p99_us}, {"split", in_graph([&] { split().receive(); }).median_us},
            {"send", send},       {"recv", recv},     {"called", as_called([&] { whole().receive(); })}};
  }

  nlohmann::json round_trip(const CombineInput& back) {
    const auto there_and_back = [&] {
      buffer_->low_latency_dispatch(at_once(fp8_)).receive();
      buffer_->low_latency_combine(at_once(back)).receive();
    };
    const Summary us = in_graph(there_and_back);
    return {{"graph", us.median_us}, {"graph_p99", us.p99_us}, {"called", as_called(there_and_back)}};
  }

  // Sends that nobody waits for, then receives of what has arrived; kTickets at a time.
  template <class Send>
  std::pair<double, double> apart(const Send& send) {
    std::vector<decltype(send())> tickets;
    const auto receive_all = [&] {
      for (auto& ticket : tickets) ticket.receive();
      tickets.clear();
    };
    const auto send_all = [&] {
      for (int i = 0; i < kTickets; ++i) tickets.push_back(send());
    };
    // A kernel in front holds the stream until all is enqueued: the host's pace is not what is measured.
    const auto hold = [&] { launch_hold(60000, self_.stream()); };
    const double held = self_.time({.reps = kRounds, .warmup = 2}, hold).median_us;
    const auto hold_and = [&](const std::function<void()>& work) { return [&hold, work] { hold(), work(); }; };
    const Summary sends = self_.time({.reps = kRounds, .warmup = 2, .after = receive_all}, hold_and(send_all));
    const Summary receives =
        self_.time({.reps = kRounds, .warmup = 2, .before = [&] { send_all(), self_.sync(); }}, hold_and(receive_all));
    return {(sends.median_us - held) / kTickets, (receives.median_us - held) / kTickets};
  }

  // Bytes over links and bytes written nearby go side by side: the floor is the longer of them.
  void add_floors(nlohmann::json& run, const Floor& floor) const {
    const double base = floor.launch_in_graph_us + floor.signal_us;
    const auto us = [&](double over_links, double nearby) {
      return base + std::max(over_links / (floor.copy_gb_per_s * 1000), nearby / (floor.local_gb_per_s * 1000));
    };
    const auto row = static_cast<double>(shape_.work.row_bytes());
    const auto code = static_cast<double>(shape_.work.fp8_row_bytes());
    const double home = shape_.work.num_tokens * row;
    run["dispatch"]["floor"] =
        us(in_.there.messages * code, (in_.here.messages + in_.here.rows + in_.there.rows) * code);
    // Own rows stay where they are.
    run["combine"]["floor"] = us(in_.there.rows * row, (in_.here.rows - in_.own.rows) * row + home);
    run["pre_reduced"]["floor"] = us(in_.there.messages * row, (in_.here.messages - in_.own.messages) * row + home);
  }

  GpuRank& self_;
  const int reps_;
  const Shape shape_;
  Inputs in_;
  std::unique_ptr<Buffer> buffer_;
  DispatchInput bf16_, fp8_;
  CombineInput combine_, reduced_;
  DispatchOutput rows_;
};

// The program
// ---------------------------------------------------------------------------------------------------------------------

std::vector<Shape> shapes_of(const Command& command) {
  std::vector<Shape> shapes;
  const auto add = [&](const char* name, int tokens, std::int64_t hidden, int experts, int topk) -> Workload& {
    Shape shape{name, {}};
    shape.work.num_ranks = command.ranks;
    shape.work.num_tokens = tokens;
    shape.work.hidden = hidden;
    shape.work.num_experts = experts;
    shape.work.num_topk = topk;
    shape.work.seed = command.seed;
    return shapes.emplace_back(std::move(shape)).work;
  };
  for (const int experts : command.experts)
    for (const std::string& routing : command.routings)
      for (const int tokens : command.tokens) add("DeepSeek-V3", tokens, 7168, experts, 8).routing = routing;
  if (!command.models) return shapes;
  for (const int tokens : {1, 8, 32, 128}) {
    add("Kimi-K3", tokens, 3584, 896, 16);
    add("gpt-oss", tokens, 2880, 128, 4);
    add("Nemotron", tokens, 1024, 512, 22);
    add("Qwen3-Next", tokens, 2048, 512, 10);
  }
  return shapes;
}

void print(const nlohmann::json& run) {
  const auto us = [&](const char* what, const char* field) { return run[what][field].get<double>(); };
  fmt::print(stderr,
             "{} {} tokens, {} experts, {}: dispatch {:.1f} combine {:.1f} pre-reduced {:.1f} round trip {:.1f}\n",
             run["shape"].get<std::string>(), run["tokens"].get<int>(), run["experts"].get<int>(),
             run["routing"].get<std::string>(), us("dispatch", "us"), us("combine", "us"), us("pre_reduced", "us"),
             us("round_trip", "graph"));
}

void run_rank(GpuRank& self, const Command& command) {
  const int sms = command.sms > 0 ? command.sms : self.sms();
  const Floor floor = measure_floor(self, sms);
  GpuReport report(self, "cuda_low_latency", command.commit, command.out);
  report["sms_of_rank"] = sms;
  report["calls_in_graph"] = kInGraph;
  report["graphs"] = command.reps;
  report["launch_us"] = floor.launch_us;
  report["launch_in_graph_us"] = floor.launch_in_graph_us;
  report["signal_us"] = floor.signal_us;
  report["copy_gb_per_s"] = floor.copy_gb_per_s;
  report["local_gb_per_s"] = floor.local_gb_per_s;
  if (command.overlap) {
    Workload work;
    work.num_ranks = self.num_ranks();
    work.num_tokens = 32;
    work.num_experts = 256;
    report["overlap"] = Measurement(self, command, {"DeepSeek-V3", work}, sms).overlap();
    self.sync();
  }
  for (const Shape& shape : shapes_of(command)) {
    report.add(Measurement(self, command, shape, sms).run(floor));
    if (self.rank() == 0) print(report["runs"].back());
    self.sync();
  }
  report.finish();
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  using namespace deep_ep::bench;
  Command command;
  CLI::App app(
      "Measures low-latency dispatch and combine of the CUDA backend beside their floor. A process per rank where "
      "every "
      "rank has a GPU, else threads that share them");
  app.add_option("--ranks", command.ranks, "ranks")->check(CLI::Range(1, kMaxRanks))->capture_default_str();
  app.add_option("--sms", command.sms, "SMs of each rank; 0: its share of the GPU")->capture_default_str();
  app.add_option("--tokens", command.tokens, "tokens of each rank, hidden 7168, top-8")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--experts", command.experts, "experts in all, multiples of the ranks")
      ->check(CLI::Range(8, 1024))
      ->capture_default_str();
  app.add_option("--routings", command.routings, "uniform, zipf, groups (4 of 8)")
      ->check(CLI::IsMember({"uniform", "zipf", "groups"}))
      ->capture_default_str();
  app.add_flag("--models", command.models, "also the shapes of other models");
  app.add_flag("--overlap", command.overlap, "also a kernel that fills the GPU between send and receive");
  app.add_option("--reps", command.reps, "graphs of 16 calls, measured")
      ->check(CLI::Range(1, kMaxReps))
      ->capture_default_str();
  app.add_option("--seed", command.seed, "of routing and rows")->capture_default_str();
  app.add_option("--commit", command.commit, "written into the report");
  app.add_option("--out", command.out, "file for the JSON report; without it: standard output");
  CLI11_PARSE(app, argc, argv);
  for (const Shape& shape : shapes_of(command)) {
    if (shape.work.num_experts % command.ranks == 0) continue;
    fmt::print(stderr, "cuda_low_latency: {} experts are no multiple of {} ranks\n", shape.work.num_experts,
               command.ranks);
    return 2;
  }
  return run_gpu_ranks(command.ranks, [&](GpuRank& self) { run_rank(self, command); });
}
