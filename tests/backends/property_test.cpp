// SPDX-License-Identifier: MIT
// Properties that hold for every exchange, on random shapes. Failures print the shape, whose seed repeats them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "exchange.h"

namespace deep_ep::test {
namespace {

// Rows times width stays small, so that many shapes fit into a second.
Shape random_shape(std::uint64_t seed) {
  Random random(seed);
  Shape s;
  s.seed = seed;
  s.ranks = static_cast<int>(random.pick({1, 2, 2, 3, 4, 4, 5, 7, 8}));
  if (random.one_in(2)) s.ranks_per_node = {static_cast<int>(random.between(1, s.ranks))};
  s.layout = random.pick({OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded});
  s.low_latency = random.one_in(3);
  s.dtype = random.pick({DType::kBf16, DType::kFp16, DType::kFp32});
  s.hidden = 8 * random.pick({2, 2, 3, 5, 16, 17, 64, 100});
  s.topk = static_cast<int>(random.pick({1, 2, 3, 8, 8, 16, 32}));
  s.experts = static_cast<int>(random.pick({1, 2, 7, 16, 64, 100, 256, 1024}));
  s.tokens = static_cast<int>(random.between(1, 20));
  s.percent_missing = static_cast<int>(random.pick({0, 0, 10, 50, 95}));
  s.duplicates = s.layout != OutputLayout::kPadded && random.one_in(3);
  s.homes = random.pick({Homes::kEven, Homes::kUneven, Homes::kReplicas});
  if (s.homes == Homes::kReplicas) s.experts = std::min(s.experts, 100);
  s.policy = random.pick({Placement::Policy::kSpread, Placement::Policy::kLocalFirst});
  if (s.layout == OutputLayout::kPadded) {
    s.experts = std::min(s.experts, 64);
  } else if (random.one_in(2)) {
    s.alignment = static_cast<int>(random.pick({2, 4, 16}));
  }
  s.weights = random.one_in(2);
  s.idx64 = random.one_in(2);
  s.mask_weights = random.one_in(2);
  if (s.hidden % 16 == 0 && random.one_in(4)) s.fp8 = Fp8Options{random.one_in(2), false};
  if (random.one_in(3)) s.side = {{DType::kI32, static_cast<int>(random.between(1, 4))}};
  return s;
}

// A few shapes at the far ends: wide rows, many experts, many selections.
Shape extreme_shape(std::uint64_t seed) {
  Random random(seed);
  Shape s = random_shape(seed);
  s.ranks = static_cast<int>(random.pick({2, 4}));
  s.ranks_per_node = {};
  s.layout = random.pick({OutputLayout::kByRank, OutputLayout::kByExpert});
  s.tokens = 5;
  s.hidden = random.pick({4096, 7168, 8192});
  s.topk = 8;
  s.experts = 256;
  s.duplicates = false;
  s.homes = Homes::kEven;
  return s;
}

TEST(Properties, dispatch_and_combine_equal_the_oracle_on_random_shapes) {
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(cases(300)); ++seed) {
    const World world(random_shape(seed));
    HomewardShape home;
    home.dtype = world.shape.dtype;
    home.hidden = world.shape.hidden;
    home.biases = static_cast<int>(seed % 3);
    home.weights = world.shape.layout != OutputLayout::kByRank && seed % 2 == 0;
    home.topk_weights = seed % 5 == 0;
    expect_dispatch(world);
    const auto orders = all_orders();
    expect_combine(world, home, {orders[seed % orders.size()], SumOrder::by_topk()});
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Properties, dispatch_and_combine_equal_the_oracle_on_wide_shapes) {
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(cases(16)); ++seed) {
    const World world(extreme_shape(seed));
    HomewardShape home;
    home.dtype = world.shape.dtype;
    home.hidden = world.shape.hidden;
    expect_dispatch(world);
    expect_combine(world, home, {SumOrder::by_rank()});
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Properties, every_token_reaches_each_of_its_ranks_once) {
  for (std::uint64_t seed = 1000; seed < 1000 + static_cast<std::uint64_t>(cases(80)); ++seed) {
    Shape s = random_shape(seed);
    s.side = {{DType::kI64, 2}};  // (source rank, source token): what arrives says where it came from
    World world(s);
    for (int r = 0; r < s.ranks; ++r) {
      for (std::int64_t t = 0; t < world.ranks[r].x.rows(); ++t) {
        world.ranks[r].side[0].set<std::int64_t>(2 * t, r);
        world.ranks[r].side[0].set<std::int64_t>(2 * t + 1, t);
      }
    }
    world.expect_again();
    using Token = std::pair<std::int64_t, std::int64_t>;
    std::vector<std::map<Token, int>> arrived(s.ranks);
    std::vector<DispatchLayout> layouts(s.ranks);
    run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const DispatchOutput got = what_came(dispatch(buffer, world.input(rank), s.low_latency));
      const auto* from = got.side[0].as<std::int64_t>();
      for (std::int64_t a = 0; a < got.handle->num_arrivals; ++a) ++arrived[rank][{from[2 * a], from[2 * a + 1]}];
      layouts[rank] = buffer.dispatch_layout(world.ranks[rank].topk_idx.view(), s.experts, world.placement);
    });
    for (int dst = 0; dst < s.ranks; ++dst) {
      std::size_t wanted = 0;
      for (int src = 0; src < s.ranks; ++src) {
        for (std::int64_t t = 0; t < world.ranks[src].x.rows(); ++t) {
          if (layouts[src].is_token_in_rank.as<std::uint8_t>()[t * s.ranks + dst] == 0) continue;
          ++wanted;
          ASSERT_EQ((arrived[dst][{src, t}]), 1)
              << "token " << t << " of rank " << src << " on " << dst << ": " << s.to_string();
        }
      }
      ASSERT_EQ(arrived[dst].size(), wanted) << s.to_string();
    }
  }
}

// One contribution of weight one per token: what comes back is what was sent.
TEST(Properties, combine_of_dispatch_is_the_identity_for_unit_weights) {
  for (std::uint64_t seed = 2000; seed < 2000 + static_cast<std::uint64_t>(cases(80)); ++seed) {
    Shape s = random_shape(seed);
    s.fp8.reset();
    s.topk = 1;
    s.percent_missing = 0;
    const World world(s);
    run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const auto sent = dispatch(buffer, world.input(rank), s.low_latency);
      CombineInput in;
      in.x = sent.x;
      in.handle = sent.handle;
      const oracle::Array ones = [&] {
        oracle::Array a(DType::kFp32, {world.ranks[rank].x.rows(), 1});
        for (std::int64_t t = 0; t < a.rows(); ++t) a.set(t, 1.0f);
        return a;
      }();
      if (s.layout != OutputLayout::kByRank) in.weights = ones.view();
      in.order = SumOrder::by_topk();
      EXPECT_EQ(difference("combined", combine(buffer, in, s.low_latency).x, world.ranks[rank].x), "") << s.to_string();
    });
    if (testing::Test::HasFailure()) return;
  }
}

std::int64_t sum(const TensorView& ints) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < ints.numel(); ++i) total += ints.as<std::int32_t>()[i];
  return total;
}

TEST(Properties, counts_are_conserved) {
  for (std::uint64_t seed = 3000; seed < 3000 + static_cast<std::uint64_t>(cases(80)); ++seed) {
    Shape s = random_shape(seed);
    s.low_latency = false;
    const World world(s);
    std::vector<DispatchOutput> outputs(s.ranks);
    std::vector<DispatchLayout> layouts(s.ranks);
    run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      layouts[rank] = buffer.dispatch_layout(world.ranks[rank].topk_idx.view(), s.experts, world.placement);
      outputs[rank] = to_host(buffer.dispatch(world.input(rank)));
    });
    std::int64_t selected = 0, received = 0, tokens_sent = 0, tokens_received = 0;
    for (int r = 0; r < s.ranks; ++r) {
      const Handle& h = *outputs[r].handle;
      selected += sum(layouts[r].tokens_per_expert);
      received += sum(h.slot_rows);
      tokens_sent += sum(layouts[r].tokens_per_rank);
      tokens_received += h.num_arrivals;
      for (int to = 0; to < s.ranks; ++to) {
        const std::int32_t said = layouts[r].tokens_per_rank.as<std::int32_t>()[to];
        const Handle& there = *outputs[to].handle;
        EXPECT_EQ(said, h.tokens_between.as<std::int32_t>()[r * s.ranks + to]) << s.to_string();
        EXPECT_EQ(said, there.first_arrival.as<std::int32_t>()[r + 1] - there.first_arrival.as<std::int32_t>()[r]);
      }
      EXPECT_EQ(std::memcmp(h.tokens_between.data, outputs[0].handle->tokens_between.data, h.tokens_between.bytes()),
                0);
    }
    EXPECT_EQ(selected, received) << s.to_string();
    EXPECT_EQ(tokens_sent, tokens_received) << s.to_string();
  }
}

TEST(Properties, results_are_bit_identical_for_every_number_of_workers_and_across_repeats) {
  for (std::uint64_t seed = 4000; seed < 4000 + static_cast<std::uint64_t>(cases(8)); ++seed) {
    Shape s = random_shape(seed);
    s.ranks = 3;
    s.ranks_per_node = {};
    s.tokens = 40;
    const World world(s);
    HomewardShape home;
    home.dtype = s.dtype;
    home.hidden = s.hidden;
    for (int workers = 1; workers <= 4; ++workers) {
      expect_dispatch(world, Options{.num_workers = workers});
      expect_combine(world, home, {SumOrder::by_rank(), SumOrder::by_rank(), SumOrder::by_topk()},
                     Options{.num_workers = workers});
    }
    run_ranks(
        s.ranks, world.config(),
        [&](AnyBuffer& buffer) {
          for (int workers = 0; workers <= 5; ++workers) {  // per call; more than the buffer has means all of them
            DispatchInput in = world.input(buffer.rank());
            in.num_workers = workers;
            EXPECT_EQ(difference(world, buffer.rank(), dispatch(buffer, in, s.low_latency)), "")
                << workers << " workers";
          }
        },
        Options{.num_workers = 4});
  }
}

// One buffer, many different calls: nothing of one call may leak into the next.
class Sequence {
 public:
  Sequence(std::uint64_t first_seed, int calls) {
    for (int i = 0; i < calls; ++i) {
      Shape s = random_shape(first_seed + static_cast<std::uint64_t>(i));
      s.ranks = kRanks;
      s.ranks_per_node = {2};
      s.topk = std::min(s.topk, 16);
      worlds_.emplace_back(s);
      HomewardShape home;
      home.dtype = s.dtype;
      home.hidden = s.hidden;
      homes_.push_back(homeward(worlds_.back(), home));
      sums_.push_back(
          oracle::combine(worlds_.back().exchange, worlds_.back().expected, homes_.back().ranks, SumOrder::by_topk()));
    }
  }

  static constexpr int kRanks = 4;
  static Config config() {
    Config config = small_config();
    config.ranks_per_node = {2};
    config.max_experts = 1024;
    config.low_latency = {.max_tokens_per_rank = 20, .row_bytes = 4 * 800, .num_topk = 16, .side_bytes = 256};
    return config;
  }
  void run(AnyBuffer& buffer) const {
    const int rank = buffer.rank();
    for (std::size_t i = 0; i < worlds_.size(); ++i) {
      const Shape& s = worlds_[i].shape;
      const auto sent = dispatch(buffer, worlds_[i].input(rank), s.low_latency);
      EXPECT_EQ(difference(worlds_[i], rank, sent), "") << "rank " << rank << " call " << i << " " << s.to_string();
      const auto got = combine(buffer, combine_input(homes_[i], rank, sent.handle, SumOrder::by_topk()), s.low_latency);
      EXPECT_EQ(difference(sums_[i][rank], got), "") << "rank " << rank << " call " << i << " " << s.to_string();
    }
  }

 private:
  std::vector<World> worlds_;
  std::vector<Homeward> homes_;
  std::vector<std::vector<oracle::Combined>> sums_;
};

TEST(Properties, one_buffer_serves_any_sequence_of_shapes) {
  const Sequence sequence(5000, cases(80));
  run_ranks(Sequence::kRanks, Sequence::config(), [&](AnyBuffer& buffer) { sequence.run(buffer); });
}

TEST(ProcessRanks, are_served_any_sequence_of_shapes_by_one_buffer) {
  const Sequence sequence(6000, cases(80));
  Processes processes(Sequence::kRanks, [&](int, std::shared_ptr<Bootstrap> group, Blackboard&) {
    sequence.run(*AnyBuffer::open(std::move(group), Sequence::config()));
  });
  EXPECT_EQ(processes.wait(), std::vector<int>(Sequence::kRanks, 0));
}

}  // namespace
}  // namespace deep_ep::test
