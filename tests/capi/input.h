// SPDX-License-Identifier: MIT
// Tokens whose sums are exact in any order, and where each of them goes: the truth that the C program compares with.
#pragma once

#include <stdint.h>
#include <string.h>

#include "capi/check.h"

enum { kTokens = 13, kHidden = 36, kTopk = 3, kExperts = 8 };

// 2^exponent. No libm: whether a C program links it beside a C++ library depends on how that was built.
static float power2(int exponent) {
  float power = 1.0f;
  for (; exponent > 0; --exponent) power *= 2.0f;
  for (; exponent < 0; ++exponent) power *= 0.5f;
  return power;
}

static float magnitude_of(float x) { return x < 0.0f ? -x : x; }

struct tokens {
  int num_tokens;
  float x[kTokens * kHidden];
  int64_t idx[kTokens * kTopk];
  float weights[kTokens * kTopk];
  int32_t side[kTokens * 2];
};

// Small integers and halves: every sum of them is exact, in any order.
static float value_of(int rank, int token, int channel) {
  return (float)(rank * 64 + token) + 0.5f * (float)(channel % 7);
}

// Expert of selection k, -1 for none. Two selections of a token may meet on one rank or even on one expert.
static int expert_of(int rank, int token, int k) {
  if (token % 5 == 4 && k == 1) return -1;
  return (token * (k + 1) + rank + k) % kExperts;
}

static float weight_of(int token, int k) { return power2(-(k + token % 3)); }

static void fill(struct tokens* t, int rank) {
  t->num_tokens = kTokens - rank;  // uneven
  for (int i = 0; i < t->num_tokens; ++i) {
    for (int c = 0; c < kHidden; ++c) t->x[i * kHidden + c] = value_of(rank, i, c);
    for (int k = 0; k < kTopk; ++k) {
      t->idx[i * kTopk + k] = expert_of(rank, i, k);
      t->weights[i * kTopk + k] = weight_of(i, k);
    }
    t->side[2 * i] = rank;
    t->side[2 * i + 1] = 100 * rank + i;
  }
}

static int experts_per_rank(int num_ranks) { return kExperts / num_ranks; }

static int ranks_of_token(int rank, int token, int num_ranks) {
  int seen[kMaxRanks] = {0}, count = 0;
  for (int k = 0; k < kTopk; ++k) {
    const int expert = expert_of(rank, token, k);
    if (expert < 0 || seen[expert / experts_per_rank(num_ranks)]++) continue;
    ++count;
  }
  return count;
}

static int goes_to(int rank, int token, int to, int num_ranks) {
  for (int k = 0; k < kTopk; ++k) {
    const int expert = expert_of(rank, token, k);
    if (expert >= 0 && expert / experts_per_rank(num_ranks) == to) return 1;
  }
  return 0;
}

static deep_ep_tensor any_tensor(void) {
  deep_ep_tensor tensor = {.size = sizeof(tensor)};
  return tensor;
}
