// SPDX-License-Identifier: MIT
// What the ranks' records add up to: figures for the table, the picture and the JSON file.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "board.h"
#include "settings.h"
#include "text.h"

namespace moe {

/// One kind of exchange, measured. Bytes are the rows that arrive, a rank's own among them (they are moved like the
/// rest).
struct Phase {
  std::string name;
  std::vector<double> rank_bytes;  // arriving at each rank
  std::vector<double> rank_ms;     // each rank's median over the repetitions
  double slowest_ms = 0;           // median of: the slowest rank of a repetition

  double bytes() const;
  double gb_per_s() const { return slowest_ms > 0 ? bytes() / slowest_ms / 1e6 : 0; }
  double rank_gb_per_s(int rank) const { return rank_ms[rank] > 0 ? rank_bytes[rank] / rank_ms[rank] / 1e6 : 0; }
};

/// The unit in which amounts up to `most_bytes` read well.
struct Unit {
  const char* name;
  double bytes;
};
inline Unit unit_for(double most_bytes) {
  return most_bytes < 0.1 * (1 << 20) ? Unit{"KiB", 1 << 10} : Unit{"MiB", 1 << 20};
}

/// Averages per token, over all ranks.
struct Reach {
  double ranks = 0;
  double nodes = 0;
  double crossing = 0;  // share of tokens that leave their node
};

struct Report {
  Report(const Settings& settings, const Corpus& corpus, const Board& board, double imbalance_without_bias);

  Settings settings;
  std::vector<std::string> files;
  std::size_t text_bytes = 0;
  std::size_t text_tokens = 0;

  std::vector<std::int64_t> tokens;                       // [rank]
  std::vector<std::int64_t> rows;                         // [rank]: received (token, expert) pairs
  std::vector<std::vector<std::int64_t>> tokens_between;  // [from][to]: distinct tokens of the dispatch
  std::size_t row_bytes = 0;                              // of a token in BF16
  std::size_t fp8_row_bytes = 0;                          // with its scales
  std::vector<Phase> phases;                              // dispatch and combine in BF16, dispatch in FP8
  std::vector<int> slots;                                 // [rank]: experts that it hosts
  std::vector<int> expert_rows;                           // [expert]
  double expert_imbalance = 1;                            // largest / mean
  double imbalance_without_bias = 1;                      // the same, had the router no bias
  double rank_imbalance = 1;
  Reach limited, free;
  std::uint64_t arena_high_water = 0;  // of the rank with most

  double bytes_between(int from, int to) const { return static_cast<double>(tokens_between[from][to] * row_bytes); }
  double most_bytes_between() const;
  double bytes_across_nodes() const;
  double bytes_in_all() const;
  std::int64_t tokens_in_all() const;
};

/// What the run must prove. `failures` is empty if it did.
struct Verdict {
  std::int64_t values = 0;  // compared bit by bit
  std::int64_t wrong = 0;
  double fp8_error = 0;  // relative L2, all ranks together
  double fp8_worst_rank = 0;
  double fp8_element = 0;  // worst received value: error / what rounding may cause
  std::vector<std::string> failures;
};
Verdict judge(const Settings& settings, const Corpus& corpus, const Board& board);

void print(const Report& report, const Verdict& verdict);
void write_json(const Report& report, const Verdict& verdict, const std::filesystem::path& file);

}  // namespace moe
