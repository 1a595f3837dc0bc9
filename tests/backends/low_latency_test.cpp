// SPDX-License-Identifier: MIT
// Low latency against the oracle: send and receive apart, several tickets at once, in any order, on any thread.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <thread>

#include "exchange.h"
#include "memory.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

Shape low_latency(OutputLayout layout) {
  Shape s;
  s.layout = layout;
  s.low_latency = true;
  s.tokens = 12;
  return s;
}

using MatrixParam = std::tuple<int, DType, OutputLayout>;
class LowLatencyMatrix : public testing::TestWithParam<MatrixParam> {};

TEST_P(LowLatencyMatrix, every_rank_gets_exactly_what_the_oracle_says) {
  const auto& [ranks, dtype, layout] = GetParam();
  Shape s = low_latency(layout);
  s.ranks = ranks;
  s.dtype = dtype;
  s.hidden = 80;
  s.experts = 2 * ranks + 1;
  s.topk = std::min(5, s.experts);
  s.alignment = layout == OutputLayout::kByExpert ? 8 : 1;
  s.caller_scales = dtype == DType::kFp8E4m3 ? 3 : 0;
  s.max_tokens_per_rank = 16;
  s.seed = static_cast<std::uint64_t>(ranks) + 50;
  expect_dispatch(World(s));
}

INSTANTIATE_TEST_SUITE_P(All, LowLatencyMatrix,
                         testing::Combine(testing::Values(1, 2, 3, 4, 7, 8),
                                          testing::Values(DType::kBf16, DType::kFp32, DType::kU8, DType::kFp8E4m3),
                                          testing::ValuesIn(kLayouts)));

class LowLatencyEveryLayout : public testing::TestWithParam<OutputLayout> {};
INSTANTIATE_TEST_SUITE_P(All, LowLatencyEveryLayout, testing::ValuesIn(kLayouts));

TEST_P(LowLatencyEveryLayout, quantises_to_fp8_in_every_variant_and_scale_order) {
  const std::vector<Fp8Options> variants = {{}, {true, false}, {true, true}};
  for (const Fp8Options& fp8 : variants) {
    for (const auto order : {ScaleOrder::kRowMajor, ScaleOrder::kColumnMajor}) {
      Shape s = low_latency(GetParam());
      s.fp8 = fp8;
      s.scale_order = order;
      s.hidden = 128 * 5;
      expect_dispatch(World(s));
    }
  }
}

TEST_P(LowLatencyEveryLayout, carries_side_tensors_ids_of_32_bits_and_no_weights) {
  Shape s = low_latency(GetParam());
  s.side = {{DType::kFp32, 3}, {DType::kU8, 20}};
  s.idx64 = false;
  s.weights = false;
  expect_dispatch(World(s));
}

TEST_P(LowLatencyEveryLayout, follows_replicas_and_uneven_placements) {
  for (const Homes homes : {Homes::kUneven, Homes::kReplicas}) {
    for (const auto policy : {Placement::Policy::kSpread, Placement::Policy::kLocalFirst}) {
      Shape s = low_latency(GetParam());
      s.homes = homes;
      s.policy = policy;
      s.ranks_per_node = {2};
      s.experts = 9;
      expect_dispatch(World(s));
    }
  }
}

TEST_P(LowLatencyEveryLayout, accepts_no_tokens_and_tokens_that_select_nothing) {
  Shape s = low_latency(GetParam());
  s.percent_missing = 100;
  expect_dispatch(World(s));
  s.percent_missing = 20;
  s.tokens = 1;
  expect_dispatch(World(s));
}

TEST_P(LowLatencyEveryLayout, treats_duplicate_ids_as_selections_of_their_own) {
  Shape s = low_latency(GetParam());
  s.duplicates = true;
  s.experts = 6;
  if (GetParam() == OutputLayout::kPadded) s.max_tokens_per_rank = s.tokens * s.topk;
  expect_dispatch(World(s));
}

TEST_P(LowLatencyEveryLayout, combines_bit_identically_to_the_oracle_in_every_order) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const bool weights : {false, true}) {
      if (weights && GetParam() == OutputLayout::kByRank) continue;  // its rows are sums already
      Shape s = low_latency(GetParam());
      s.ranks_per_node = {2};
      HomewardShape home;
      home.dtype = dtype;
      home.weights = weights;
      home.biases = weights ? 1 : 2;
      expect_combine(World(s), home, all_orders());
    }
  }
}

// Worlds of one shape and several seeds, and what combine must give for each.
struct Series {
  explicit Series(OutputLayout layout, int count) {
    for (int i = 0; i < count; ++i) {
      Shape s = low_latency(layout);
      s.seed = static_cast<std::uint64_t>(i) + 1;
      worlds.emplace_back(s);
      homes.push_back(homeward(worlds.back(), {}));
      sums.push_back(
          oracle::combine(worlds.back().exchange, worlds.back().expected, homes.back().ranks, SumOrder::by_topk()));
    }
  }
  std::vector<World> worlds;
  std::vector<Homeward> homes;
  std::vector<std::vector<oracle::Combined>> sums;
};

TEST_P(LowLatencyEveryLayout, keeps_three_tickets_in_flight_and_receives_them_in_other_orders) {
  const Series series(GetParam(), 3);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    int order[3] = {0, 1, 2};
    do {
      std::vector<Ticket<DispatchOutput>> tickets;
      for (const World& world : series.worlds) tickets.push_back(buffer.low_latency_dispatch(world.input(rank)));
      std::vector<std::shared_ptr<const Handle>> handles(3);
      for (const int i : order) {
        const DispatchOutput got = tickets[i].receive();
        EXPECT_EQ(difference(series.worlds[i], rank, got), "") << "rank " << rank << " ticket " << i;
        EXPECT_FALSE(tickets[i].valid());
        handles[i] = got.handle;
      }
      std::vector<Ticket<CombineOutput>> ways_back;
      for (int i = 0; i < 3; ++i) {
        ways_back.push_back(
            buffer.low_latency_combine(combine_input(series.homes[i], rank, handles[i], SumOrder::by_topk())));
      }
      for (const int i : order)
        EXPECT_EQ(difference(series.sums[i][rank], ways_back[i].receive()), "") << "ticket " << i;
    } while (std::next_permutation(order, order + 3));
  });
}

// Padded outputs on hosts: the first rank leaves its rows for the others to take, the last one finds all of them there
// already and writes its rows where they belong.
TEST_P(LowLatencyEveryLayout, does_not_care_who_sends_first) {
  for (const std::optional<Fp8Options>& fp8 : {std::optional<Fp8Options>(), std::optional<Fp8Options>(Fp8Options{})}) {
    for (const auto order : {ScaleOrder::kRowMajor, ScaleOrder::kColumnMajor}) {
      Shape s = low_latency(GetParam());
      s.fp8 = fp8;
      s.scale_order = order;
      s.hidden = 128 * 3;
      s.side = {{DType::kFp32, 3}};
      s.homes = Homes::kUneven;
      const World world(s);
      Barrier barrier(s.ranks);
      run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        for (int first = 0; first < s.ranks; ++first) {
          Ticket<DispatchOutput> ticket;
          for (int turn = 0; turn < s.ranks; ++turn) {
            barrier.wait();
            if ((first + turn) % s.ranks == rank) ticket = buffer.low_latency_dispatch(world.input(rank));
          }
          EXPECT_EQ(difference(world, rank, ticket.receive()), "") << "rank " << rank << ", first " << first;
        }
      });
    }
  }
}

TEST_P(LowLatencyEveryLayout, receives_on_other_threads) {
  const Series series(GetParam(), 3);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 4; ++repeat) {
      std::vector<Ticket<DispatchOutput>> tickets;
      for (const World& world : series.worlds) tickets.push_back(buffer.low_latency_dispatch(world.input(rank)));
      std::vector<std::thread> threads;
      for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&, i] {
          const Outcome outcome =
              outcome_of([&] { EXPECT_EQ(difference(series.worlds[i], rank, tickets[i].receive()), ""); });
          EXPECT_FALSE(outcome.failed) << outcome.message;
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  });
}

TEST_P(LowLatencyEveryLayout, forgets_dropped_tickets_and_goes_on) {
  const Series series(GetParam(), 3);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 8; ++repeat) {
      auto dropped = buffer.low_latency_dispatch(series.worlds[0].input(rank));
      auto kept = buffer.low_latency_dispatch(series.worlds[1].input(rank));
      dropped = {};
      const auto got = kept.receive();
      EXPECT_EQ(difference(series.worlds[1], rank, got), "") << "repeat " << repeat;
      buffer.low_latency_combine(
          combine_input(series.homes[1], rank, got.handle, SumOrder::by_topk()));  // dropped at once
    }
  });
}

TEST_P(LowLatencyEveryLayout, mixes_with_high_throughput_calls_in_one_sequence) {
  const Series series(GetParam(), 2);
  Shape high = series.worlds[0].shape;
  high.low_latency = false;
  high.tokens = 30;
  high.seed = 77;
  const World world(high);
  const Homeward home = homeward(world, {});
  const auto sums = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 5; ++repeat) {
      auto first = buffer.low_latency_dispatch(series.worlds[0].input(rank));
      const auto sent = buffer.dispatch(world.input(rank));
      auto second = buffer.low_latency_dispatch(series.worlds[1].input(rank));
      EXPECT_EQ(difference(world, rank, sent), "");
      const auto one = first.receive();
      EXPECT_EQ(difference(series.worlds[0], rank, one), "");
      auto back = buffer.low_latency_combine(combine_input(series.homes[0], rank, one.handle, SumOrder::by_topk()));
      EXPECT_EQ(difference(sums[rank], buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank()))),
                "");
      EXPECT_EQ(difference(series.sums[0][rank], back.receive()), "");
      EXPECT_EQ(difference(series.worlds[1], rank, second.receive()), "");
    }
  });
}

TEST_P(LowLatencyEveryLayout, writes_the_sum_where_it_is_told_and_reads_allocated_memory) {
  const Series series(GetParam(), 1);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.low_latency_dispatch(series.worlds[0].input(rank)).receive();
    CombineInput in = combine_input(series.homes[0], rank, sent.handle, SumOrder::by_topk());
    oracle::Array out = series.homes[0].out[rank];
    in.out = out.view();
    const CombineOutput got = buffer.low_latency_combine(in).receive();
    EXPECT_EQ(difference(series.sums[0][rank], got), "");
    EXPECT_EQ(got.x.data, out.view().data);
  });
}

void spoil(const TensorView& rows) {
  const std::vector<std::byte> other(rows.bytes(), std::byte{0x55});
  overwrite(rows, other.data());
}

// Four ranks that have received a dispatch: body(buffer, the combine that follows, its result), on each.
template <class Body>
void run_combines(OutputLayout layout, const Body& body) {
  const Series series(layout, 1);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.low_latency_dispatch(series.worlds[0].input(rank)).receive();
    body(buffer, combine_input(series.homes[0], rank, sent.handle, SumOrder::by_topk()), series.sums[0][rank]);
  });
}

// Without zero_copy the send has copied what it needs.
TEST_P(LowLatencyEveryLayout, combines_rows_that_change_after_the_send) {
  run_combines(GetParam(), [](AnyBuffer& buffer, const CombineInput& plain, const auto& expected) {
    for (int repeat = 0; repeat < 6; ++repeat) {
      CombineInput in = plain;
      const Tensor mine = buffer.allocate_rows(plain);
      in.x = mine;
      auto ticket = buffer.low_latency_combine(in);
      spoil(mine);
      EXPECT_EQ(difference(expected, ticket.receive()), "") << "repeat " << repeat;
    }
  });
}

// Hosts stage rows in the arena; ranks 1 and 3 find no room there.
TEST_P(LowLatencyEveryLayout, combines_where_the_arenas_of_some_ranks_are_full) {
  const Series series(GetParam(), 1);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.low_latency_dispatch(series.worlds[0].input(rank)).receive();
    const auto half = static_cast<std::int64_t>(series.worlds[0].config().arena_bytes / 2);
    const Tensor kept = rank % 2 == 0 ? Tensor() : buffer.allocate(DType::kU8, {half});
    CombineInput in = combine_input(series.homes[0], rank, sent.handle, SumOrder::by_topk());
    for (int repeat = 0; repeat < 8; ++repeat) {
      in.at_once = repeat % 2 == 0;
      EXPECT_EQ(difference(series.sums[0][rank], buffer.low_latency_combine(in).receive()), "") << "repeat " << repeat;
    }
  });
}

// With at_once a rank reads its own rows when it receives, and nobody's later.
TEST_P(LowLatencyEveryLayout, combines_rows_that_change_once_they_are_received) {
  run_combines(GetParam(), [](AnyBuffer& buffer, const CombineInput& plain, const auto& expected) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 20; ++repeat) {
      CombineInput in = plain;
      in.at_once = (rank + repeat) % 3 != 0;
      const Tensor mine = buffer.allocate_rows(plain);
      in.x = mine;
      EXPECT_EQ(difference(expected, buffer.low_latency_combine(in).receive()), "") << "repeat " << repeat;
      spoil(mine);
    }
  });
}

// The tensor is dropped right after the send: what is allocated next must not lie there. Ranks 1 and 3 copy.
TEST_P(LowLatencyEveryLayout, reads_rows_in_place_and_keeps_them_until_all_have_read) {
  run_combines(GetParam(), [](AnyBuffer& buffer, const CombineInput& plain, const auto& expected) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::optional<Ticket<CombineOutput>> ticket;
      {
        CombineInput in = plain;
        in.zero_copy = rank % 2 == 0;
        const Tensor mine = buffer.allocate_rows(plain);
        in.x = mine;
        ticket = buffer.low_latency_combine(in);
      }
      spoil(buffer.allocate_rows(plain));
      EXPECT_EQ(difference(expected, ticket->receive()), "") << "repeat " << repeat;
    }
  });
}

TEST_P(LowLatencyEveryLayout, gives_kept_rows_back_once_all_have_left) {
  run_combines(GetParam(), [](AnyBuffer& buffer, const CombineInput& plain, const auto&) {
    std::size_t most = 0, of_one = 0;
    for (int repeat = 0; repeat < 40; ++repeat) {
      CombineInput in = plain;
      in.zero_copy = true;
      const Tensor mine = buffer.allocate_rows(plain);
      in.x = mine;
      of_one = mine.bytes();
      buffer.low_latency_combine(in).receive();
      if (repeat == 20) most = buffer.statistics().arena_bytes_high_water;
    }
    // How many are kept at once depends on how far behind the others are, which is one operation at most; if none came
    // back, nineteen more would be.
    EXPECT_LE(buffer.statistics().arena_bytes_high_water, most + 6 * of_one);
  });
}

TEST(LowLatency, refuses_a_ticket_that_is_received_twice) {
  const Series series(OutputLayout::kPadded, 1);
  run_ranks(4, series.worlds[0].config(), [&](AnyBuffer& buffer) {
    auto ticket = buffer.low_latency_dispatch(series.worlds[0].input(buffer.rank()));
    ticket.receive();
    EXPECT_EQ(outcome_of([&] { ticket.receive(); }).code, ErrorCode::kInvalidArgument);
  });
}

TEST(LowLatency, tells_of_each_padded_row_whose_token_it_is) {
  const World world(low_latency(OutputLayout::kPadded));
  run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
    const oracle::Dispatched& expected = world.expected[buffer.rank()];
    auto ticket = buffer.low_latency_dispatch(world.input(buffer.rank()));
    const std::shared_ptr<const Handle> promised = ticket.promised()->handle;
    const DispatchOutput out = to_host(ticket.receive());
    const Tensor row_token = to_host(promised->row_token), source_range = to_host(promised->source_range);
    const int topk = world.shape.topk;
    std::vector<std::int64_t> rows_from(source_range.numel(), 0), first_from(source_range.numel(), -1);
    for (int src = 0; src < world.shape.ranks; ++src)
      for (int i = expected.first_arrival[src] * topk; i < expected.first_arrival[src + 1] * topk; ++i) {
        const std::int64_t row = expected.arrival_row[i];
        if (row < 0) continue;
        EXPECT_EQ(row_token.as<const std::int32_t>()[row], expected.src_token[i / topk]) << "row " << row;
        const auto block = static_cast<std::size_t>(row / row_token.size(1) * world.shape.ranks + src);
        if (rows_from[block]++ == 0) first_from[block] = row % row_token.size(1);
      }
    for (std::size_t block = 0; block < rows_from.size(); ++block) {
      const std::int64_t range = source_range.as<const std::int64_t>()[block];
      EXPECT_EQ(range & 0xffffffff, rows_from[block]) << "block " << block;
      if (rows_from[block] > 0) {
        EXPECT_EQ(range >> 32, first_from[block]) << "block " << block;
      }
    }
    const Tensor counts = to_host(promised->slot_rows);
    EXPECT_EQ(std::vector<std::int32_t>(counts.as<std::int32_t>(), counts.as<std::int32_t>() + counts.numel()),
              expected.slot_rows);
  });
}

TEST(LowLatency, brings_topk_weights_home) {
  for (const OutputLayout layout : kLayouts) {
    const World world(low_latency(layout));
    HomewardShape wanted;
    wanted.topk_weights = true;
    const Homeward home = homeward(world, wanted);
    const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_topk());
    run_ranks(4, world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const auto sent = buffer.low_latency_dispatch(world.input(rank)).receive();
      auto back = buffer.low_latency_combine(combine_input(home, rank, sent.handle, SumOrder::by_topk()));
      EXPECT_EQ(difference(expected[rank], back.receive()), "") << world.shape.to_string();
    });
  }
}

}  // namespace
}  // namespace deep_ep::test
