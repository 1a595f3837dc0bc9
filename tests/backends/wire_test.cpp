// SPDX-License-Identifier: MIT
// Low-latency combine in its wire formats: bit for bit the sums that the oracle makes of the rows as they come back.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr WireFormat kFormats[] = {WireFormat::kLogFmt10, WireFormat::kFp8};

Shape low_latency(OutputLayout layout, std::int64_t hidden) {
  Shape s;
  s.layout = layout;
  s.low_latency = true;
  s.tokens = 12;
  s.hidden = hidden;
  return s;
}

class WireFormats : public testing::TestWithParam<std::tuple<WireFormat, OutputLayout>> {
 protected:
  HomewardShape homeward_in_format(std::int64_t hidden) const {
    HomewardShape home;
    home.hidden = hidden;
    home.wire = std::get<0>(GetParam());
    home.weights = layout() != OutputLayout::kByRank;  // its rows are sums already
    return home;
  }
  OutputLayout layout() const { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(All, WireFormats,
                         testing::Combine(testing::ValuesIn(kFormats),
                                          testing::Values(OutputLayout::kByRank, OutputLayout::kByExpert,
                                                          OutputLayout::kPadded)));

TEST_P(WireFormats, sums_are_those_of_the_oracle_for_every_width) {
  for (const std::int64_t hidden : {8, 16, 120, 128, 264, 1024, 7168}) {
    HomewardShape home = homeward_in_format(hidden);
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      home.dtype = dtype;
      expect_combine(World(low_latency(layout(), hidden)), home, {SumOrder::by_topk()});
    }
  }
}

TEST_P(WireFormats, sums_are_those_of_the_oracle_in_every_order) {
  Shape s = low_latency(layout(), 264);
  s.ranks_per_node = {2};
  HomewardShape home = homeward_in_format(264);
  home.biases = 2;
  home.topk_weights = true;
  expect_combine(World(s), home, all_orders());
}

TEST_P(WireFormats, infinities_nans_zeros_and_extremes_cross_as_the_oracle_says) {
  HomewardShape home = homeward_in_format(520);
  home.odd_rows = true;
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    home.dtype = dtype;
    expect_combine(World(low_latency(layout(), 520)), home, {SumOrder::by_topk(), SumOrder::by_rank()});
  }
}

std::vector<std::byte> bytes_of(const Tensor& tensor) {
  const auto* first = tensor.as<const std::byte>();
  return {first, first + tensor.bytes()};
}

TEST_P(WireFormats, sums_have_the_same_bits_with_any_number_of_workers_and_each_time) {
  Shape s = low_latency(layout(), 1024);
  s.tokens = 70;  // more than one piece of work
  const World world(s);
  const Homeward home = homeward(world, homeward_in_format(1024));
  Options options;
  options.num_workers = 3;
  run_ranks(
      s.ranks, world.config(),
      [&](AnyBuffer& buffer) {
        const int rank = buffer.rank();
        const DispatchOutput sent = buffer.low_latency_dispatch(world.input(rank)).receive();
        std::vector<std::byte> first;
        for (const int workers : {1, 2, 3, 1, 3}) {
          CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_topk());
          in.num_workers = workers;
          const CombineOutput out = to_host(buffer.low_latency_combine(in).receive());
          if (first.empty()) first = bytes_of(out.x);
          EXPECT_EQ(bytes_of(out.x), first) << workers << " workers";
        }
      },
      options);
}

TEST_P(WireFormats, tickets_of_all_formats_use_the_same_slots_in_turn) {
  const World world(low_latency(layout(), 264));
  std::vector<Homeward> homes;
  std::vector<std::vector<oracle::Combined>> sums;
  for (const WireFormat wire : {WireFormat::kAsIs, std::get<0>(GetParam())}) {
    HomewardShape shape = homeward_in_format(264);
    shape.wire = wire;
    homes.push_back(homeward(world, shape));
    sums.push_back(oracle::combine(world.exchange, world.expected, homes.back().ranks, SumOrder::by_topk()));
  }
  run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const DispatchOutput sent = buffer.low_latency_dispatch(world.input(rank)).receive();
    for (int repeat = 0; repeat < 6; ++repeat) {
      std::vector<Ticket<CombineOutput>> tickets;
      for (int i = 0; i < 3; ++i)
        tickets.push_back(
            buffer.low_latency_combine(combine_input(homes[(repeat + i) % 2], rank, sent.handle, SumOrder::by_topk())));
      for (int i = 0; i < 3; ++i)
        EXPECT_EQ(difference(sums[(repeat + i) % 2][rank], tickets[i].receive()), "") << repeat << ", ticket " << i;
    }
  });
}

// What every rank's combine says where `change` makes the calls wrong; they are made alike on all ranks, or by one.
template <typename Change>
void expect_refused(bool low, const HomewardShape& shape, const Change& change, const std::string& text) {
  Shape s = low_latency(OutputLayout::kPadded, 64);
  s.low_latency = low;
  const World world(s);
  const Homeward home = homeward(world, shape);
  run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const DispatchOutput sent = dispatch(buffer, world.input(rank), low);
    CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_topk());
    change(rank, in);
    const Outcome outcome = outcome_of([&] { combine(buffer, in, low); });
    EXPECT_TRUE(outcome.failed);
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_NE(outcome.message.find(text), std::string::npos) << outcome.message;
  });
}

TEST(WireFormatRefusals, name_what_is_wrong) {
  const auto logfmt = [](int, CombineInput& in) { in.wire = WireFormat::kLogFmt10; };
  expect_refused(false, {}, logfmt, "wire: LogFMT-10 is for low latency");
  expect_refused(true, {.dtype = DType::kFp32}, logfmt, "wire: LogFMT-10 is for rows of bf16 and fp16: x is fp32");
  const auto pre_reduced = [&](int rank, CombineInput& in) {
    logfmt(rank, in);
    in.order.round_per_rank = in.pre_reduce = true;
  };
  expect_refused(true, {}, pre_reduced, "wire and pre_reduce exclude each other");
  const auto differing = [](int rank, CombineInput& in) {
    in.wire = rank == 0 ? WireFormat::kFp8 : WireFormat::kLogFmt10;
  };
  expect_refused(true, {}, differing, "ranks differ in wire");
}

}  // namespace
}  // namespace deep_ep::test
