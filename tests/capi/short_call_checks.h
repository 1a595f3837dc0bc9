// SPDX-License-Identifier: MIT
// The short calls of one rank on its default communicator.
#pragma once

#include "capi/input.h"

static float sent(int from, int to, int i) {
  // No pattern that padding could repeat.
  const unsigned mixed = (unsigned)(i + 1) * 2654435761u + (unsigned)from * 40503u;
  return ((float)(mixed >> 8) * power2(-23) - 1.0f) * (float)(1 + to) * 3.0f;
}

static void check_wire(const struct rank* me, int chunk, deep_ep_dtype wire, int in_place) {
  const int size = chunk * me->num_ranks;
  float* input = malloc(sizeof(float) * (size_t)(size + 1));
  float* output = in_place ? input : malloc(sizeof(float) * (size_t)(size + 1));
  for (int to = 0; to < me->num_ranks; ++to) {
    for (int i = 0; i < chunk; ++i) input[to * chunk + i] = sent(me->rank, to, i);
  }
  output[size] = 77.0f;
  CHECK_OK(deep_ep_all_to_all(input, output, size, wire));
  CHECK(output[size] == 77.0f);
  for (int from = 0; from < me->num_ranks; ++from) {
    int good = 1;
    for (int i = 0; i < chunk; ++i) {
      const float expected = sent(from, me->rank, i), error = magnitude_of(output[from * chunk + i] - expected);
      float largest = 1e-4f;
      for (int j = i / 128 * 128; j < chunk && j < i / 128 * 128 + 128; ++j) {
        const float other = magnitude_of(sent(from, me->rank, j));
        largest = other > largest ? other : largest;
      }
      const float bound = wire == FP32   ? 0.0f
                          : wire == BF16 ? magnitude_of(expected) * power2(-8)
                                         : magnitude_of(expected) * power2(-4) + largest / 448.0f * power2(-10);
      good = good && error <= bound;
    }
    CHECK(good);
  }
  if (!in_place) free(output);
  free(input);
}

static void check_low_latency_rows(const struct rank* me, int hidden, int rows_per_rank) {
  const int batch = rows_per_rank * me->num_ranks;
  float* query = malloc(sizeof(float) * (size_t)(batch * hidden + 1));
  float* result = malloc(sizeof(float) * (size_t)(batch * hidden + 1));
  for (int i = 0; i < batch * hidden; ++i)
    query[i] =
        sent(me->rank, i / hidden / (rows_per_rank + !rows_per_rank), i % (rows_per_rank * hidden + !rows_per_rank));
  result[batch * hidden] = 77.0f;
  CHECK_OK(deep_ep_low_latency_all_to_all(query, result, batch));
  CHECK(result[batch * hidden] == 77.0f);
  int equal = 1;
  for (int from = 0; from < me->num_ranks; ++from) {
    for (int i = 0; i < rows_per_rank * hidden; ++i) {
      equal = equal && result[from * rows_per_rank * hidden + i] == sent(from, me->rank, i);
    }
  }
  CHECK(equal);
  free(query);
  free(result);
}

static void short_calls_with(const struct rank* me, int hidden) {
  const deep_ep_init_config config = {.size = sizeof(config),
                                      .group = me->group,
                                      .hidden = hidden,
                                      .max_batch = 16,
                                      .num_workers = 2,
                                      .per_thread = me->port == 0,
                                      .arena_bytes = 32u << 20,
                                      .timeout_ms = 60000};
  REQUIRE_OK(deep_ep_init(&config));
  CHECK_FAILS(deep_ep_init(&config), DEEP_EP_INVALID_ARGUMENT, "deep_ep_finalize");
  CHECK(deep_ep_buffer_rank(deep_ep_default_buffer()) == me->rank);
  const int chunks[] = {0, 1, 3, 4, 16, 127, 128, 300, 5000};
  const deep_ep_dtype wires[] = {FP32, BF16, FP8};
  for (size_t c = 0; c < sizeof(chunks) / sizeof(chunks[0]); ++c) {
    for (size_t w = 0; w < sizeof(wires) / sizeof(wires[0]); ++w) check_wire(me, chunks[c], wires[w], (c + w) % 2);
  }
  check_low_latency_rows(me, hidden, 0);
  check_low_latency_rows(me, hidden, 1);
  check_low_latency_rows(me, hidden, 16 / me->num_ranks);

  float one[4 * kMaxRanks] = {0};
  CHECK_FAILS(deep_ep_all_to_all(one, one, me->num_ranks + 1, FP32), DEEP_EP_INVALID_ARGUMENT, "size");
  CHECK_FAILS(deep_ep_all_to_all(one, one, -1, FP32), DEEP_EP_INVALID_ARGUMENT, "size: -1");
  CHECK_FAILS(deep_ep_all_to_all(one, one, me->num_ranks, DEEP_EP_I64), DEEP_EP_INVALID_ARGUMENT, "wire: 6");
  CHECK_FAILS(deep_ep_all_to_all(NULL, one, me->num_ranks, FP32), DEEP_EP_INVALID_ARGUMENT, "input: NULL");
  CHECK_FAILS(deep_ep_low_latency_all_to_all(one, one, 16 + me->num_ranks), DEEP_EP_INVALID_ARGUMENT, "batch_size");
  CHECK_FAILS(deep_ep_low_latency_all_to_all(one, NULL, me->num_ranks), DEEP_EP_INVALID_ARGUMENT, "result: NULL");
  // Sizes that differ between ranks: with the same padded row, with another row, and refused on one rank only.
  const int mine = me->rank == 0 ? 1 : 2;
  CHECK_FAILS(deep_ep_all_to_all(one, one, mine * me->num_ranks, FP32), DEEP_EP_INVALID_ARGUMENT, "size");
  CHECK(deep_ep_all_to_all(one, one, (me->rank == 0 ? 1 : 4) * me->num_ranks, me->rank == 0 ? FP32 : BF16) ==
        DEEP_EP_INVALID_ARGUMENT);
  CHECK(deep_ep_all_to_all(one, one, me->rank == 0 ? -1 : me->num_ranks, FP32) == DEEP_EP_INVALID_ARGUMENT);
  check_wire(me, 33, FP32, 0);
  CHECK_OK(deep_ep_finalize());
  CHECK(deep_ep_default_buffer() == NULL);
}

static void short_calls(const struct rank* me) {
  short_calls_with(me, 64);
  short_calls_with(me, 30);  // rows that need padding on the wire
}

static void short_calls_with_one_worker(const struct rank* me) {
  CHECK_OK(deep_ep_set_sm_limit(1));
  CHECK(deep_ep_sm_limit() == 1);
  short_calls_with(me, 16);
}

// All defaults: a world of one, as no launcher set anything.
static void a_world_of_one_needs_nothing(void) {
  unsetenv("MASTER_ADDR"), unsetenv("MASTER_PORT"), unsetenv("RANK"), unsetenv("WORLD_SIZE"),
      unsetenv("EP_MASTER_PORT");
  REQUIRE_OK(deep_ep_init(NULL));
  float x[6] = {1, 2, 3, 4, 5, 6}, y[6] = {0};
  CHECK_OK(deep_ep_all_to_all(x, y, 6, FP32));
  CHECK(memcmp(x, y, sizeof(x)) == 0);
  CHECK_OK(deep_ep_finalize());
  deep_ep_group* group = NULL;
  CHECK_OK(deep_ep_group_tcp(NULL, &group));
  CHECK(deep_ep_group_num_ranks(group) == 1);
  deep_ep_group_free(group);
  CHECK_OK(deep_ep_set_sm_limit(-5));
  CHECK(deep_ep_sm_limit() == 0);
}
