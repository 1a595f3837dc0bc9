// SPDX-License-Identifier: MIT
// Adds up the ranks' records, judges them and writes the JSON report.
#include "report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "rank.h"
#include "router.h"

namespace moe {
namespace {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

using Times = std::array<double, kMaxRepeat>;

/// `times` picks a rank's measurements out of its record.
template <typename Pick>
Phase make_phase(const char* name, const Board& board, int repeat, Pick&& times) {
  Phase phase;
  phase.name = name;
  for (int r = 0; r < board.num_ranks(); ++r) {
    const Times& of_rank = times(board[r]);
    phase.rank_ms.push_back(median({of_rank.begin(), of_rank.begin() + repeat}));
  }
  std::vector<double> slowest(repeat, 0.0);
  for (int i = 0; i < repeat; ++i) {
    for (int r = 0; r < board.num_ranks(); ++r) slowest[i] = std::max(slowest[i], times(board[r])[i]);
  }
  phase.slowest_ms = median(slowest);
  return phase;
}

Reach reach_of(const Board& board, const Spread RankRecord::*spread) {
  Reach reach;
  double tokens = 0;
  for (int r = 0; r < board.num_ranks(); ++r) {
    const Spread& of_rank = board[r].*spread;
    reach.ranks += static_cast<double>(of_rank.ranks);
    reach.nodes += static_cast<double>(of_rank.nodes);
    reach.crossing += static_cast<double>(of_rank.crossing);
    tokens += static_cast<double>(board[r].tokens);
  }
  if (tokens == 0) return {};
  return {reach.ranks / tokens, reach.nodes / tokens, reach.crossing / tokens};
}

nlohmann::json to_json(const Phase& phase) {
  return {{"bytes", phase.bytes()},
          {"ms_slowest_rank_median", phase.slowest_ms},
          {"gb_per_s", phase.gb_per_s()},
          {"rank_bytes", phase.rank_bytes},
          {"rank_ms_median", phase.rank_ms}};
}

nlohmann::json to_json(const Reach& reach) {
  return {{"ranks_per_token", reach.ranks}, {"nodes_per_token", reach.nodes}, {"share_crossing_nodes", reach.crossing}};
}

nlohmann::json to_json(const Settings& s) {
  return {{"ranks", s.ranks},
          {"ranks_per_node", s.ranks_per_node},
          {"tokens_per_rank_at_most", s.tokens},
          {"vocabulary", s.vocabulary},
          {"hidden", s.hidden},
          {"inter", s.inter},
          {"experts", s.experts},
          {"topk", s.topk},
          {"groups", s.groups},
          {"topk_groups", s.topk_groups},
          {"balance_steps", s.balance_steps},
          {"workers", s.workers},
          {"repeat", s.repeat}};
}

nlohmann::json to_json(const Verdict& verdict) {
  return {{"passed", verdict.failures.empty()},
          {"failures", verdict.failures},
          {"bf16", {{"values_compared", verdict.values}, {"values_that_differ", verdict.wrong}}},
          {"fp8",
           {{"relative_l2_error", verdict.fp8_error},
            {"relative_l2_error_worst_rank", verdict.fp8_worst_rank},
            {"relative_l2_bound", kFp8Bound},
            {"worst_received_value_error_over_allowed", verdict.fp8_element}}}};
}

/// What one rank's record fails in, if anything. Also adds to the totals.
void judge_rank(const Corpus& corpus, const Board& board, int rank, Verdict& verdict) {
  const RankRecord& record = board[rank];
  const BitCheck& check = record.check;
  verdict.values += check.values;
  verdict.wrong += check.wrong;
  if (check.wrong > 0) {
    verdict.failures.push_back(fmt::format(
        "BF16: rank {}: {} of {} values differ from the layer without communication; the first is token {} (\"{}\"), "
        "channel {}: {} instead of {}",
        rank, check.wrong, check.values, check.token, corpus.spelling[corpus.batches[rank][check.token]], check.channel,
        check.got, check.expected));
  }
  if (!record.repeats_agree) {
    verdict.failures.push_back(fmt::format("rank {}: a repeated exchange gave other bits than the first", rank));
  }
  const Fp8Check& fp8 = record.fp8_check;
  if (!(fp8.worst_element <= 1)) {
    verdict.failures.push_back(
        fmt::format("FP8: rank {}: a received value is {:.3f} times as far from the sent one as rounding allows", rank,
                    fp8.worst_element));
  }
  verdict.fp8_element = std::max(verdict.fp8_element, fp8.worst_element);
  if (record.tokens == 0) return;
  const double error = std::sqrt(fp8.error_squared / fp8.norm_squared);
  verdict.fp8_worst_rank = std::max(verdict.fp8_worst_rank, error);
  if (!(error <= kFp8Bound)) {
    verdict.failures.push_back(fmt::format("FP8: rank {}: the output's relative L2 error is {:.4f}, the bound {:.4f}",
                                           rank, error, kFp8Bound));
  }
}

}  // namespace

double Phase::bytes() const { return std::accumulate(rank_bytes.begin(), rank_bytes.end(), 0.0); }

Report::Report(const Settings& s, const Corpus& corpus, const Board& board, double without_bias)
    : settings(s),
      files(corpus.files),
      text_bytes(corpus.bytes),
      text_tokens(corpus.tokens),
      row_bytes(s.hidden * sizeof(Bf16)),
      fp8_row_bytes(s.hidden + s.hidden / 128 * sizeof(float)),
      imbalance_without_bias(without_bias),
      limited(reach_of(board, &RankRecord::limited)),
      free(reach_of(board, &RankRecord::free)) {
  Phase dispatch = make_phase("dispatch BF16", board, s.repeat,
                              [](const RankRecord& r) -> const Times& { return r.bf16.dispatch_ms; });
  Phase combine = make_phase("combine BF16", board, s.repeat,
                             [](const RankRecord& r) -> const Times& { return r.bf16.combine_ms; });
  Phase fp8 = make_phase("dispatch FP8", board, s.repeat,
                         [](const RankRecord& r) -> const Times& { return r.fp8.dispatch_ms; });
  std::vector<int> rank_rows;
  for (int r = 0; r < s.ranks; ++r) {
    const RankRecord& record = board[r];
    tokens.push_back(record.tokens);
    rows.push_back(record.rows);
    rank_rows.push_back(static_cast<int>(record.rows));
    tokens_between.emplace_back(record.tokens_to.begin(), record.tokens_to.begin() + s.ranks);
    slots.push_back(record.num_slots);
    expert_rows.insert(expert_rows.end(), record.slot_rows.begin(), record.slot_rows.begin() + record.num_slots);
    arena_high_water = std::max(arena_high_water, record.arena_high_water);
    double arriving = 0;
    for (int from = 0; from < s.ranks; ++from) arriving += board[from].tokens_to[r];
    dispatch.rank_bytes.push_back(arriving * static_cast<double>(row_bytes));
    fp8.rank_bytes.push_back(arriving * static_cast<double>(fp8_row_bytes));
    // With weights applied at home, one row per selection returns.
    combine.rank_bytes.push_back(static_cast<double>(record.tokens * s.topk) * static_cast<double>(row_bytes));
  }
  phases = {dispatch, combine, fp8};
  expert_imbalance = imbalance(expert_rows);
  rank_imbalance = imbalance(rank_rows);
}

double Report::most_bytes_between() const {
  double most = 0;
  for (int from = 0; from < settings.ranks; ++from) {
    for (int to = 0; to < settings.ranks; ++to) most = std::max(most, bytes_between(from, to));
  }
  return most;
}

double Report::bytes_across_nodes() const {
  double bytes = 0;
  for (int from = 0; from < settings.ranks; ++from) {
    for (int to = 0; to < settings.ranks; ++to) {
      if (settings.node_of(from) != settings.node_of(to)) bytes += bytes_between(from, to);
    }
  }
  return bytes;
}

double Report::bytes_in_all() const { return phases[0].bytes(); }

std::int64_t Report::tokens_in_all() const { return std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0}); }

Verdict judge(const Settings& settings, const Corpus& corpus, const Board& board) {
  Verdict verdict;
  double error = 0;
  double norm = 0;
  for (int r = 0; r < settings.ranks; ++r) {
    judge_rank(corpus, board, r, verdict);
    error += board[r].fp8_check.error_squared;
    norm += board[r].fp8_check.norm_squared;
  }
  verdict.fp8_error = norm > 0 ? std::sqrt(error / norm) : 0;
  if (norm > 0 && error == 0) {
    verdict.failures.push_back("FP8: the output equals the BF16 one exactly, so nothing can have been quantised");
  }
  return verdict;
}

void write_json(const Report& report, const Verdict& verdict, const std::filesystem::path& file) {
  nlohmann::json json;
  json["what"] =
      "one MoE layer over real text: dispatch, SwiGLU experts, weighted combine; ranks are processes of one machine";
  json["settings"] = to_json(report.settings);
  json["machine"] = {{"cores", std::thread::hardware_concurrency()}};
  json["text"] = {{"files", report.files}, {"bytes", report.text_bytes}, {"tokens", report.text_tokens}};
  json["tokens_per_rank"] = report.tokens;
  json["rows_per_rank"] = report.rows;
  json["dispatch_tokens_between_ranks"] = report.tokens_between;
  json["row_bytes"] = {{"bf16", report.row_bytes}, {"fp8_with_scales", report.fp8_row_bytes}};
  json["timing"] =
      "milliseconds on the host clock; median over repetitions of the slowest rank; bytes are arriving rows";
  for (const Phase& phase : report.phases) json["phases"][phase.name] = to_json(phase);
  json["bytes_across_nodes"] = report.bytes_across_nodes();
  json["expert_rows"] = report.expert_rows;
  json["imbalance_max_over_mean"] = {{"experts", report.expert_imbalance},
                                     {"experts_without_router_bias", report.imbalance_without_bias},
                                     {"ranks", report.rank_imbalance}};
  json["reach"] = {{"group_limited", to_json(report.limited)}, {"without_limit", to_json(report.free)}};
  json["arena_bytes_high_water"] = report.arena_high_water;
  json["verdict"] = to_json(verdict);
  std::ofstream out(file);
  out << json.dump(2) << "\n";
  if (!out.flush()) throw std::runtime_error(fmt::format("cannot write {}", file.string()));
}

}  // namespace moe
