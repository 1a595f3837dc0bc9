// SPDX-License-Identifier: MIT
// Expert by expert, then token by token.
#include "reference.h"

#include <cmath>

#include "expert.h"
#include "model.h"

namespace moe {
namespace {

/// Every selection's own result, [tokens * topk, hidden]. Experts are made one after the other, so that the check needs
/// the memory of one.
std::vector<Bf16> results_of_selections(const Settings& settings, const std::vector<Bf16>& x, const Routing& routing) {
  const auto hidden = static_cast<std::size_t>(settings.hidden);
  std::vector<std::vector<std::size_t>> selections(settings.experts);
  for (std::size_t s = 0; s < routing.experts.size(); ++s) selections[routing.experts[s]].push_back(s);

  std::vector<Bf16> results(routing.experts.size() * hidden);
  for (int e = 0; e < settings.experts; ++e) {
    const std::size_t rows = selections[e].size();
    std::vector<float> input(rows * hidden);
    std::vector<Bf16> output(rows * hidden);
    for (std::size_t r = 0; r < rows; ++r) {
      const std::size_t token = selections[e][r] / settings.topk;
      for (std::size_t c = 0; c < hidden; ++c) input[r * hidden + c] = widen(x[token * hidden + c]);
    }
    run_expert(make_expert(settings, e), input.data(), rows, output.data());
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::size_t c = 0; c < hidden; ++c) results[selections[e][r] * hidden + c] = output[r * hidden + c];
    }
  }
  return results;
}

}  // namespace

std::vector<Bf16> layer_without_communication(const Settings& settings, const std::vector<Bf16>& x,
                                              const Routing& routing) {
  const std::vector<Bf16> results = results_of_selections(settings, x, routing);
  const auto hidden = static_cast<std::size_t>(settings.hidden);
  const auto topk = static_cast<std::size_t>(settings.topk);
  std::vector<Bf16> y(x.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::size_t token = i / hidden;
    const std::size_t channel = i % hidden;
    float sum = 0;
    for (std::size_t s = token * topk; s < (token + 1) * topk; ++s) {
      sum = std::fma(routing.weights[s], widen(results[s * hidden + channel]), sum);
    }
    y[i] = narrow(sum);
  }
  return y;
}

}  // namespace moe
