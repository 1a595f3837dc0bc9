// SPDX-License-Identifier: MIT
// Which experts a token goes to: the group-limited gating of DeepSeek-V3.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"
#include "settings.h"

namespace moe {

/// The choice for a batch of tokens, as DispatchInput and CombineInput take it.
struct Routing {
  std::vector<std::int64_t> experts;  // [tokens, topk], best first
  std::vector<float> weights;         // [tokens, topk]
};

/// DeepSeek-V3 Technical Report (arXiv 2412.19437), section 2.1.2, equations 12 to 16, and "Node-Limited Routing":
///   score      s_e = sigmoid(x . centroid_e)
///   choose by  s_e + bias_e, in two steps: a group counts as much as its two best experts together, the best
///              topk_groups groups stay, and among their experts the best topk are taken
///   weigh by   s_e without the bias, divided by the sum over the chosen, times kWeightScale
/// Where a group of experts lives on one rank (or node), a token can reach topk_groups of them at most.
class Router {
 public:
  explicit Router(const Settings& settings);

  /// s_e of every token and expert, [tokens, experts].
  std::vector<float> scores(const std::vector<Bf16>& x) const;

  Routing choose(const std::vector<float>& scores) const;
  /// The same router without the limit on groups, to see what the limit saves.
  Routing choose_freely(const std::vector<float>& scores) const;

  /// "Auxiliary-loss-free load balancing" of the same section: after each step the bias of an expert that got more than
  /// its share falls by a fixed amount, that of any other rises. In training a step is a batch; here it is always this
  /// one.
  void balance(const std::vector<float>& scores, int steps);

 private:
  Routing choose_within(const std::vector<float>& scores, int topk_groups) const;

  Settings settings_;
  std::vector<float> centroids_;  // [hidden, experts]
  std::vector<float> bias_;       // [experts]
};

/// Selections of each expert.
std::vector<int> count_loads(const Routing& routing, int experts);

/// The largest load divided by the mean: 1 is perfect balance.
double imbalance(const std::vector<int>& loads);

}  // namespace moe
