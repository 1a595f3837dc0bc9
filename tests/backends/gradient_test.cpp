// SPDX-License-Identifier: MIT
// The backward pass against sums written out here, and against the definition of a gradient.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "deep_ep/gradient.h"
#include "exchange.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

Shape routed(OutputLayout layout) {
  Shape s;
  s.layout = layout;
  s.alignment = layout == OutputLayout::kByExpert ? 4 : 1;
  s.hidden = 40;
  s.tokens = 12;
  s.dtype = DType::kFp32;
  return s;
}

class GradientEveryLayout : public testing::TestWithParam<OutputLayout> {};
INSTANTIATE_TEST_SUITE_P(All, GradientEveryLayout, testing::ValuesIn(kLayouts));

// x and weights go out; their gradients come home: the sum over all rows that a token became, and its own weights'
// entries.
TEST_P(GradientEveryLayout, of_dispatch_sums_the_rows_of_a_token_and_takes_weights_from_their_owner) {
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    const World world(routed(GetParam()));
    HomewardShape wanted;
    wanted.dtype = dtype;
    wanted.hidden = world.shape.hidden;
    wanted.topk_weights = true;
    const Homeward home = homeward(world, wanted);
    const auto expected =
        oracle::combine(world.exchange, world.expected, home.ranks, SumOrder::by_rank(), WeightsHome::kFromOwner);
    run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const auto sent = buffer.dispatch(world.input(rank));
      const auto got =
          dispatch_backward(buffer, sent.handle, home.ranks[rank].x.view(), home.ranks[rank].topk_weights.view());
      EXPECT_EQ(difference(expected[rank], got), "") << "rank " << rank;
      const auto without = dispatch_backward(buffer, sent.handle, home.ranks[rank].x.view());
      EXPECT_FALSE(without.topk_weights.given());
      EXPECT_EQ(difference("x", without.x, expected[rank].x), "");
    });
  }
}

TEST_P(GradientEveryLayout, of_combine_gives_every_row_its_tokens_gradient) {
  const World world(routed(GetParam()));
  World gradient = world;
  gradient.shape.weights = false;
  Random random(5);
  for (auto& rank : gradient.ranks) {
    rank.x = random_array(random, DType::kBf16, {rank.x.rows(), 24});
    rank.topk_weights = {};
  }
  gradient.expect_again();
  run_ranks(world.shape.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    const auto got = combine_backward(buffer, sent.handle, gradient.ranks[rank].x.view());
    EXPECT_EQ(difference(gradient, rank, got, true), "") << "rank " << rank;
  });
}

double dot(const oracle::Array& a, const Tensor& on_backend) {
  const Tensor b = to_host(on_backend);
  double sum = 0;
  for (std::int64_t i = 0; i < b.numel(); ++i) sum += double{a.get<float>(i)} * double{b.as<const float>()[i]};
  return sum;
}

// <combine(y), g> == <y, combine_backward(g)> and <dispatch(x), y> == <x, dispatch_backward(y)>, over all ranks.
TEST_P(GradientEveryLayout, is_the_adjoint_of_the_forward_pass) {
  Shape s = routed(GetParam());
  s.alignment = 1;  // without padding rows, every row counts
  s.weights = false;
  const World world(s);
  HomewardShape wanted;
  wanted.dtype = DType::kFp32;
  wanted.hidden = s.hidden;
  wanted.biases = 0;
  Homeward home = homeward(world, wanted);
  for (int r = 0; r < s.ranks; ++r) {  // kPadded: rows that nothing came for are no part of the function
    for (std::size_t row = 0; row < world.expected[r].row_written.size(); ++row) {
      if (world.expected[r].row_written[row]) continue;
      std::memset(home.ranks[r].x.bytes.data() + row * static_cast<std::size_t>(s.hidden) * 4, 0,
                  static_cast<std::size_t>(s.hidden) * 4);
    }
  }
  std::vector<double> forward(s.ranks), backward(s.ranks);
  run_ranks(s.ranks, world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(world.input(rank));
    const Tensor x = to_host(sent.x);
    const auto x_gradient = dispatch_backward(buffer, sent.handle, home.ranks[rank].x.view());
    const oracle::Array& y = home.ranks[rank].x;
    for (std::size_t row = 0; row < world.expected[rank].row_written.size(); ++row) {
      if (!world.expected[rank].row_written[row]) continue;
      for (std::int64_t c = 0; c < s.hidden; ++c) {
        const std::int64_t at = static_cast<std::int64_t>(row) * s.hidden + c;
        forward[rank] += double{y.get<float>(at)} * double{x.as<const float>()[at]};
      }
    }
    backward[rank] = dot(world.ranks[rank].x, x_gradient.x);
  });
  double left = 0, right = 0, size = 0;
  for (int r = 0; r < s.ranks; ++r) {
    left += forward[r];
    right += backward[r];
    size += std::fabs(forward[r]);
  }
  EXPECT_NEAR(left, right, 1e-4 * (1 + size));
}

// Rows and weights of a weighted combine, and the gradient that its result gets.
struct Weighted {
  World world;
  Homeward home;
  std::vector<oracle::Array> grad_out;
  explicit Weighted(DType dtype) : world(routed(OutputLayout::kByExpert)) {
    HomewardShape wanted;
    wanted.dtype = dtype;
    wanted.hidden = world.shape.hidden;
    wanted.weights = true;
    home = homeward(world, wanted);
    Random random(17);
    for (const auto& e : world.expected)
      grad_out.push_back(random_array(random, dtype, {e.num_tokens, world.shape.hidden}));
  }
  float row(int rank, std::int64_t row, std::int64_t c) const { return value(home.ranks[rank].x, row, c); }
  float value(const oracle::Array& a, std::int64_t row, std::int64_t c) const {
    return oracle::decode(a.dtype, a.row(row) + c * static_cast<std::int64_t>(item_bytes(a.dtype)));
  }
};

TEST(WeightedCombineGradient, equals_the_analytic_one) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    const Weighted w(dtype);
    const std::int64_t hidden = w.world.shape.hidden;
    const int topk = w.world.shape.topk;
    // rows: weight * grad_out of the token, rounded once; padding rows 0.
    std::vector<oracle::Array> rows;
    for (const auto& e : w.world.expected) rows.emplace_back(dtype, std::vector<std::int64_t>{e.num_rows, hidden});
    for (int home = 0; home < w.world.shape.ranks; ++home) {
      const auto& e = w.world.expected[home];
      for (std::int64_t at = 0; at < e.num_tokens * topk; ++at) {
        if (e.dst_rank[at] < 0) continue;
        for (std::int64_t c = 0; c < hidden; ++c) {
          const float product = w.home.ranks[home].weights.get<float>(at) * w.value(w.grad_out[home], at / topk, c);
          oracle::encode(dtype, product,
                         rows[e.dst_rank[at]].row(e.dst_row[at]) + c * static_cast<std::int64_t>(item_bytes(dtype)));
        }
      }
    }
    run_ranks(w.world.shape.ranks, w.world.config(), [&](AnyBuffer& buffer) {
      const int rank = buffer.rank();
      const auto& e = w.world.expected[rank];
      const auto sent = buffer.dispatch(w.world.input(rank));
      const auto got = weighted_combine_backward(buffer, sent.handle, w.grad_out[rank].view(),
                                                 w.home.ranks[rank].weights.view(), w.home.ranks[rank].x.view());
      EXPECT_EQ(difference("rows", got.rows, rows[rank]), "") << "rank " << rank << " " << name(dtype);
      const Tensor weights = to_host(got.weights);
      ASSERT_EQ(weights.numel(), e.num_tokens * topk);
      for (std::int64_t at = 0; at < e.num_tokens * topk; ++at) {
        double exact = 0, size = 0;
        for (std::int64_t c = 0; e.dst_rank[at] >= 0 && c < hidden; ++c) {
          const double term =
              double{w.value(w.grad_out[rank], at / topk, c)} * double{w.row(e.dst_rank[at], e.dst_row[at], c)};
          exact += term;
          size += std::fabs(term);
        }
        EXPECT_NEAR(weights.as<const float>()[at], exact, 1e-5 * size) << "selection " << at;
      }
    });
  }
}

// The function is linear in each weight: a difference quotient of the loss <combine, grad_out> is the gradient itself.
TEST(WeightedCombineGradient, equals_a_difference_quotient) {
  Weighted w(DType::kFp32);
  const std::int64_t hidden = w.world.shape.hidden;
  const auto loss = [&](AnyBuffer& buffer, const std::shared_ptr<const Handle>& handle, const oracle::Array& weights) {
    CombineInput in = combine_input(w.home, buffer.rank(), handle, SumOrder::by_topk());
    in.weights = weights.view();
    const CombineOutput out = to_host(buffer.combine(in));
    std::vector<double> per_token(static_cast<std::size_t>(out.x.size(0)));
    for (std::int64_t i = 0; i < out.x.numel(); ++i) {
      per_token[static_cast<std::size_t>(i / hidden)] +=
          double{out.x.as<const float>()[i]} * double{w.grad_out[buffer.rank()].get<float>(i)};
    }
    return per_token;
  };
  run_ranks(w.world.shape.ranks, w.world.config(), [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const int topk = w.world.shape.topk;
    const auto sent = buffer.dispatch(w.world.input(rank));
    const Tensor gradient =
        to_host(weighted_combine_backward(buffer, sent.handle, w.grad_out[rank].view(),
                                          w.home.ranks[rank].weights.view(), w.home.ranks[rank].x.view())
                    .weights);
    const auto before = loss(buffer, sent.handle, w.home.ranks[rank].weights);
    for (int k = 0; k < topk; ++k) {
      oracle::Array moved = w.home.ranks[rank].weights;
      for (std::int64_t t = 0; t < moved.rows(); ++t) moved.set(t * topk + k, moved.get<float>(t * topk + k) + 1.0f);
      const auto after = loss(buffer, sent.handle, moved);
      for (std::size_t t = 0; t < after.size(); ++t) {
        EXPECT_NEAR(after[t] - before[t],
                    gradient.as<const float>()[t * static_cast<std::size_t>(topk) + static_cast<std::size_t>(k)], 1e-2);
      }
    }
  });
}

// Refused by everybody, not only where the mistake is: the peers are waiting in the same call.
TEST(WeightedCombineGradient, a_wrong_argument_on_one_rank_is_refused_by_all_and_the_next_call_works) {
  const Weighted w(DType::kBf16);
  Config config = w.world.config();
  config.timeout = 3000ms;
  run_ranks(w.world.shape.ranks, config, [&](AnyBuffer& buffer) {
    const int rank = buffer.rank();
    const auto sent = buffer.dispatch(w.world.input(rank));
    TensorView rows = w.home.ranks[rank].x.view();
    if (rank == 1) rows.shape[1] = 24;
    const Outcome outcome = outcome_of([&] {
      weighted_combine_backward(buffer, sent.handle, w.grad_out[rank].view(), w.home.ranks[rank].weights.view(), rows);
    });
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << "rank " << rank << ": " << outcome.message;
    EXPECT_EQ(difference(w.world, rank, buffer.dispatch(w.world.input(rank))), "");
  });
}

}  // namespace
}  // namespace deep_ep::test
