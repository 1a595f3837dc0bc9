// SPDX-License-Identifier: MIT
// Exchanges between nodes, one process per rank, wherever they run: ranks meet as torchrun's do (RANK, WORLD_SIZE,
// MASTER_ADDR, MASTER_PORT) and use the network of EP_NETWORK_PROVIDER. FP8 dispatch, BF16 combine in both forms, and
// low latency; the bytes handed to the network are counted at the put and set beside what must cross at least.
// bench/internode.py runs it across namespaces of one machine, beside iperf3, MPI and the network alone.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bench/host_operations.h"
#include "bench/measure.h"
#include "bench/shared_memory.h"
#include "bench/workload.h"
#include "deep_ep/buffer.h"

namespace deep_ep::bench {
namespace {

struct Command {
  Workload work;
  std::vector<int> ranks_per_node;
  int num_workers = 0;
  std::size_t slot_bytes = Config().forward_slot_bytes;
  std::vector<std::string> only = {"dispatch_fp8", "combine_bf16_in_place", "combine_bf16_by_node",
                                   "ll_round_trip_fp8_bf16"};
  std::string board;  // a file, where all ranks are on one machine
  std::string out;
};

// What crosses between nodes, of one rank's tokens.
struct Crossing {
  std::int64_t tokens = 0;      // (token, far node) pairs
  std::int64_t rows = 0;        // (token, far rank) pairs
  std::int64_t selections = 0;  // (token, expert on a far rank) pairs
};

/// Time of the machine's cores since it started, as /proc/stat counts it; zeros where there is none.
struct CoreTime {
  std::int64_t all = 0, idle = 0;

  static CoreTime now() {
    std::ifstream stat("/proc/stat");
    std::string name;
    stat >> name;
    CoreTime time;
    // user, nice, system, idle, waiting for a disk, interrupts, soft interrupts, stolen
    std::int64_t ticks = 0;
    for (int field = 0; field < 8 && stat >> ticks; ++field) {
      time.all += ticks;
      if (field == 3 || field == 4) time.idle += ticks;
    }
    return time;
  }
};

// How ranks start together and learn how long the slowest took. On one machine by a board, whose barrier is quick and
// whose clock is everybody's; else by the rendezvous, and each measures for itself.
class Meeting {
 public:
  Meeting(const Command& command, std::shared_ptr<Bootstrap> group) : group_(std::move(group)) {
    if (command.board.empty()) return;
    memory_ = map_board(command.board);
    barrier_.emplace(*reinterpret_cast<Board*>(memory_.get()), group_->rank(), group_->num_ranks());
  }

  std::int64_t time(const std::function<void()>& run) {
    if (barrier_) return barrier_->time(run);
    gather(0);
    const std::int64_t start = now_ns();
    run();
    const std::vector<std::int64_t> all = gather(now_ns() - start);
    return *std::max_element(all.begin(), all.end());
  }

  std::int64_t sum(std::int64_t mine) {
    std::int64_t all = 0;
    for (const std::int64_t one : gather(mine)) all += one;
    return all;
  }

  std::vector<std::int64_t> gather(std::int64_t mine) {
    std::vector<std::int64_t> all;
    const auto* bytes = reinterpret_cast<const std::byte*>(&mine);
    for (const auto& blob : group_->all_gather({bytes, sizeof mine}, std::chrono::seconds(60)))
      std::memcpy(&all.emplace_back(), blob.data(), sizeof mine);
    return all;
  }

  const char* clock() const {
    return barrier_ ? kClockBoundary : "each rank's clock from its leaving the rendezvous to its return, the slowest";
  }

 private:
  const std::shared_ptr<Bootstrap> group_;
  Mapping memory_;
  std::optional<Barrier> barrier_;
};

class Exchange {
 public:
  Exchange(const Command& command, std::shared_ptr<Bootstrap> group)
      : command_(command), work_(command.work), meeting_(command, group), operations_(work_, group->rank()) {
    Config config = operations_.config();
    config.ranks_per_node = command.ranks_per_node;
    config.forward_slot_bytes = command.slot_bytes;
    Options options;
    options.num_workers = command.num_workers;
    buffer_ = Buffer::open(group, config, options);
    rank_ = buffer_->rank();
    operations_.prepare(*buffer_);
  }
  ~Exchange() { operations_.release(); }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  nlohmann::json measure() {
    nlohmann::json report = nlohmann::json::array();
    const Crossing large = crossing(work_.num_tokens), small = crossing(work_.num_ll_tokens);
    const std::int64_t row = work_.row_bytes(), fp8_row = work_.fp8_row_bytes();
    for (const Operation& op : chosen()) {
      // Ids, weights and places are not payload: what they add at the put is to be seen.
      const std::int64_t payload = op.name == "dispatch_fp8"            ? large.tokens * fp8_row
                                   : op.name == "combine_bf16_in_place" ? large.rows * row
                                   : op.name == "combine_bf16_by_node"  ? large.tokens * row
                                                                        : small.rows * fp8_row + small.selections * row;
      report.push_back(measure(op, payload));
      if (!op.low_latency) continue;
      report.back()["there_bytes_all_ranks"] = meeting_.sum(small.rows * fp8_row);
      report.back()["back_bytes_all_ranks"] = meeting_.sum(small.selections * row);
    }
    return report;
  }

  const char* clock() const { return meeting_.clock(); }

 private:
  std::vector<Operation> chosen() {
    std::vector<Operation> all = operations_.large(nullptr);
    all.push_back(operations_.combine_by_node());
    for (Operation& op : operations_.small(nullptr)) all.push_back(std::move(op));
    std::erase_if(all, [&](const Operation& op) {
      return std::find(command_.only.begin(), command_.only.end(), op.name) == command_.only.end();
    });
    return all;
  }

  Crossing crossing(int num_tokens) const {
    Crossing sum;
    const Routing routing = make_routing(work_, rank_, num_tokens);
    for (int token = 0; token < num_tokens; ++token) {
      std::set<int> nodes, ranks;
      for (int k = 0; k < work_.num_topk; ++k) {
        const int to = work_.rank_of(routing.topk_idx[static_cast<std::size_t>(token) * work_.num_topk + k]);
        if (buffer_->node_of(to) == buffer_->node_of(rank_)) continue;
        nodes.insert(buffer_->node_of(to));
        ranks.insert(to);
        ++sum.selections;
      }
      sum.tokens += static_cast<std::int64_t>(nodes.size());
      sum.rows += static_cast<std::int64_t>(ranks.size());
    }
    return sum;
  }

  nlohmann::json measure(const Operation& op, std::int64_t payload) {
    const int reps = op.low_latency ? work_.ll_reps : work_.reps;
    for (int i = 0; i < work_.warmup; ++i) run_once(op);
    buffer_->reset_statistics();
    const Usage before = usage_now();
    const CoreTime cores_before = CoreTime::now();
    std::vector<std::int64_t> times;
    for (int i = 0; i < reps; ++i) {
      op.before();
      times.push_back(meeting_.time(op.run));
    }
    const Usage after = usage_now();
    const CoreTime cores_after = CoreTime::now();
    std::int64_t put = 0;
    for (const auto& peer : buffer_->statistics().peers) put += static_cast<std::int64_t>(peer.network_bytes);
    const std::int64_t put_bytes = meeting_.sum(put) / reps, payload_bytes = meeting_.sum(payload);
    const auto cpu_us = [&](double mine) {
      return static_cast<double>(meeting_.sum(static_cast<std::int64_t>(mine * 1e9))) * 1e-3 / reps;
    };
    const Summary summary = summarize(times);
    const std::int64_t all_time = std::max<std::int64_t>(1, cores_after.all - cores_before.all);
    return {{"name", op.name},
            {"idle_share_of_machine", static_cast<double>(cores_after.idle - cores_before.idle) / all_time},
            {"time", to_json(summary)},
            {"user_us_all_ranks", cpu_us(after.user_s - before.user_s)},
            {"system_us_all_ranks", cpu_us(after.system_s - before.system_s)},
            {"switches_all_ranks", meeting_.sum(after.switches - before.switches) / reps},
            {"digest", meeting_.gather(op.digest())},
            {"put_bytes_all_ranks", put_bytes},
            {"payload_bytes_all_ranks", payload_bytes},
            {"put_over_payload", static_cast<double>(put_bytes) / static_cast<double>(payload_bytes)},
            {"gb_per_s_all_ranks", static_cast<double>(put_bytes) * 1e-3 / summary.median_us}};
  }

  void run_once(const Operation& op) {
    op.before();
    meeting_.time(op.run);
  }

  const Command& command_;
  const Workload& work_;
  Meeting meeting_;
  HostOperations operations_;
  std::unique_ptr<Buffer> buffer_;
  int rank_ = 0;
};

void write(const Command& command, const nlohmann::json& report) {
  for (const auto& operation : report["operations"])
    fmt::print(
        "{:<24} {:>9.0f} us (CPU {:>7.0f} user, {:>7.0f} system)  {:>6.1f} MB at the put, {:.3f} x payload  {:>5.2f} "
        "GB/s\n",
        operation["name"].get<std::string>(), operation["time"]["median_us"].get<double>(),
        operation["user_us_all_ranks"].get<double>(), operation["system_us_all_ranks"].get<double>(),
        operation["put_bytes_all_ranks"].get<double>() * 1e-6, operation["put_over_payload"].get<double>(),
        operation["gb_per_s_all_ranks"].get<double>());
  if (!command.out.empty()) std::ofstream(command.out) << report.dump(1) << '\n';
}

int run(int argc, char** argv) {
  CLI::App app(
      "Exchanges between nodes: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who, EP_NETWORK_PROVIDER how.");
  Command command;
  command.work.num_experts = 256;
  command.work.reps = 10;
  command.work.ll_reps = 50;
  add_options(app, command.work);
  app.add_option("--ranks-per-node", command.ranks_per_node, "logical nodes, as Config::ranks_per_node: 4,4")
      ->delimiter(',')
      ->required();
  app.add_option("--workers", command.num_workers, "threads that move data, of each rank; 0: cores / ranks")
      ->capture_default_str();
  app.add_option("--slot-bytes", command.slot_bytes, "Config::forward_slot_bytes")->capture_default_str();
  app.add_option("--only", command.only, "names of operations")->delimiter(',')->capture_default_str();
  app.add_option("--board", command.board, "a file, empty at first, by which ranks of one machine meet");
  app.add_option("--out", command.out, "JSON file, written by rank 0");
  CLI11_PARSE(app, argc, argv);
  const TcpRendezvous where = TcpRendezvous::from_environment();
  command.work.num_ranks = where.num_ranks;
  if (const std::string wrong = complaint(command.work); !wrong.empty()) throw std::runtime_error(wrong);
  Exchange exchange(command, tcp_group(where));
  const nlohmann::json report = {{"program", "internode_exchange"},
                                 {"workload", to_json(command.work)},
                                 {"ranks_per_node", command.ranks_per_node},
                                 {"slot_bytes", command.slot_bytes},
                                 {"clock", exchange.clock()},
                                 {"operations", exchange.measure()}};
  if (where.rank == 0) write(command, report);
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
