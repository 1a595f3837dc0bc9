// SPDX-License-Identifier: MIT
// Measures the library's host backend, ranks as processes, beside what the machine can do in the same run. Writes JSON;
// bench/run.py calls it and makes the table.
#include <fmt/core.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "bench/free_port.h"
#include "bench/host_operations.h"
#include "bench/limits.h"
#include "bench/measure.h"
#include "bench/shared_memory.h"
#include "bench/workload.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/buffer.h"
#include "deep_ep/config.h"
#include "host/rows.h"

namespace deep_ep::bench {
namespace {

struct Command {
  Workload work;
  int num_workers = 0;
  std::string only;  // operations whose name contains this
  bool with_limits = true;
  std::string out;  // a file, or empty: standard output
};

// What all ranks start with.
struct World {
  Board& board;
  const std::vector<SharedFile>& files;
  int port = 0;
};

// Notes on the board.
enum Note : int { kWindowBytes, kPrivateBytes, kPeakBytes, kDigest, kArenaHighWater, kNumNotes };
static_assert(kNumNotes <= 8);

class Rank {
 public:
  Rank(const Command& command, const World& world, int rank)
      : command_(command),
        work_(command.work),
        world_(world),
        barrier_(world.board, rank, command.work.num_ranks),
        operations_(work_, rank) {}

  nlohmann::json run() {
    const std::unique_ptr<Buffer> buffer = open();
    nlohmann::json report = {{"memory", measure_memory(*buffer)}};
    if (command_.with_limits) limits_.emplace(work_, barrier_.rank(), world_.files, world_.files.front().bytes());
    std::vector<Operation> all = operations_.large(limits_ ? &*limits_ : nullptr);
    for (Operation& op : operations_.small(limits_ ? &*limits_ : nullptr)) {
      op.bound = [this] { signal_round(barrier_.board(), barrier_.rank(), barrier_.num_ranks(), ++epoch_); };
      all.push_back(std::move(op));
    }
    for (const Operation& op : all) {
      if (op.name.find(command_.only) == std::string::npos) continue;
      if (barrier_.rank() == 0) fmt::print(stderr, "host_exchange: {}\n", op.name);
      report["operations"].push_back(measure(op));
    }
    report["statistics"] = waits(buffer->statistics());
    barrier_.sync();
    operations_.release();
    return report;
  }

 private:
  std::unique_ptr<Buffer> open() {
    private_before_ = status_bytes("RssAnon");
    TcpRendezvous where;
    where.port = world_.port;
    where.rank = barrier_.rank();
    where.num_ranks = work_.num_ranks;
    Options options;
    options.num_workers = command_.num_workers;
    return Buffer::open(tcp_group(where), operations_.config(), options);
  }

  // Runs every operation once, as a user would, and says what the library's memory came to.
  nlohmann::json measure_memory(Buffer& buffer) {
    operations_.prepare(buffer);
    // The staged combine's input is ours, not the library's.
    const std::int64_t before_copy = status_bytes("RssAnon");
    operations_.copy_received();
    private_before_ += status_bytes("RssAnon") - before_copy;
    reset_peak();
    for (const Operation& op : operations_.large(nullptr)) run_once(op);
    for (const Operation& op : operations_.small(nullptr)) run_once(op);
    std::array<std::int64_t, 8>& mine = notes();
    // What was resident at the peak, less shared and file pages and less what was private before the buffer opened.
    const std::int64_t shared = status_bytes("RssShmem") + status_bytes("RssFile");
    mine[kPrivateBytes] = std::max<std::int64_t>(0, status_bytes("VmHWM") - shared - private_before_);
    mine[kPeakBytes] = status_bytes("VmHWM");
    mine[kWindowBytes] = shared_file_bytes() / work_.num_ranks;
    mine[kArenaHighWater] = static_cast<std::int64_t>(buffer.statistics().arena_bytes_high_water);
    publish_notes();
    return memory_report();
  }

  void run_once(const Operation& op) {
    op.before();
    barrier_.sync();
    op.run();
  }

  nlohmann::json memory_report() {
    barrier_.sync();
    const MemoryPlan plan = operations_.config().plan(work_.num_ranks);
    nlohmann::json report = {{"plan_bytes", plan.total_bytes}, {"ranks", nlohmann::json::array()}};
    for (const MemoryRegion& region : plan.regions)
      report["regions"].push_back({{"name", region.name}, {"bytes", region.bytes}});
    for (int rank = 0; rank < work_.num_ranks; ++rank) {
      const std::int64_t* note = world_.board.ranks[rank].note;
      report["ranks"].push_back({{"window_bytes", note[kWindowBytes]},
                                 {"private_bytes", note[kPrivateBytes]},
                                 {"process_peak_bytes", note[kPeakBytes]},
                                 {"arena_high_water_bytes", note[kArenaHighWater]}});
    }
    barrier_.sync();
    return report;
  }

  nlohmann::json measure(const Operation& op) {
    const int reps = op.low_latency ? work_.ll_reps : work_.reps;
    std::vector<std::int64_t> times, bare, bound;
    std::map<std::string, std::vector<std::int64_t>> copies;
    for (int i = 0; i < work_.warmup; ++i) run_once(op);
    Usage used;
    // What is measured takes turns, so that all of it sees the same machine; in turns of several, because each call
    // finds in the caches what the one before it left there, as MPI's calls do. Small calls find all their rows.
    const int turn = op.low_latency ? 20 : 5;
    for (int done = 0; done < reps; done += turn) {
      const int n = std::min(turn, reps - done);
      const auto repeat = [&](const std::function<void()>& work, std::vector<std::int64_t>& into) {
        for (int i = 0; i < n; ++i) into.push_back(barrier_.time(work));
      };
      for (int i = 0; i < n; ++i) {
        op.before();
        const Usage before = usage_now();
        times.push_back(barrier_.time(op.run));
        add_difference(used, before, usage_now());
      }
      if (!limits_) continue;
      for (const CopyBy by : kAllCopies) repeat([&] { limits_->copy(op.copy, by); }, copies[name(by)]);
      if (op.bare) repeat(op.bare, bare);
      if (op.bound) repeat(op.bound, bound);
    }
    nlohmann::json report = {{"name", op.name}, {"time", to_json(summarize(times))}, {"must_bytes", op.must_bytes}};
    report["per_call"] = usage_report(used, reps);
    report["digest"] = digest(op);
    if (limits_) report["limit"] = limit_report(op, copies);
    if (!bare.empty()) report["bare"] = to_json(summarize(bare));
    if (!bound.empty()) report["bound"] = {{"name", op.bound_name}, {"time", to_json(summarize(bound))}};
    return report;
  }

  // The fastest way to copy sets the limit; the operation's bytes at that rate take at least `predicted_us`.
  static nlohmann::json limit_report(const Operation& op,
                                     const std::map<std::string, std::vector<std::int64_t>>& copies) {
    nlohmann::json report = {{"copy_bytes", op.copy_bytes}, {"row_bytes", op.copy.row_bytes}};
    double best_us = 0;
    for (const auto& [by, times] : copies) {
      const Summary summary = summarize(times);
      report["copies"][by] = to_json(summary);
      if (best_us == 0 || summary.median_us < best_us) {
        best_us = summary.median_us;
        report["best"] = by;
      }
    }
    report["gb_per_s"] = static_cast<double>(op.copy_bytes) / best_us * 1e-3;
    report["predicted_us"] = best_us * static_cast<double>(op.must_bytes) / static_cast<double>(op.copy_bytes);
    return report;
  }

  static void add_difference(Usage& sum, const Usage& before, const Usage& after) {
    sum.user_s += after.user_s - before.user_s;
    sum.system_s += after.system_s - before.system_s;
    sum.minor_faults += after.minor_faults - before.minor_faults;
    sum.switches += after.switches - before.switches;
  }

  // Means of all ranks and repetitions; the barrier's yields are inside.
  nlohmann::json usage_report(const Usage& mine, int reps) {
    world_.board.ranks[barrier_.rank()].usage = mine;
    barrier_.sync();
    Usage sum;
    for (int rank = 0; rank < work_.num_ranks; ++rank) add_difference(sum, {}, world_.board.ranks[rank].usage);
    barrier_.sync();
    const double calls = static_cast<double>(reps) * work_.num_ranks;
    return {{"user_us", sum.user_s / calls * 1e6},
            {"system_us", sum.system_s / calls * 1e6},
            {"minor_faults", static_cast<double>(sum.minor_faults) / calls},
            {"context_switches", static_cast<double>(sum.switches) / calls}};
  }

  // One number per rank, of the last repetition's result.
  nlohmann::json digest(const Operation& op) {
    notes()[kDigest] = op.digest();
    publish_notes();
    barrier_.sync();
    nlohmann::json all = nlohmann::json::array();
    for (int rank = 0; rank < work_.num_ranks; ++rank) all.push_back(world_.board.ranks[rank].note[kDigest]);
    barrier_.sync();
    return all;
  }

  nlohmann::json waits(const Statistics& statistics) const {
    nlohmann::json report = {{"operations", statistics.operations},
                             {"copied_out_bytes", statistics.copied_out_bytes},
                             {"staged_bytes", statistics.staged_bytes}};
    for (const Statistics::Peer& peer : statistics.peers) {
      report["peers"].push_back(
          {{"bytes_sent", peer.bytes_sent}, {"waits", peer.waits}, {"wait_ns_sum", peer.wait_ns_sum}});
    }
    return report;
  }

  std::array<std::int64_t, 8>& notes() { return notes_; }
  void publish_notes() { std::copy(notes_.begin(), notes_.end(), world_.board.ranks[barrier_.rank()].note); }

  const Command& command_;
  const Workload& work_;
  const World& world_;
  Barrier barrier_;
  HostOperations operations_;
  std::optional<Limits> limits_;
  std::array<std::int64_t, 8> notes_{};
  std::int64_t private_before_ = 0;
  std::uint64_t epoch_ = 0;
};

void write(const std::string& file, const nlohmann::json& report) {
  if (file.empty()) {
    fmt::print("{}\n", report.dump(1));
    std::fflush(stdout);  // a child process ends without
    return;
  }
  std::ofstream out(file);
  out << report.dump(1) << '\n';
  if (!out.flush()) throw std::runtime_error("cannot write " + file);
}

// The body of one child process; its exit code.
int run_rank(const Command& command, const World& world, int rank) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  try {
    nlohmann::json report = Rank(command, world, rank).run();
    if (rank != 0) return 0;
    report["program"] = "host_exchange";
    report["workload"] = to_json(command.work);
    report["clock"] = kClockBoundary;
    report["isa"] = host::row_ops().isa;
    report["num_workers"] = command.num_workers;
    write(command.out, report);
    return 0;
  } catch (const std::exception& error) {
    // The rank that fails first says so; the others only stop.
    if (world.board.failed.exchange(1) == 0) fmt::print(stderr, "host_exchange: rank {}: {}\n", rank, error.what());
    return 1;
  }
}

int run(const Command& command) {
  const Mapping shared = map_shared(sizeof(Board));
  Board& board = *reinterpret_cast<Board*>(shared.get());
  const Workload& work = command.work;
  const Traffic traffic = traffic_of(work, work.num_tokens);
  std::int64_t rows = std::max<std::int64_t>(traffic.most_received(),
                                             std::int64_t{work.num_ranks} * work.num_ll_tokens * work.num_topk);
  for (int rank = 0; rank < work.num_ranks; ++rank)
    rows = std::max({rows, traffic.sent(rank), std::int64_t{work.num_tokens}});
  std::vector<SharedFile> files;
  for (int rank = 0; rank < work.num_ranks; ++rank)
    files.emplace_back(static_cast<std::size_t>(rows * work.row_bytes()));
  const World world{board, files, free_port()};
  for (int rank = 0; rank < work.num_ranks; ++rank) {
    const pid_t child = fork();
    if (child < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (child == 0) _exit(run_rank(command, world, rank));
  }
  bool failed = false;
  for (int status = 0; wait(&status) > 0;) {
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    if (WIFSIGNALED(status)) fmt::print(stderr, "host_exchange: a rank was ended by signal {}\n", WTERMSIG(status));
    failed = true;
    board.failed.store(1);
  }
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  using namespace deep_ep::bench;
  Command command;
  CLI::App app(
      "Measures dispatch and combine of the host backend, ranks as processes, beside the machine's memcpy limit");
  add_options(app, command.work);
  app.add_option("--workers", command.num_workers, "threads that move data, of each rank; 0: cores / ranks")
      ->capture_default_str();
  app.add_option("--only", command.only, "only operations whose name contains this");
  app.add_flag("!--no-limits", command.with_limits, "without the measurements of the machine beside each operation");
  app.add_option("--out", command.out, "file for the JSON report; without it: standard output");
  CLI11_PARSE(app, argc, argv);
  if (const std::string wrong = complaint(command.work); !wrong.empty()) {
    fmt::print(stderr, "host_exchange: {}\n", wrong);
    return 2;
  }
  try {
    return run(command);
  } catch (const std::exception& error) {
    fmt::print(stderr, "host_exchange: {}\n", error.what());
    return 1;
  }
}
