// SPDX-License-Identifier: MIT
// The command line of the example.
#include "settings.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

namespace moe {
namespace {

constexpr const char* kAbout =
    "Runs one mixture-of-experts layer over real text, with ranks as processes that exchange tokens through DeepEP.\n"
    "Fails unless the result is bit-identical to the same layer computed without communication (BF16), and within a\n"
    "stated error of it (FP8). Writes a table, a picture of the traffic and a report. See docs/demo.md.";

void add_options(CLI::App& app, Settings& s) {
  const auto positive = CLI::PositiveNumber;
  app.add_option("--text", s.texts, "Text files to read; default: /usr/share/common-licenses/*")
      ->check(CLI::ExistingFile)
      ->type_name("...")
      ->default_str("")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group("Input");
  app.add_option("--tokens", s.tokens, "Most tokens that one rank takes")->check(positive)->group("Input");
  app.add_option("--vocabulary", s.vocabulary, "Token ids that byte-pair merging may make, the 256 bytes included")
      ->check(CLI::Range(256, 32768))
      ->group("Input");

  app.add_option("--ranks", s.ranks, "Ranks, one process each")->check(CLI::Range(1, kMaxRanks))->group("Ranks");
  app.add_option("--ranks-per-node", s.ranks_per_node, "Ranks of one logical node")->check(positive)->group("Ranks");
  app.add_option("--workers", s.workers, "Threads per rank that move data; 0: cores / ranks")
      ->check(CLI::Range(0, 1024))
      ->group("Ranks");
  app.add_option("--timeout", s.timeout_s, "Seconds that a rank waits for another before it gives up")
      ->check(positive)
      ->group("Ranks");

  app.add_option("--hidden", s.hidden, "Channels of a token, a multiple of 128")->check(positive)->group("Model");
  app.add_option("--inter", s.inter, "Channels inside an expert, a multiple of 8")->check(positive)->group("Model");
  app.add_option("--experts", s.experts, "Experts in all")->check(CLI::Range(1, kMaxExperts))->group("Model");
  app.add_option("--topk", s.topk, "Experts per token")->check(positive)->group("Model");
  app.add_option("--groups", s.groups, "Groups that the experts form, of equal size")->check(positive)->group("Model");
  app.add_option("--topk-groups", s.topk_groups, "Groups that one token may use")->check(positive)->group("Model");
  app.add_option("--balance-steps", s.balance_steps,
                 "Steps that tune the router's bias towards equal loads; 0: no bias")
      ->check(CLI::Range(0, 10000))
      ->group("Model");

  app.add_option("--repeat", s.repeat, "Times each exchange is measured; the median is shown")
      ->check(CLI::Range(1, kMaxRepeat))
      ->group("Output");
  app.add_option("--out", s.out, "Folder for traffic.svg and report.json")->type_name("DIR")->group("Output");
  app.add_option("--fail-rank", s.fail_rank, "Kill this rank in the middle, to see what the others and the parent do")
      ->group("Output");
}

/// What no single option can know about itself. Returns what is wrong, or nothing.
std::string contradiction(const Settings& s) {
  if (s.hidden % 128 != 0)
    return fmt::format("--hidden {} is not a multiple of 128, the block of one FP8 scale", s.hidden);
  if (s.inter % 8 != 0) return fmt::format("--inter {} is not a multiple of 8", s.inter);
  if (s.experts % s.groups != 0)
    return fmt::format("--experts {} is not a multiple of --groups {}", s.experts, s.groups);
  if (s.topk_groups > s.groups) return fmt::format("--topk-groups {} exceeds --groups {}", s.topk_groups, s.groups);
  if (s.topk > s.topk_groups * s.group_size()) {
    return fmt::format("--topk {} exceeds the {} experts of --topk-groups {}", s.topk, s.topk_groups * s.group_size(),
                       s.topk_groups);
  }
  if (s.fail_rank && (*s.fail_rank < 0 || *s.fail_rank >= s.ranks)) {
    return fmt::format("--fail-rank {} is not one of the {} ranks", *s.fail_rank, s.ranks);
  }
  return {};
}

}  // namespace

CommandLine read_command_line(int argc, char** argv) {
  CommandLine line;
  CLI::App app(kAbout);
  app.option_defaults()->always_capture_default()->take_last();
  add_options(app, line.settings);
  try {
    app.parse(argc, argv);
    if (const std::string wrong = contradiction(line.settings); !wrong.empty()) throw CLI::ValidationError(wrong);
  } catch (const CLI::ParseError& end) {
    line.exit_code = app.exit(end);
  }
  return line;
}

}  // namespace moe
