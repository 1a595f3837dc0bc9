// SPDX-License-Identifier: MIT
// Makes parameters out of noise, scaled so that every step keeps a variance near 1.
#include "model.h"

#include <cmath>

namespace moe {
namespace {

// Streams of noise. Experts take three each, from kExpertStream on.
constexpr std::uint64_t kEmbeddingStream = 1;
constexpr std::uint64_t kRouterStream = 2;
constexpr std::uint64_t kExpertStream = 16;

// Small, so that what a token is matters more to the router than where it stands.
constexpr float kPositionShare = 0.3F;

std::vector<Bf16> noise_matrix(std::uint64_t stream, int inputs, int outputs) {
  const float scale = 1.0F / std::sqrt(static_cast<float>(inputs));
  std::vector<Bf16> matrix(static_cast<std::size_t>(inputs) * outputs);
  for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = narrow(scale * noise(stream, i));
  return matrix;
}

}  // namespace

std::vector<Bf16> embed(const Settings& settings, const std::vector<int>& ids) {
  const auto hidden = static_cast<std::size_t>(settings.hidden);
  std::vector<double> frequency(hidden);
  for (std::size_t c = 0; c < hidden; ++c) {
    const std::size_t pair = c / 2;  // its two channels hold the sine and the cosine of one wave
    frequency[c] = std::pow(1e-4, static_cast<double>(2 * pair) / static_cast<double>(hidden));
  }
  std::vector<Bf16> rows(ids.size() * hidden);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    for (std::size_t c = 0; c < hidden; ++c) {
      const double angle = static_cast<double>(t) * frequency[c];
      const auto wave = static_cast<float>(c % 2 == 0 ? std::sin(angle) : std::cos(angle));
      const float value = noise(kEmbeddingStream, static_cast<std::size_t>(ids[t]) * hidden + c);
      rows[t * hidden + c] = narrow(value + kPositionShare * wave);
    }
  }
  return rows;
}

Expert make_expert(const Settings& settings, int number) {
  const std::uint64_t stream = kExpertStream + 3 * static_cast<std::uint64_t>(number);
  return Expert{settings.hidden, settings.inter, noise_matrix(stream, settings.hidden, settings.inter),
                noise_matrix(stream + 1, settings.hidden, settings.inter),
                noise_matrix(stream + 2, settings.inter, settings.hidden)};
}

std::vector<float> make_centroids(const Settings& settings) {
  const float scale = 1.0F / std::sqrt(static_cast<float>(settings.hidden));
  std::vector<float> centroids(static_cast<std::size_t>(settings.hidden) * settings.experts);
  for (std::size_t i = 0; i < centroids.size(); ++i) centroids[i] = scale * noise(kRouterStream, i);
  return centroids;
}

}  // namespace moe
