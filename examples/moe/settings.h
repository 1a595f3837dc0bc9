// SPDX-License-Identifier: MIT
// What one run of the example does: everything that its command line can say.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace moe {

struct Settings {
  // Input
  std::vector<std::string> texts;  // empty: texts that every Debian machine has
  int tokens = 512;                // per rank, at most
  int vocabulary = 1024;

  // Ranks
  int ranks = 8;
  int ranks_per_node = 4;
  int workers = 0;  // threads per rank that move data; 0: the library chooses
  int timeout_s = 120;

  // Model
  int hidden = 1024;
  int inter = 256;
  int experts = 64;
  int topk = 8;
  int groups = 8;
  int topk_groups = 4;
  int balance_steps = 40;

  // Output
  int repeat = 5;
  std::string out = "out/demo";
  std::optional<int> fail_rank;

  int group_size() const { return experts / groups; }
  int num_nodes() const { return (ranks + ranks_per_node - 1) / ranks_per_node; }
  int node_of(int rank) const { return rank / ranks_per_node; }
};

constexpr int kMaxRanks = 64;
constexpr int kMaxExperts = 1024;
constexpr int kMaxRepeat = 100;

/// Reads the command line. Where the program is to end at once (--help, or a wrong argument, both reported to the
/// user), `exit_code` is set instead.
struct CommandLine {
  Settings settings;
  std::optional<int> exit_code;
};
CommandLine read_command_line(int argc, char** argv);

}  // namespace moe
