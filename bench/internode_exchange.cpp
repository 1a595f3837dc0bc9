// SPDX-License-Identifier: MIT
// Exchanges between nodes, one process per rank, wherever they run: ranks meet as torchrun's do (RANK, WORLD_SIZE,
// MASTER_ADDR, MASTER_PORT) and use the network of EP_NETWORK_PROVIDER. FP8 dispatch and BF16 combine in both forms,
// and low latency; the bytes handed to the network are counted at the put and set beside what must cross at least.
// fabric_raw measures the network alone, mpi_exchange the same exchange with MPI.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "bench/workload.h"
#include "deep_ep/buffer.h"

namespace deep_ep::bench {
namespace {

struct Command {
  Workload work;
  std::vector<int> ranks_per_node;
  std::string out;
};

// What one operation moves across nodes, of this rank.
struct Crossing {
  std::int64_t tokens = 0;  // (token, far node) pairs
  std::int64_t rows = 0;    // (token, far rank) pairs
};

struct Operation {
  std::string name;
  bool low_latency = false;
  std::int64_t must_bytes = 0;  // of payload that this rank's tokens bring across nodes
  std::function<void()> run;
};

class Exchange {
 public:
  Exchange(const Command& command, std::shared_ptr<Bootstrap> group)
      : work_(command.work),
        group_(std::move(group)),
        rank_(group_->rank()),
        x_(static_cast<std::size_t>(std::max(work_.num_tokens, work_.num_ll_tokens) * work_.hidden)),
        routing_(make_routing(work_, rank_, work_.num_tokens)),
        ll_routing_(make_routing(work_, rank_, work_.num_ll_tokens)) {
    fill_rows(work_, rank_, std::max(work_.num_tokens, work_.num_ll_tokens), x_.data());
    Config config;
    config.ranks_per_node = command.ranks_per_node;
    config.max_experts = work_.num_experts;
    config.low_latency = {work_.num_ll_tokens, static_cast<std::size_t>(work_.row_bytes()), work_.num_topk, 1024};
    buffer_ = Buffer::open(group_, config);
    rows_ = buffer_->dispatch(input(routing_, work_.num_tokens, false));  // BF16 rows, the combines' input
    ll_rows_ = buffer_->low_latency_dispatch(ll_input()).receive();
  }

  nlohmann::json measure() {
    nlohmann::json report = nlohmann::json::array();
    for (const Operation& operation : operations()) report.push_back(measure(operation));
    return report;
  }

 private:
  DispatchInput input(const Routing& routing, std::int64_t tokens, bool fp8) const {
    DispatchInput in;
    in.x = TensorView(static_cast<const void*>(x_.data()), DType::kBf16, {tokens, work_.hidden});
    in.topk_idx = TensorView(static_cast<const void*>(routing.topk_idx.data()), DType::kI64, {tokens, work_.num_topk});
    in.topk_weights =
        TensorView(static_cast<const void*>(routing.topk_weights.data()), DType::kFp32, {tokens, work_.num_topk});
    in.num_experts = work_.num_experts;
    if (fp8) in.fp8 = Fp8Options{};
    return in;
  }

  DispatchInput ll_input() const {
    DispatchInput in = input(ll_routing_, work_.num_ll_tokens, true);
    in.layout = OutputLayout::kPadded;
    in.max_tokens_per_rank = work_.num_ll_tokens;
    in.fp8.reset();
    return in;
  }

  Crossing crossing(const Routing& routing, std::int64_t tokens) const {
    Crossing sum;
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::set<int> nodes, ranks;
      for (int k = 0; k < work_.num_topk; ++k) {
        const int to = work_.rank_of(routing.topk_idx[static_cast<std::size_t>(token * work_.num_topk + k)]);
        if (buffer_->node_of(to) == buffer_->node_of(rank_)) continue;
        nodes.insert(buffer_->node_of(to));
        ranks.insert(to);
      }
      sum.tokens += static_cast<std::int64_t>(nodes.size());
      sum.rows += static_cast<std::int64_t>(ranks.size());
    }
    return sum;
  }

  std::vector<Operation> operations() {
    const Crossing large = crossing(routing_, work_.num_tokens), small = crossing(ll_routing_, work_.num_ll_tokens);
    const auto combine = [this](const SumOrder& order) {
      CombineInput in;
      in.x = rows_.x;
      in.handle = rows_.handle;
      in.order = order;
      buffer_->combine(in);
    };
    return {
        {"dispatch_fp8", false, large.tokens * (work_.fp8_row_bytes() + work_.meta_bytes()),
         [this] { buffer_->dispatch(input(routing_, work_.num_tokens, true)); }},
        {"combine_bf16_by_rank", false, large.rows * work_.row_bytes(), [=] { combine(SumOrder::by_rank()); }},
        {"combine_bf16_by_rank_and_node", false, large.tokens * work_.row_bytes(),
         [=] { combine(SumOrder::by_rank_and_node()); }},
        {"low_latency_round_trip_bf16", true, 2 * small.rows * work_.row_bytes(), [this] { round_trip(); }},
    };
  }

  void round_trip() {
    const DispatchOutput sent = buffer_->low_latency_dispatch(ll_input()).receive();
    CombineInput in;
    in.x = sent.x;
    in.handle = sent.handle;
    in.order = SumOrder::by_topk();
    buffer_->low_latency_combine(in).receive();
  }

  nlohmann::json measure(const Operation& operation) {
    const int reps = operation.low_latency ? work_.ll_reps : work_.reps;
    for (int i = 0; i < work_.warmup; ++i) operation.run();
    buffer_->reset_statistics();
    std::vector<std::int64_t> times;
    for (int i = 0; i < reps; ++i) times.push_back(time(operation.run));
    std::int64_t handed = 0;
    for (const auto& peer : buffer_->statistics().peers) handed += static_cast<std::int64_t>(peer.network_bytes);
    const std::int64_t all_handed = sum(handed) / reps, all_must = sum(operation.must_bytes);
    const Summary summary = summarize(times);
    return {{"name", operation.name},
            {"time", to_json(summary)},
            {"put_bytes_of_all_ranks", all_handed},
            {"payload_bytes_of_all_ranks", all_must},
            {"put_bytes_over_payload", static_cast<double>(all_handed) / static_cast<double>(all_must)},
            {"gbit_per_s_all_ranks", static_cast<double>(all_handed) * 8e-3 / summary.median_us}};
  }

  // From the moment when the last rank has come to when the last is through. Ranks of one machine read one clock; on
  // several, each measures for itself and the slowest counts.
  std::int64_t time(const std::function<void()>& run) {
    sum(0);
    const std::int64_t start = now_ns();
    run();
    return most(now_ns() - start);
  }

  std::int64_t sum(std::int64_t mine) {
    std::int64_t all = 0;
    for (const std::int64_t one : gather(mine)) all += one;
    return all;
  }

  std::int64_t most(std::int64_t mine) {
    const std::vector<std::int64_t> all = gather(mine);
    return *std::max_element(all.begin(), all.end());
  }

  std::vector<std::int64_t> gather(std::int64_t mine) {
    std::vector<std::int64_t> all;
    const auto* bytes = reinterpret_cast<const std::byte*>(&mine);
    for (const auto& blob : group_->all_gather({bytes, sizeof mine}, std::chrono::seconds(60)))
      std::memcpy(&all.emplace_back(), blob.data(), sizeof mine);
    return all;
  }

  const Workload work_;
  const std::shared_ptr<Bootstrap> group_;
  const int rank_;
  std::vector<std::uint16_t> x_;
  const Routing routing_, ll_routing_;
  std::unique_ptr<Buffer> buffer_;
  DispatchOutput rows_, ll_rows_;
};

void write(const Command& command, const nlohmann::json& operations) {
  const nlohmann::json report = {
      {"workload", to_json(command.work)}, {"ranks_per_node", command.ranks_per_node}, {"operations", operations}};
  for (const auto& operation : operations)
    fmt::print("{:<32} {:>10.0f} us  {:>8.1f} MB at the put, {:.3f} x payload  {:>6.2f} Gbit/s\n",
               operation["name"].get<std::string>(), operation["time"]["median_us"].get<double>(),
               operation["put_bytes_of_all_ranks"].get<double>() * 1e-6,
               operation["put_bytes_over_payload"].get<double>(), operation["gbit_per_s_all_ranks"].get<double>());
  if (!command.out.empty()) std::ofstream(command.out) << report.dump(2) << '\n';
}

int run(int argc, char** argv) {
  CLI::App app(
      "Exchanges between nodes: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who, EP_NETWORK_PROVIDER how.");
  Command command;
  command.work.num_experts = 256;
  command.work.reps = 10;
  command.work.ll_reps = 50;
  add_options(app, command.work);
  app.add_option("--routing", command.work.routing, "uniform, zipf, or groups: 4 of 8 groups of experts")
      ->check(CLI::IsMember({"uniform", "zipf", "groups"}))
      ->capture_default_str();
  app.add_option("--ranks-per-node", command.ranks_per_node, "logical nodes, as Config::ranks_per_node: 4,4")
      ->delimiter(',')
      ->required();
  app.add_option("--out", command.out, "JSON file, written by rank 0");
  CLI11_PARSE(app, argc, argv);
  const TcpRendezvous where = TcpRendezvous::from_environment();
  command.work.num_ranks = where.num_ranks;
  if (const std::string wrong = complaint(command.work); !wrong.empty()) throw std::runtime_error(wrong);
  const nlohmann::json operations = Exchange(command, tcp_group(where)).measure();
  if (where.rank == 0) write(command, operations);
  return 0;
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  try {
    return deep_ep::bench::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "internode_exchange: {}\n", error.what());
    return 1;
  }
}
