// SPDX-License-Identifier: MIT
// The layer's parameters: embeddings, router and experts. All of them are noise, seeded, so that every rank makes its
// own.
#pragma once

#include <cstdint>
#include <vector>

#include "expert.h"
#include "numbers.h"
#include "settings.h"

namespace moe {

/// Rows of the layer's input for a batch of token ids: an embedding per id plus a sinusoidal position, [ids, hidden].
std::vector<Bf16> embed(const Settings& settings, const std::vector<int>& ids);

/// One expert's weights, by its number.
Expert make_expert(const Settings& settings, int number);

/// The router's matrix, [hidden, experts]: column e is the centroid that attracts tokens to expert e.
std::vector<float> make_centroids(const Settings& settings);

}  // namespace moe
