// SPDX-License-Identifier: MIT
// Every wrong argument: the rank that is wrong hears which argument and both values, the others which rank refused, and
// the next call works.
#include <gtest/gtest.h>

#include <functional>

#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr int kRanks = 3;
constexpr int kWrongRank = 1;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <typename Input>
struct Mistake {
  const char* name;
  std::function<void(Input&)> make;
  std::vector<std::string> named;  // what the message must name
};

Shape plain() {
  Shape s;
  s.ranks = kRanks;
  s.experts = 12;
  s.tokens = 10;
  s.uneven_tokens = false;
  s.side = {{DType::kI32, 2}};
  return s;
}

Config roomy(const World& world) {
  Config config = world.config();
  config.max_experts = 24;
  return config;
}

// What a rank must hear of a call in which kWrongRank made this mistake.
void expect_refusal(const Outcome& outcome, int rank, const char* mistake, const std::vector<std::string>& named) {
  EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << mistake << " on rank " << rank << ": " << outcome.message;
  if (rank != kWrongRank) {
    EXPECT_TRUE(contains(outcome.message, "rank " + std::to_string(kWrongRank))) << mistake << ": " << outcome.message;
    return;
  }
  EXPECT_EQ(outcome.message.rfind("invalid argument: ", 0), 0u) << outcome.message;
  for (const std::string& part : named)
    EXPECT_TRUE(contains(outcome.message, part)) << mistake << " lacks " << part << ": " << outcome.message;
}

// Memory that mistakes point to.
struct Spare {
  oracle::Array bytes{DType::kU8, {1 << 20}};
  TensorView view(DType dtype, std::initializer_list<std::int64_t> shape) const {
    return {bytes.view().data, dtype, shape};
  }
};

void stretch(TensorView& view) { view.strides[0] = view.shape[1] + 1; }

std::vector<Mistake<DispatchInput>> dispatch_mistakes(const Spare& spare) {
  return {
      {"no x", [](auto& in) { in.x = {}; }, {"x"}},
      {"x of one dimension", [](auto& in) { in.x.ndim = 1; }, {"x", "2 dimensions", "bf16[10]"}},
      {"x not contiguous",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 64});
         stretch(in.x);
       },
       {"x", "contiguous", "bf16[10, 64]", "strides 65"}},
      {"x with fewer rows", [](auto& in) { in.x.shape[0] = 9; }, {"x", "topk_idx", "9", "10"}},
      {"a row that is no multiple of 16 bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 12});
       },
       {"x", "24", "16"}},
      {"no topk_idx", [](auto& in) { in.topk_idx = {}; }, {"topk_idx"}},
      {"topk_idx of another type",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kFp32, {10, 4});
       },
       {"topk_idx", "i32 or i64", "fp32"}},
      {"topk_idx not contiguous",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         stretch(in.topk_idx);
       },
       {"topk_idx", "contiguous", "i64[10, 4]", "strides 5"}},
      {"an id out of range",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         in.topk_idx.template as<std::int64_t>()[7] = 12;
       },
       {"topk_idx[1, 3]", "expert 12", "0 .. 11"}},
      {"weights of another type",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kBf16, {10, 4});
       },
       {"topk_weights", "bf16[10, 4]", "fp32[10, 4]"}},
      {"weights of another shape",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {10, 3});
       },
       {"topk_weights", "fp32[10, 3]", "fp32[10, 4]"}},
      {"scales of another type",
       [&](auto& in) {
         in.scales = spare.view(DType::kBf16, {10, 4});
       },
       {"scales", "fp32 or i32", "bf16"}},
      {"scales with fewer rows",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {9, 4});
       },
       {"scales", "9", "10"}},
      {"scales and quantisation together",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {10, 4});
         in.fp8 = Fp8Options{};
       },
       {"scales", "fp8"}},
      {"quantising bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kU8, {10, 128});
         in.fp8 = Fp8Options{};
       },
       {"x", "bf16, fp16 or fp32", "u8"}},
      {"exponent scales that are not rounded",
       [](auto& in) {
         in.fp8 = Fp8Options{false, true};
       },
       {"ue8m0", "round_scale"}},
      {"a side tensor with fewer rows",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kI32, {9, 2});
       },
       {"side", "9", "10"}},
      {"a side tensor of odd rows",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kU8, {10, 7});
       },
       {"side", "7", "4"}},
      {"no experts", [](auto& in) { in.num_experts = 0; }, {"num_experts", "at least 1", "0"}},
      {"more experts than planned", [](auto& in) { in.num_experts = 25; }, {"max_experts", "25", "24"}},
      {"a placement of other experts",
       [](auto& in) { in.placement = Placement::even(13, kRanks); },
       {"placement", "13", "12"}},
      {"a placement of other ranks",
       [](auto& in) { in.placement = Placement::even(12, kRanks + 1); },
       {"placement", "4", "3"}},
      {"an alignment of zero", [](auto& in) { in.expert_alignment = 0; }, {"expert_alignment", "at least 1", "0"}},
      {"a negative alignment", [](auto& in) { in.expert_alignment = -8; }, {"expert_alignment", "at least 1", "-8"}},
      {"padded without a bound", [](auto& in) { in.layout = OutputLayout::kPadded; }, {"max_tokens_per_rank"}},
      {"more tokens than the bound",
       [](auto& in) {
         in.layout = OutputLayout::kPadded;
         in.max_tokens_per_rank = 9;
       },
       {"max_tokens_per_rank", "10", "9"}},
      {"a negative bound of rows", [](auto& in) { in.max_rows = -1; }, {"max_rows", "-1"}},
  };
}

TEST(DispatchErrors, each_wrong_argument_is_named_on_every_rank_and_the_next_call_works) {
  const World world(plain());
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    Spare mine = spare;  // ids are written there
    for (const auto& mistake : dispatch_mistakes(mine)) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.dispatch(in); }), rank, mistake.name, mistake.named);
      const Outcome next = outcome_of(
          [&] { EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
    EXPECT_GE(buffer.statistics().refused, 20u);
  });
}

TEST(DispatchErrors, everybody_makes_the_same_mistake_and_the_next_call_works) {
  const World world(plain());
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    in.expert_alignment = 0;
    EXPECT_EQ(outcome_of([&] { buffer.dispatch(in); }).code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

TEST(DispatchErrors, what_a_handle_says_must_be_left_out) {
  const World world(plain());
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"ids", [&](auto& in) { in.topk_idx = world.ranks[kWrongRank].topk_idx.view(); }, {"topk_idx", "handle"}},
      {"experts", [](auto& in) { in.num_experts = 12; }, {"num_experts", "handle"}},
      {"a placement", [](auto& in) { in.placement = Placement::even(12, kRanks); }, {"placement", "handle"}},
      {"a layout", [](auto& in) { in.layout = OutputLayout::kByExpert; }, {"layout", "handle"}},
      {"an alignment", [](auto& in) { in.expert_alignment = 4; }, {"expert_alignment", "handle"}},
      {"other tokens", [](auto& in) { in.x.shape[0] = 9; }, {"x", "9", "10"}},
  };
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const auto& mistake : mistakes) {
      DispatchInput in;
      in.x = world.input(rank).x;
      in.handle = sent.handle;
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.dispatch(in); }), rank, mistake.name, mistake.named);
    }
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

std::vector<Mistake<CombineInput>> combine_mistakes(const Spare& spare) {
  return {
      {"no handle", [](auto& in) { in.handle = nullptr; }, {"handle"}},
      {"nothing to bring home", [](auto& in) { in.x = {}; }, {"x"}},
      {"bytes", [&](auto& in) { in.x.dtype = DType::kU8; }, {"x", "bf16, fp16 or fp32", "u8"}},
      {"a row too few", [](auto& in) { in.x.shape[0] -= 1; }, {"x must be bf16[", "it is bf16["}},
      {"x not contiguous", [](auto& in) { stretch(in.x); }, {"x", "contiguous", "strides 65"}},
      {"a row that is no multiple of 16 bytes",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {in.x.shape[0], 12});
         in.out = {};
       },
       {"x", "24", "16"}},
      {"a bias of another type",
       [&](auto& in) {
         in.bias[0] = spare.view(DType::kFp32, {10, 64});
       },
       {"bias[0]", "fp32[10, 64]", "bf16[10, 64]"}},
      {"a bias of another shape",
       [&](auto& in) {
         in.bias[1] = spare.view(DType::kBf16, {9, 64});
       },
       {"bias[1]", "bf16[9, 64]", "bf16[10, 64]"}},
      {"weights of rows that are sums",
       [&](auto& in) {
         in.weights = spare.view(DType::kFp32, {10, 4});
       },
       {"weights"}},
      {"topk_weights of another shape",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {1, 4});
       },
       {"topk_weights must be fp32[", "it is fp32[1, 4]"}},
      {"out of another type",
       [&](auto& in) {
         in.out = spare.view(DType::kFp16, {10, 64});
       },
       {"out", "fp16[10, 64]", "bf16[10, 64]"}},
      {"out of another shape",
       [&](auto& in) {
         in.out = spare.view(DType::kBf16, {10, 32});
       },
       {"out", "bf16[10, 32]", "bf16[10, 64]"}},
  };
}

TEST(CombineErrors, each_wrong_argument_is_named_on_every_rank_and_the_next_call_works) {
  const World world(plain());
  const Homeward home = homeward(world, {});
  const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank());
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const auto& mistake : combine_mistakes(spare)) {
      CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
      const CombineInput right = in;
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.combine(in); }), rank, mistake.name, mistake.named);
      const Outcome next =
          outcome_of([&] { EXPECT_EQ(difference(expected[rank], buffer.combine(right)), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
  });
}

TEST(CombineErrors, weights_of_another_shape_are_named) {
  Shape s = plain();
  s.layout = OutputLayout::kByExpert;
  const World world(s);
  const Homeward home = homeward(world, {});
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    for (const TensorView& weights : {spare.view(DType::kFp32, {10, 3}), spare.view(DType::kBf16, {10, 4})}) {
      CombineInput in = combine_input(home, rank, sent.handle, SumOrder::by_rank());
      in.weights = rank == kWrongRank ? weights : spare.view(DType::kFp32, {10, 4});
      expect_refusal(outcome_of([&] { buffer.combine(in); }), rank, "weights",
                     {"weights", "fp32[10, 4]", describe(weights)});
    }
  });
}

TEST(LowLatencyErrors, each_capacity_is_named_with_both_values_and_the_next_call_works) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  Config config = roomy(world);
  config.low_latency = {.max_tokens_per_rank = 10, .row_bytes = 128, .num_topk = 4, .side_bytes = 8};
  const Spare spare;
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"more tokens per rank than planned",
       [](auto& in) { in.max_tokens_per_rank = 4000; },
       {"Config::low_latency", "4000"}},
      {"no tokens per rank", [](auto& in) { in.max_tokens_per_rank = 0; }, {"max_tokens_per_rank", "at least 1", "0"}},
      {"more tokens than announced", [](auto& in) { in.max_tokens_per_rank = 9; }, {"max_tokens_per_rank", "10", "9"}},
      {"a wider row",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 8192});
       },
       {"Config::low_latency", "16384"}},
      {"more side bytes",
       [&](auto& in) {
         in.side[0] = spare.view(DType::kI32, {10, 6000});
       },
       {"Config::low_latency"}},
      {"a bound of rows", [](auto& in) { in.max_rows = 100; }, {"max_rows"}},
      {"an id out of range",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 4});
         in.topk_idx.template as<std::int64_t>()[39] = 1 << 20;
       },
       {"topk_idx[9, 3]", "expert 1048576", "0 .. 11"}},
  };
  run_ranks(kRanks, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (const auto& mistake : mistakes) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      expect_refusal(outcome_of([&] { buffer.low_latency_dispatch(in).receive(); }), rank, mistake.name, mistake.named);
      const Outcome next = outcome_of([&] {
        EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "")
            << mistake.name;
      });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
  });
}

TEST(LowLatencyErrors, handles_go_back_the_way_they_came) {
  Shape s = plain();
  s.low_latency = true;
  const World low(s);
  s.low_latency = false;
  const World high(s);
  const Homeward home = homeward(low, {});
  run_ranks(kRanks, low.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto fast = buffer.low_latency_dispatch(low.input(rank)).receive();
    const auto wide = buffer.dispatch(high.input(rank));
    const auto to_combine = outcome_of([&] { buffer.combine(combine_input(home, rank, fast.handle, {})); });
    EXPECT_EQ(to_combine.code, ErrorCode::kInvalidArgument) << to_combine.message;
    EXPECT_TRUE(contains(to_combine.message, "handle")) << to_combine.message;
    const auto to_low =
        outcome_of([&] { buffer.low_latency_combine(combine_input(home, rank, wide.handle, {})).receive(); });
    EXPECT_EQ(to_low.code, ErrorCode::kInvalidArgument) << to_low.message;
    EXPECT_TRUE(contains(to_low.message, "handle")) << to_low.message;
    EXPECT_EQ(difference(high, rank, buffer.dispatch(high.input(rank))), "");
  });
}

TEST(LowLatencyErrors, a_buffer_without_low_latency_capacity_says_so) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  Config config = roomy(world);
  config.low_latency = {};
  run_ranks(kRanks, config, [&](AnyBuffer& buffer) {
    const auto outcome = outcome_of([&] { buffer.low_latency_dispatch(world.input(buffer.rank())).receive(); });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_TRUE(contains(outcome.message, "Config::low_latency")) << outcome.message;
  });
}

// Calls that are right by themselves but not the same on every rank.
TEST(MismatchedCalls, are_refused_by_everybody_and_the_next_call_works) {
  Shape s = plain();
  s.weights = false;
  const World world(s);
  const Homeward home = homeward(world, {});
  const Spare spare;
  const std::vector<Mistake<DispatchInput>> mistakes = {
      {"hidden",
       [&](auto& in) {
         in.x = spare.view(DType::kBf16, {10, 128});
       },
       {"256", "128"}},
      {"dtype", [&](auto& in) { in.x.dtype = DType::kFp16; }, {}},
      {"layout", [](auto& in) { in.layout = OutputLayout::kByExpert; }, {}},
      {"alignment", [](auto& in) { in.expert_alignment = 8; }, {"8", "1"}},
      {"experts", [](auto& in) { in.num_experts = 13; }, {"13", "12"}},
      {"topk",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI64, {10, 5});
       },
       {"5", "4"}},
      {"ids",
       [&](auto& in) {
         in.topk_idx = spare.view(DType::kI32, {10, 4});
       },
       {}},
      {"placement",
       [](auto& in) {
         in.placement = Placement::from_lists({{0, 1, 2, 3, 4}, {5, 6, 7}, {8, 9, 10, 11}}, 12);
       },
       {}},
      {"weights",
       [&](auto& in) {
         in.topk_weights = spare.view(DType::kFp32, {10, 4});
       },
       {}},
      {"quantisation", [](auto& in) { in.fp8 = Fp8Options{}; }, {}},
      {"scales",
       [&](auto& in) {
         in.scales = spare.view(DType::kFp32, {10, 1});
       },
       {}},
      {"side", [](auto& in) { in.side.clear(); }, {}},
  };
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (const auto& mistake : mistakes) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) mistake.make(in);
      const Outcome outcome = outcome_of([&] { buffer.dispatch(in); });
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument)
          << mistake.name << " on rank " << rank << ": " << outcome.message;
      EXPECT_TRUE(contains(outcome.message, "rank " + std::to_string(rank == kWrongRank ? 0 : kWrongRank)) ||
                  contains(outcome.message, "rank 2"))
          << mistake.name << ": " << outcome.message;
      for (const auto& part : mistake.named)
        EXPECT_TRUE(contains(outcome.message, part)) << mistake.name << " lacks " << part << ": " << outcome.message;
      const Outcome next = outcome_of(
          [&] { EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "") << mistake.name; });
      EXPECT_FALSE(next.failed) << "after " << mistake.name << ": " << next.message;
    }
    // Another call altogether.
    const auto sent = buffer.dispatch(world.input(rank));
    const Outcome outcome = outcome_of([&] {
      if (rank == kWrongRank) {
        buffer.combine(combine_input(home, rank, sent.handle, SumOrder::by_rank()));
      } else {
        buffer.dispatch(world.input(rank));
      }
    });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    EXPECT_TRUE(contains(outcome.message, "combine") && contains(outcome.message, "dispatch")) << outcome.message;
    EXPECT_EQ(difference(world, rank, buffer.dispatch(world.input(rank))), "");
  });
}

TEST(MismatchedCalls, low_latency_against_high_throughput_is_an_error_on_every_rank) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  run_ranks(kRanks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    DispatchInput in = world.input(rank);
    in.timeout = 1000ms;
    const Outcome outcome = outcome_of([&] {
      if (rank == kWrongRank) {
        buffer.dispatch(in);
      } else {
        buffer.low_latency_dispatch(in).receive();
      }
    });
    EXPECT_TRUE(outcome.code == ErrorCode::kInvalidArgument || outcome.code == ErrorCode::kTimeout) << outcome.message;
    EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "");
  });
}

// Low latency writes before it hears what the others call; ThreadSanitizer sees whether anybody meets another's slots.
TEST(MismatchedCalls, low_latency_rows_of_another_size_are_refused_by_everybody) {
  Shape s = plain();
  s.low_latency = true;
  const World world(s);
  const Spare spare;
  run_ranks(kRanks, roomy(world), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    for (int repeat = 0; repeat < 5; ++repeat) {
      DispatchInput in = world.input(rank);
      if (rank == kWrongRank) in.x = spare.view(DType::kBf16, {in.x.shape[0], 128});
      const Outcome outcome = outcome_of([&] { buffer.low_latency_dispatch(in).receive(); });
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
      for (const char* part : {"256", "128"}) EXPECT_TRUE(contains(outcome.message, part)) << outcome.message;
      EXPECT_EQ(difference(world, rank, buffer.low_latency_dispatch(world.input(rank)).receive()), "");
    }
  });
}

TEST(OpenErrors, ranks_that_disagree_on_the_config_hear_the_field_and_both_values) {
  const auto outcomes = run_threads(kRanks, [](int rank, std::shared_ptr<Bootstrap> group) {
    Config config = small_config();
    config.max_experts = rank == kWrongRank ? 48 : 32;
    AnyBuffer::open(std::move(group), config);
  });
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.message;
    for (const char* part : {"max_experts", "48", "32"})
      EXPECT_TRUE(contains(outcome.message, part)) << outcome.message;
  }
}

TEST(OpenErrors, a_config_that_makes_no_sense_names_its_field) {
  const std::pair<const char*, std::function<void(Config&)>> wrong[] = {
      {"max_experts", [](Config& c) { c.max_experts = 0; }},
      {"num_tickets", [](Config& c) { c.num_tickets = 1; }},
      {"ranks_per_node",
       [](Config& c) {
         c.ranks_per_node = {2, 2};
       }},
      {"ranks_per_node", [](Config& c) { c.ranks_per_node = {0}; }},
      {"timeout", [](Config& c) { c.timeout = 0ms; }},
      {"low_latency", [](Config& c) { c.low_latency.max_tokens_per_rank = -1; }},
  };
  for (const auto& [field, make] : wrong) {
    const auto outcomes = run_threads(kRanks, [&](int, std::shared_ptr<Bootstrap> group) {
      Config config = small_config();
      make(config);
      AnyBuffer::open(std::move(group), config);
    });
    for (const Outcome& outcome : outcomes) {
      EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << field << ": " << outcome.message;
      EXPECT_TRUE(contains(outcome.message, field)) << field << ": " << outcome.message;
    }
  }
}

TEST(Supports, no_shape_that_is_required_is_refused) {
  Config config = small_config();
  config.max_experts = 1024;
  config.low_latency = {.max_tokens_per_rank = 64, .row_bytes = 8192 * 4, .num_topk = 32, .side_bytes = 1024};
  run_ranks(2, config, [](AnyBuffer& buffer) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32, DType::kFp8E4m3, DType::kU8}) {
      for (const std::int64_t hidden : {16, 128, 2048, 7168, 8192}) {
        for (const int topk : {1, 2, 6, 8, 9, 16, 32}) {
          for (const int experts : {1, 8, 64, 100, 256, 1024}) {
            for (const bool low_latency : {false, true}) {
              const bool fp8 = dtype != DType::kU8 && dtype != DType::kFp8E4m3;
              const CallShape shape{dtype, hidden, 64, topk, experts, fp8, low_latency};
              const Support support = buffer.supports(shape);
              ASSERT_TRUE(support) << name(dtype) << " hidden " << hidden << " topk " << topk << " experts " << experts
                                   << ": " << support.reason;
            }
          }
        }
      }
    }
    const Support odd = buffer.supports({DType::kBf16, 12, 4, 4, 16, false, false});
    EXPECT_FALSE(odd);
    EXPECT_TRUE(contains(odd.reason, "16")) << odd.reason;
    EXPECT_FALSE(buffer.supports({DType::kBf16, 64, 4, 4, 1025, false, false}));
    EXPECT_FALSE(buffer.supports({DType::kBf16, 8192, 100000, 32, 16, false, true}));
  });
}

}  // namespace
}  // namespace deep_ep::test
