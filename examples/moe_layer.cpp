// SPDX-License-Identifier: MIT
// The library's main job on real input: one mixture-of-experts layer over text, its ranks processes that exchange
// tokens through DeepEP, the result checked against the same layer without communication. What it prints: docs/demo.md.
//
// Where to read on: moe/layer.cpp has the three calls (dispatch, experts, combine), moe/rank.cpp what a rank does from
// beginning to end, moe/reference.cpp the layer without communication.
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <thread>

#include "moe/board.h"
#include "moe/model.h"
#include "moe/picture.h"
#include "moe/processes.h"
#include "moe/rank.h"
#include "moe/report.h"
#include "moe/router.h"
#include "moe/settings.h"
#include "moe/text.h"

namespace moe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// How long the other ranks may go on after one has ended badly. They notice by themselves; this is for their messages.
constexpr double kGraceSeconds = 3;

/// Shows how many ranks have done each stage. A terminal sees the current line change, a file gets one line per stage.
class Progress {
 public:
  explicit Progress(const Board& board) : board_(board), in_place_(isatty(STDOUT_FILENO) != 0) {}

  void update() {
    while (stage_ < kNumStages) {
      int done = 0;
      for (int r = 0; r < board_.num_ranks(); ++r) {
        done += board_[r].stages_done.load(std::memory_order_acquire) > stage_ ? 1 : 0;
      }
      const bool complete = done == board_.num_ranks();
      if (in_place_ || complete) show(done, complete);
      if (!complete) break;
      ++stage_;
      begin_ = Clock::now();
    }
  }

  /// Leaves the line that is being changed, so that a message can begin on its own.
  void interrupt() const {
    if (in_place_ && stage_ < kNumStages) fmt::print("\n");
    std::fflush(stdout);
  }

 private:
  void show(int done, bool complete) {
    fmt::print("{}  {:>2}/{}  {:.<48} {:>2}/{} ranks {:>7.2f} s{}", in_place_ ? "\r" : "", stage_ + 1, kNumStages,
               std::string(describe(static_cast<Stage>(stage_))) + " ", done, board_.num_ranks(), seconds_since(begin_),
               complete ? "\n" : "");
    std::fflush(stdout);
  }

  const Board& board_;
  bool in_place_;
  int stage_ = 0;
  Clock::time_point begin_ = Clock::now();
};

/// Says on stderr what became of a rank that did not end well.
void report_end(const Processes::End& end, const RankRecord& record, pid_t process) {
  const int done = record.stages_done.load(std::memory_order_acquire);
  const char* stage = done < kNumStages ? describe(static_cast<Stage>(done)) : "end";
  fmt::print(stderr, "rank {} (process {}) ended with {} in stage {} ({})", end.rank, process, end.how, done + 1,
             stage);
  if (record.failure[0] != '\0') fmt::print(stderr, ": {}", record.failure.data());
  fmt::print(stderr, "\n");
}

/// Waits for all ranks. False, after a message, if one ended badly; the others are then given a moment and killed.
bool watch(Processes& ranks, const Board& board) {
  Progress progress(board);
  bool well = true;
  Clock::time_point first_bad_end;
  while (ranks.running() > 0) {
    if (well) progress.update();
    while (const auto end = ranks.next_end()) {
      if (end->well) continue;
      if (well) {
        first_bad_end = Clock::now();
        progress.interrupt();
      }
      well = false;
      report_end(*end, board[end->rank], ranks.process_of(end->rank));
    }
    if (!well && ranks.running() > 0 && seconds_since(first_bad_end) > kGraceSeconds) {
      fmt::print(stderr, "killing the {} ranks that still run\n", ranks.running());
      ranks.kill_all();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  if (well) progress.update();
  return well;
}

void announce(const Settings& s, const Corpus& corpus) {
  fmt::print("{} ranks as processes, in logical nodes of {}; {} cores\n", s.ranks, s.ranks_per_node,
             std::thread::hardware_concurrency());
  fmt::print("Layer: hidden {}, {} SwiGLU experts with {} inner channels, top-{}, best {} of {} groups\n", s.hidden,
             s.experts, s.inter, s.topk, s.topk_groups, s.groups);
  fmt::print("Text: {} files, {} bytes, {} tokens with a vocabulary of {}; {} of them used\n", corpus.files.size(),
             corpus.bytes, corpus.tokens, corpus.spelling.size(), corpus.tokens_used());
  for (const std::string& file : corpus.files) fmt::print("  {}\n", file);
  fmt::print("\n");
}

/// Tunes the router's bias on the tokens at hand, as training would have done. Returns the experts' imbalance before
/// that.
double balance(Router& router, const Settings& settings, const Corpus& corpus) {
  std::vector<float> scores;
  for (const auto& batch : corpus.batches) {
    const std::vector<float> part = router.scores(embed(settings, batch));
    scores.insert(scores.end(), part.begin(), part.end());
  }
  const double before = imbalance(count_loads(router.choose(scores), settings.experts));
  router.balance(scores, settings.balance_steps);
  return before;
}

int run(const Settings& settings) {
  const auto begin = Clock::now();
  const std::filesystem::path out = settings.out;
  std::filesystem::create_directories(out);  // now, so that a wrong --out is not found out at the end
  const Corpus corpus = read_corpus(settings);
  announce(settings, corpus);
  Router router(settings);
  const double imbalance_without_bias = balance(router, settings, corpus);

  Board board(settings.ranks);
  const Job job{settings, corpus, router, free_port(), board};
  Processes ranks(settings.ranks, [&](int rank) { return run_rank(job, rank); });
  if (!watch(ranks, board)) {
    fmt::print(stderr, "FAILED: not all ranks finished\n");
    return 1;
  }

  const Report report(settings, corpus, board, imbalance_without_bias);
  const Verdict verdict = judge(settings, corpus, board);
  print(report, verdict);
  write_picture(report, out / "traffic.svg");
  write_json(report, verdict, out / "report.json");
  fmt::print("\nPicture: {}\nReport:  {}\n", (out / "traffic.svg").string(), (out / "report.json").string());
  fmt::print("{} in {:.1f} s\n", verdict.failures.empty() ? "Passed" : "FAILED", seconds_since(begin));
  return verdict.failures.empty() ? 0 : 1;
}

}  // namespace
}  // namespace moe

int main(int argc, char** argv) {
  const moe::CommandLine line = moe::read_command_line(argc, argv);
  if (line.exit_code) return *line.exit_code;
  try {
    return moe::run(line.settings);
  } catch (const std::exception& error) {
    fmt::print(stderr, "moe_layer: {}\n", error.what());
    return 1;
  }
}
