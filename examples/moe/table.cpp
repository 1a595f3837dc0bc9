// SPDX-License-Identifier: MIT
// The report as tables on the terminal.
#include <fmt/format.h>

#include "rank.h"
#include "report.h"

namespace moe {
namespace {

constexpr double kMiB = 1 << 20;
constexpr int kWidestMatrix = 16;  // ranks; a larger matrix is only in the picture and the report

void print_ranks(const Report& report) {
  fmt::print("\n{:>4} {:>4} {:>7} {:>8} {:>8}", "", "", "own", "tokens", "expert");
  for (const Phase& phase : report.phases) fmt::print("  |{:^25}", phase.name);
  fmt::print("\n{:>4} {:>4} {:>7} {:>8} {:>8}", "rank", "node", "tokens", "received", "rows");
  for (std::size_t p = 0; p < report.phases.size(); ++p) fmt::print("  |{:>8} {:>8} {:>7}", "MiB", "ms", "GB/s");
  fmt::print("\n");
  const int ranks = report.settings.ranks;
  for (int r = 0; r < ranks; ++r) {
    std::int64_t arrivals = 0;
    for (int from = 0; from < ranks; ++from) arrivals += report.tokens_between[from][r];
    fmt::print("{:>4} {:>4} {:>7} {:>8} {:>8}", r, report.settings.node_of(r), report.tokens[r], arrivals,
               report.rows[r]);
    for (const Phase& phase : report.phases) {
      fmt::print("  |{:>8.2f} {:>8.3f} {:>7.2f}", phase.rank_bytes[r] / kMiB, phase.rank_ms[r], phase.rank_gb_per_s(r));
    }
    fmt::print("\n");
  }
  fmt::print("{:<35}", "all, slowest rank");
  for (const Phase& phase : report.phases) {
    fmt::print("  |{:>8.2f} {:>8.3f} {:>7.2f}", phase.bytes() / kMiB, phase.slowest_ms, phase.gb_per_s());
  }
  fmt::print("\nHost clock, median of {} repetitions. MiB: rows that arrive, a rank's own included.\n",
             report.settings.repeat);
}

void print_matrix(const Report& report) {
  const int ranks = report.settings.ranks;
  if (ranks > kWidestMatrix) return;
  const int per_node = report.settings.ranks_per_node;
  const Unit unit = unit_for(report.most_bytes_between());
  fmt::print("\nDispatch BF16, {} from rank (down) to rank (across)\n      ", unit.name);
  for (int to = 0; to < ranks; ++to) fmt::print("{}{:>6}", to > 0 && to % per_node == 0 ? " |" : "", to);
  fmt::print("\n");
  for (int from = 0; from < ranks; ++from) {
    if (from > 0 && from % per_node == 0) {
      fmt::print("      {:-<{}}\n", "", 6 * ranks + 2 * (report.settings.num_nodes() - 1));
    }
    fmt::print("{:>6}", from);
    for (int to = 0; to < ranks; ++to) {
      fmt::print("{}{:>6.2f}", to > 0 && to % per_node == 0 ? " |" : "", report.bytes_between(from, to) / unit.bytes);
    }
    fmt::print("\n");
  }
  fmt::print("{:.1f} of {:.1f} MiB cross nodes.\n", report.bytes_across_nodes() / kMiB, report.bytes_in_all() / kMiB);
}

void print_routing(const Report& report) {
  const Settings& s = report.settings;
  const std::string limit = fmt::format("{} of {} groups", s.topk_groups, s.groups);
  fmt::print("\n{:<34}{:>18}{:>18}\n", "Routing, top-" + std::to_string(s.topk) + " of " + std::to_string(s.experts),
             limit, "no limit");
  const auto line = [](const char* what, double limited, double free) {
    fmt::print("{:<34}{:>18.2f}{:>18.2f}\n", what, limited, free);
  };
  line("ranks that a token goes to", report.limited.ranks, report.free.ranks);
  line("nodes that a token goes to", report.limited.nodes, report.free.nodes);
  line("tokens that leave their node, %", 100 * report.limited.crossing, 100 * report.free.crossing);
  fmt::print("\nLoads, largest / mean: experts {:.2f} ({:.2f} without the router's bias), ranks {:.2f}\n",
             report.expert_imbalance, report.imbalance_without_bias, report.rank_imbalance);
  fmt::print("Arena in use, at most: {:.1f} MiB on one rank\n", static_cast<double>(report.arena_high_water) / kMiB);
}

void print_verdict(const Verdict& verdict) {
  fmt::print("\nBF16: {} of {} values are bit-identical to the layer without communication\n",
             verdict.values - verdict.wrong, verdict.values);
  fmt::print("FP8:  relative L2 error of the output {:.4f} (worst rank {:.4f}), bound {:.4f} = 2 x 2^-4\n",
             verdict.fp8_error, verdict.fp8_worst_rank, kFp8Bound);
  fmt::print("FP8:  worst received value: {:.3f} of the error that rounding to E4M3 may cause\n", verdict.fp8_element);
  for (const std::string& failure : verdict.failures) fmt::print("FAILED: {}\n", failure);
}

}  // namespace

void print(const Report& report, const Verdict& verdict) {
  print_ranks(report);
  print_matrix(report);
  print_routing(report);
  print_verdict(verdict);
}

}  // namespace moe
