// SPDX-License-Identifier: MIT
// Scores, the choice of groups and experts, and the bias that evens out their loads.
#include "router.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model.h"

namespace moe {
namespace {

constexpr float kWeightScale = 2.5F;  // DeepSeek-V3's factor on the routed experts' sum
constexpr float kBiasStep = 0.01F;    // the report trains with 0.001 over far more steps

/// Numbers of the `count` largest values, largest first; equal values in ascending order of their numbers.
std::vector<int> largest(const std::vector<float>& values, int count) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int a, int b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
  order.resize(count);
  return order;
}

/// What each group counts: the sum of its two best experts.
std::vector<float> group_values(const std::vector<float>& biased, int groups) {
  const std::size_t size = biased.size() / groups;
  std::vector<float> values(groups);
  for (int g = 0; g < groups; ++g) {
    std::vector<float> members(biased.begin() + g * size, biased.begin() + (g + 1) * size);
    const std::size_t best = std::min<std::size_t>(2, size);
    std::partial_sort(members.begin(), members.begin() + best, members.end(), std::greater<>());
    values[g] = std::accumulate(members.begin(), members.begin() + best, 0.0F);
  }
  return values;
}

}  // namespace

Router::Router(const Settings& settings)
    : settings_(settings), centroids_(make_centroids(settings)), bias_(settings.experts, 0.0F) {}

std::vector<float> Router::scores(const std::vector<Bf16>& x) const {
  const auto hidden = static_cast<std::size_t>(settings_.hidden);
  const auto experts = static_cast<std::size_t>(settings_.experts);
  const std::size_t tokens = x.size() / hidden;
  std::vector<float> scores(tokens * experts, 0.0F);
  for (std::size_t t = 0; t < tokens; ++t) {
    float* row = scores.data() + t * experts;
    for (std::size_t c = 0; c < hidden; ++c) {
      const float value = widen(x[t * hidden + c]);
      const float* centroid = centroids_.data() + c * experts;
      for (std::size_t e = 0; e < experts; ++e) row[e] += value * centroid[e];
    }
    for (std::size_t e = 0; e < experts; ++e) row[e] = 1.0F / (1.0F + std::exp(-row[e]));
  }
  return scores;
}

Routing Router::choose(const std::vector<float>& scores) const { return choose_within(scores, settings_.topk_groups); }

Routing Router::choose_freely(const std::vector<float>& scores) const {
  return choose_within(scores, settings_.groups);
}

Routing Router::choose_within(const std::vector<float>& scores, int topk_groups) const {
  const int experts = settings_.experts;
  Routing routing;
  for (auto s = scores.begin(); s != scores.end(); s += experts) {
    std::vector<float> biased(experts);
    for (int e = 0; e < experts; ++e) biased[e] = s[e] + bias_[e];

    std::vector<float> candidates(experts, -INFINITY);
    for (const int group : largest(group_values(biased, settings_.groups), topk_groups)) {
      const auto first = biased.begin() + group * settings_.group_size();
      std::copy(first, first + settings_.group_size(), candidates.begin() + group * settings_.group_size());
    }

    const std::vector<int> chosen = largest(candidates, settings_.topk);
    float sum = 0;
    for (const int e : chosen) sum += s[e];
    for (const int e : chosen) {
      routing.experts.push_back(e);
      routing.weights.push_back(s[e] / sum * kWeightScale);
    }
  }
  return routing;
}

void Router::balance(const std::vector<float>& scores, int steps) {
  for (int step = 0; step < steps; ++step) {
    const Routing routing = choose(scores);
    const std::vector<int> loads = count_loads(routing, settings_.experts);
    const double share = static_cast<double>(routing.experts.size()) / settings_.experts;
    for (int e = 0; e < settings_.experts; ++e) bias_[e] += loads[e] > share ? -kBiasStep : kBiasStep;
  }
}

std::vector<int> count_loads(const Routing& routing, int experts) {
  std::vector<int> loads(experts, 0);
  for (const std::int64_t e : routing.experts) ++loads[e];
  return loads;
}

double imbalance(const std::vector<int>& loads) {
  const double sum = std::accumulate(loads.begin(), loads.end(), 0.0);
  const int most = *std::max_element(loads.begin(), loads.end());
  return sum > 0 ? most * static_cast<double>(loads.size()) / sum : 1.0;
}

}  // namespace moe
