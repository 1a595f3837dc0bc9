// SPDX-License-Identifier: MIT
// One rank: meet, route, run the layer in BF16, check it, run it in FP8, compare.
#include "rank.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <exception>
#include <utility>

#include "deep_ep/bootstrap.h"
#include "layer.h"
#include "model.h"
#include "reference.h"

namespace moe {
namespace {

using deep_ep::DispatchOutput;
using deep_ep::Tensor;

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape == b.shape && (a.bytes() == 0 || std::memcmp(a.data, b.data, a.bytes()) == 0);
}

/// A rank while it runs.
class Rank {
 public:
  Rank(const Job& job, int rank)
      : settings_(job.settings),
        rank_(rank),
        record_(job.board[rank]),
        group_(meet(job, rank)),
        layer_(settings_, group_) {}

  void run(const Job& job) {
    record_.finish(Stage::kMeet);
    route(job);
    record_.finish(Stage::kRoute);

    const DispatchOutput received = dispatch(false, record_.bf16);
    remember_traffic(*received.handle);
    record_.finish(Stage::kDispatch);
    if (settings_.fail_rank == rank_) raise(SIGKILL);
    const Tensor y = run_layer_on(received, record_.bf16, Stage::kExperts);
    record_.finish(Stage::kCombine);
    check_bits(y);
    record_.finish(Stage::kCheck);

    const DispatchOutput received_fp8 = dispatch(true, record_.fp8);
    record_.finish(Stage::kDispatchFp8);
    const Tensor y_fp8 = run_layer_on(received_fp8, record_.fp8, Stage::kExpertsFp8);
    record_.finish(Stage::kCombineFp8);
    check_received_fp8(received, received_fp8);
    check_output_fp8(y, y_fp8);
    record_.arena_high_water = layer_.buffer().statistics().arena_bytes_high_water;
    record_.finish(Stage::kCompare);
  }

 private:
  static std::shared_ptr<deep_ep::Bootstrap> meet(const Job& job, int rank) {
    deep_ep::TcpRendezvous where;
    where.port = job.port;
    where.rank = rank;
    where.num_ranks = job.settings.ranks;
    where.job = "moe_layer";
    where.timeout = std::chrono::seconds(job.settings.timeout_s);
    return deep_ep::tcp_group(where);
  }

  void route(const Job& job) {
    x_ = embed(settings_, job.corpus.batches[rank_]);
    const std::vector<float> scores = job.router.scores(x_);
    routing_ = job.router.choose(scores);
    record_.tokens = tokens();
    record_.limited = spread_of(routing_);
    record_.free = spread_of(job.router.choose_freely(scores));
  }

  /// Counted by the library: where such a routing would send this rank's tokens. Nothing is sent.
  Spread spread_of(const Routing& routing) {
    const deep_ep::TensorView ids(routing.experts.data(), deep_ep::DType::kI64, {tokens(), settings_.topk});
    const deep_ep::DispatchLayout layout = layer_.buffer().dispatch_layout(ids, settings_.experts);
    const auto* goes = layout.is_token_in_rank.as<std::uint8_t>();
    Spread spread;
    for (int r = 0; r < settings_.ranks; ++r) spread.ranks += layout.tokens_per_rank.as<std::int32_t>()[r];
    for (int n = 0; n < layer_.buffer().num_nodes(); ++n) spread.nodes += layout.tokens_per_node.as<std::int32_t>()[n];
    for (std::int64_t t = 0; t < tokens(); ++t, goes += settings_.ranks) {
      bool crosses = false;
      for (int r = 0; r < settings_.ranks; ++r) {
        crosses = crosses || (goes[r] != 0 && layer_.buffer().node_of(r) != layer_.buffer().node_of(rank_));
      }
      spread.crossing += crosses ? 1 : 0;
    }
    return spread;
  }

  /// Milliseconds of one collective call on this rank's clock. All ranks begin together, as far as a message through
  /// TCP can make them.
  template <typename Call>
  double time_of(Call&& call) {
    group_->all_gather({}, std::chrono::seconds(settings_.timeout_s));
    const auto begin = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }

  DispatchOutput dispatch(bool fp8, ExchangeTimes& times) {
    DispatchOutput first;
    for (int i = 0; i < settings_.repeat; ++i) {
      DispatchOutput again;
      times.dispatch_ms[i] = time_of([&] { again = layer_.dispatch(x_, routing_, fp8); });
      if (i == 0) {
        first = std::move(again);
      } else {
        record_.repeats_agree = record_.repeats_agree && same_bits(first.x, again.x);
      }
    }
    return first;
  }

  Tensor run_layer_on(const DispatchOutput& received, ExchangeTimes& times, Stage experts) {
    const Tensor rows = layer_.run_experts(received);
    record_.finish(experts);
    Tensor first;
    for (int i = 0; i < settings_.repeat; ++i) {
      Tensor again;
      times.combine_ms[i] = time_of([&] { again = layer_.combine(rows, received, routing_); });
      if (i == 0) {
        first = std::move(again);
      } else {
        record_.repeats_agree = record_.repeats_agree && same_bits(first, again);
      }
    }
    return first;
  }

  void remember_traffic(const deep_ep::Handle& handle) {
    const auto* tokens_between = handle.tokens_between.as<std::int32_t>();
    std::copy_n(tokens_between + static_cast<std::ptrdiff_t>(rank_) * settings_.ranks, settings_.ranks,
                record_.tokens_to.begin());
    record_.num_slots = static_cast<int>(handle.slot_rows.size(0));
    for (int slot = 0; slot < record_.num_slots; ++slot) {
      record_.slot_rows[slot] = handle.slot_rows.as<std::int32_t>()[slot];
      record_.rows += record_.slot_rows[slot];
    }
  }

  void check_bits(const Tensor& y) {
    const std::vector<Bf16> expected = layer_without_communication(settings_, x_, routing_);
    const auto* got = y.as<Bf16>();
    BitCheck& check = record_.check;
    check.values = static_cast<std::int64_t>(expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (got[i] == expected[i]) continue;
      if (check.wrong++ > 0) continue;
      check.token = static_cast<std::int64_t>(i) / settings_.hidden;
      check.channel = static_cast<std::int64_t>(i) % settings_.hidden;
      check.got = widen(got[i]);
      check.expected = widen(expected[i]);
    }
  }

  /// Both dispatches put the same tokens into the same rows, so that the FP8 rows can be compared value by value.
  /// Rounding to E4M3 costs half a step: 2^-4 of the value, or 2^-10 of the scale where the code is subnormal. The
  /// scale is an FP32 number and so is the product with it; their own roundings are allowed for by a part in 2^20.
  void check_received_fp8(const DispatchOutput& exact, const DispatchOutput& quantised) {
    const auto* first_row = exact.handle->slot_first_row.as<std::int32_t>();
    const std::int64_t scales_per_row = settings_.hidden / 128;
    for (int slot = 0; slot < record_.num_slots; ++slot) {
      const std::int64_t first = first_row[slot];
      const std::int64_t last = first + record_.slot_rows[slot];
      const std::vector<float> values = widen_rows(exact, first, last);
      const std::vector<float> rounded = widen_rows(quantised, first, last);
      const float* scales = quantised.scales.as<float>() + first * scales_per_row;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const float half_step = std::max(std::fabs(values[i]) * 0x1p-4F, scales[i / 128] * 0x1p-10F);
        const double share = std::fabs(rounded[i] - values[i]) / (half_step * (1 + 0x1p-20));
        // Not std::max, which would pass over a NaN.
        if (!(share <= record_.fp8_check.worst_element)) record_.fp8_check.worst_element = share;
      }
    }
  }

  void check_output_fp8(const Tensor& exact, const Tensor& quantised) {
    for (std::int64_t i = 0; i < exact.numel(); ++i) {
      const double value = widen(exact.as<Bf16>()[i]);
      const double error = widen(quantised.as<Bf16>()[i]) - value;
      record_.fp8_check.error_squared += error * error;
      record_.fp8_check.norm_squared += value * value;
    }
  }

  std::int64_t tokens() const { return static_cast<std::int64_t>(x_.size()) / settings_.hidden; }

  const Settings& settings_;
  int rank_;
  RankRecord& record_;
  std::shared_ptr<deep_ep::Bootstrap> group_;
  Layer layer_;
  std::vector<Bf16> x_;
  Routing routing_;
};

}  // namespace

int run_rank(const Job& job, int rank) {
  try {
    Rank(job, rank).run(job);
    return 0;
  } catch (const std::exception& error) {
    job.board[rank].set_failure(error.what());
    return 1;
  }
}

}  // namespace moe
