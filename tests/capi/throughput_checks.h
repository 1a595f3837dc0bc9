// SPDX-License-Identifier: MIT
// The high-throughput calls of one rank: layout, dispatch in two arrangements, combine, handles.
#pragma once

#include <stddef.h>

#include "capi/input.h"

static deep_ep_buffer* open_buffer(const struct rank* me) {
  const int nodes[] = {2};
  const deep_ep_config config = {.size = sizeof(config),
                                 .num_ranks_per_node = 1,
                                 .ranks_per_node = nodes,
                                 .low_latency_max_tokens_per_rank = kTokens,
                                 .low_latency_row_bytes = kHidden * sizeof(float),
                                 .low_latency_num_topk = kTopk,
                                 .arena_bytes = 32u << 20,
                                 .timeout_ms = 60000};
  const deep_ep_options options = {.size = sizeof(options), .num_workers = 2};
  deep_ep_buffer* buffer = NULL;
  CHECK_OK(deep_ep_buffer_open(me->group, &config, &options, &buffer));
  return buffer;
}

static void ranks_and_nodes(const struct rank* me, deep_ep_buffer* buffer) {
  CHECK(deep_ep_buffer_rank(buffer) == me->rank && deep_ep_buffer_num_ranks(buffer) == me->num_ranks);
  CHECK(deep_ep_buffer_num_nodes(buffer) == me->num_ranks / 2);
  for (int r = 0; r < me->num_ranks; ++r) CHECK(deep_ep_buffer_node_of(buffer, r) == r / 2);
  CHECK(deep_ep_buffer_node_of(buffer, me->num_ranks) == -1);
  CHECK(deep_ep_masked(buffer, 0) == 0 && deep_ep_masked(buffer, -1) == -1);
  CHECK_OK(deep_ep_set_masked(buffer, me->num_ranks - 1 - me->rank, 1));
  CHECK(deep_ep_masked(buffer, me->num_ranks - 1 - me->rank) == 1);
  CHECK_OK(deep_ep_set_masked(buffer, me->num_ranks - 1 - me->rank, 0));
  CHECK(deep_ep_set_masked(buffer, me->num_ranks, 1) == DEEP_EP_INVALID_ARGUMENT);

  deep_ep_call_shape shape = {.size = sizeof(shape),
                              .dtype = DEEP_EP_BF16,
                              .hidden = kHidden * 2,
                              .num_tokens = kTokens,
                              .num_topk = kTopk,
                              .num_experts = kExperts};
  CHECK_OK(deep_ep_supports(buffer, &shape));
  shape.low_latency = 1;
  shape.hidden = 1 << 20;
  CHECK(deep_ep_supports(buffer, &shape) == DEEP_EP_UNSUPPORTED && deep_ep_last_error()[0] != 0);
}

static void layout_counts(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  deep_ep_layout_result* layout = NULL;
  REQUIRE_OK(deep_ep_dispatch_layout(buffer, &idx, kExperts, NULL, &layout));
  deep_ep_tensor per_rank = any_tensor(), per_node = any_tensor(), per_expert = any_tensor(), in_rank = any_tensor();
  CHECK_OK(deep_ep_layout_result_tensor(layout, DEEP_EP_LAYOUT_TOKENS_PER_RANK, &per_rank));
  CHECK_OK(deep_ep_layout_result_tensor(layout, DEEP_EP_LAYOUT_TOKENS_PER_NODE, &per_node));
  CHECK_OK(deep_ep_layout_result_tensor(layout, DEEP_EP_LAYOUT_TOKENS_PER_EXPERT, &per_expert));
  CHECK_OK(deep_ep_layout_result_tensor(layout, DEEP_EP_LAYOUT_TOKEN_IN_RANK, &in_rank));
  CHECK(per_node.dtype == DEEP_EP_I32 && per_node.shape[0] == me->num_ranks / 2);
  CHECK(in_rank.dtype == DEEP_EP_BOOL && in_rank.ndim == 2 && in_rank.shape[1] == me->num_ranks);
  for (int r = 0; r < me->num_ranks; ++r) {
    int count = 0;
    for (int i = 0; i < t->num_tokens; ++i) {
      const int goes = goes_to(me->rank, i, r, me->num_ranks);
      CHECK(((const unsigned char*)in_rank.data)[i * me->num_ranks + r] == goes);
      count += goes;
    }
    CHECK(((const int32_t*)per_rank.data)[r] == count);
  }
  int selections = 0, expected = 0;
  for (int e = 0; e < kExperts; ++e) selections += ((const int32_t*)per_expert.data)[e];
  for (int i = 0; i < t->num_tokens * kTopk; ++i) expected += t->idx[i] >= 0;
  CHECK(selections == expected);
  CHECK(deep_ep_layout_result_tensor(layout, (deep_ep_layout_field)9, &in_rank) == DEEP_EP_INVALID_ARGUMENT);
  deep_ep_layout_result_free(layout);
}

static void rows_are_the_tokens(const struct rank* me, const deep_ep_dispatch_result* result) {
  deep_ep_tensor x = any_tensor(), first = any_tensor(), src = any_tensor(), side = any_tensor(),
                 weights = any_tensor();
  deep_ep_tensor idx = any_tensor();
  const deep_ep_handle* handle = deep_ep_dispatch_result_handle(result);
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &x));
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_TOPK_IDX, &idx));
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_TOPK_WEIGHTS, &weights));
  CHECK(deep_ep_dispatch_result_num_side(result) == 1);
  REQUIRE_OK(deep_ep_dispatch_result_side(result, 0, &side));
  CHECK(deep_ep_dispatch_result_side(result, 1, &side) == DEEP_EP_INVALID_ARGUMENT);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_FIRST_ARRIVAL, &first));
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_SRC_TOKEN, &src));
  CHECK(x.dtype == DEEP_EP_FP32 && x.ndim == 2 && x.shape[1] == kHidden && idx.dtype == DEEP_EP_I64);
  int row = 0;
  for (int r = 0; r < me->num_ranks; ++r) {
    CHECK(((const int32_t*)first.data)[r] == row);
    for (int i = 0; i < kTokens - r; ++i) {
      if (!goes_to(r, i, me->rank, me->num_ranks)) continue;
      CHECK(((const int32_t*)src.data)[row] == i && ((const int32_t*)side.data)[2 * row + 1] == 100 * r + i);
      int equal = 1;
      for (int c = 0; c < kHidden; ++c) equal = equal && ((const float*)x.data)[row * kHidden + c] == value_of(r, i, c);
      CHECK(equal);
      for (int k = 0; k < kTopk; ++k) {
        const int expert = expert_of(r, i, k), per_rank = experts_per_rank(me->num_ranks);
        const int here = expert >= 0 && expert / per_rank == me->rank;
        CHECK(((const int64_t*)idx.data)[row * kTopk + k] == (here ? expert % per_rank : -1));
        CHECK(((const float*)weights.data)[row * kTopk + k] == (here ? weight_of(i, k) : 0.0f));
      }
      ++row;
    }
  }
  CHECK(x.shape[0] == row && src.shape[0] == row);
}

static void handle_has_its_numbers(const struct rank* me, const deep_ep_handle* handle, const struct tokens* t) {
  deep_ep_handle_info info = {.size = sizeof(info)};
  REQUIRE_OK(deep_ep_handle_get_info(handle, &info));
  CHECK(info.num_tokens == t->num_tokens && info.num_rows == info.num_arrivals && info.layout == DEEP_EP_BY_RANK);
  CHECK(info.num_ranks == me->num_ranks && info.num_topk == kTopk && info.num_experts == kExperts);
  CHECK(info.expert_alignment == 1 && info.low_latency == 0 && info.topk_idx_64 == 1);
  deep_ep_tensor dst = any_tensor(), between = any_tensor(), slots = any_tensor(), none = any_tensor();
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_DST_RANK, &dst));
  for (int i = 0; i < t->num_tokens * kTopk; ++i) {
    const int expert = (int)t->idx[i];
    CHECK(((const int32_t*)dst.data)[i] == (expert < 0 ? -1 : expert / experts_per_rank(me->num_ranks)));
  }
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_DST_ROW, &dst));
  CHECK(dst.ndim == 2 && dst.shape[0] == t->num_tokens && dst.shape[1] == kTopk);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_TOKENS_BETWEEN, &between));
  CHECK(between.shape[0] == me->num_ranks && between.shape[1] == me->num_ranks);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_SLOT_ROWS, &slots));
  CHECK(slots.shape[0] == experts_per_rank(me->num_ranks));
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_SLOT_FIRST_ROW, &slots));
  CHECK(slots.shape[0] == experts_per_rank(me->num_ranks) + 1);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_ARRIVAL_ROW, &none));
  CHECK(none.ndim == 0 && none.data == NULL);
  CHECK(deep_ep_handle_tensor(handle, (deep_ep_handle_field)-1, &none) == DEEP_EP_INVALID_ARGUMENT);
}

// Combining rows as they came, from memory of the arena, into the caller's memory, with a bias.
static void rows_come_home(const struct rank* me, deep_ep_buffer* buffer, deep_ep_handle* handle,
                           const deep_ep_tensor* rows) {
  deep_ep_allocation* memory = NULL;
  deep_ep_tensor x = any_tensor();
  REQUIRE_OK(deep_ep_allocate(buffer, DEEP_EP_FP32, 2, rows->shape, &memory));
  CHECK_OK(deep_ep_allocation_tensor(memory, &x));
  memcpy(x.data, rows->data, sizeof(float) * (size_t)(rows->shape[0] * rows->shape[1]));

  const int num_tokens = kTokens - me->rank;
  float bias[kTokens * kHidden], sum[kTokens * kHidden];
  for (int i = 0; i < kTokens * kHidden; ++i) bias[i] = 0.25f * (float)(i % 3);
  const deep_ep_tensor b = deep_ep_make_tensor(bias, DEEP_EP_FP32, 2, num_tokens, kHidden, 0);
  const deep_ep_tensor out = deep_ep_make_tensor(sum, DEEP_EP_FP32, 2, num_tokens, kHidden, 0);
  const deep_ep_combine_input input = {.size = sizeof(input),
                                       .handle = handle,
                                       .x = &x,
                                       .bias = {&b, NULL},
                                       .out = &out,
                                       .round_per_node = 1,
                                       .bias_last = 1};
  deep_ep_combine_result* result = NULL;
  if (CHECK_OK(deep_ep_combine(buffer, &input, &result))) {
    deep_ep_tensor home = any_tensor(), none = any_tensor();
    CHECK_OK(deep_ep_combine_result_tensor(result, DEEP_EP_COMBINE_X, &home));
    CHECK(home.data == sum && home.shape[0] == num_tokens && home.shape[1] == kHidden);
    CHECK_OK(deep_ep_combine_result_tensor(result, DEEP_EP_COMBINE_TOPK_WEIGHTS, &none));
    CHECK(none.ndim == 0);
    for (int i = 0; i < num_tokens; ++i) {
      const float ranks = (float)ranks_of_token(me->rank, i, me->num_ranks);
      int equal = 1;
      for (int c = 0; c < kHidden; ++c) {
        equal = equal && sum[i * kHidden + c] == ranks * value_of(me->rank, i, c) + bias[i * kHidden + c];
      }
      CHECK(equal);
    }
  }
  deep_ep_combine_result_free(result);
  deep_ep_allocation_free(memory);
}

static void dispatch_by_rank_and_back(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  const deep_ep_tensor x = deep_ep_make_tensor(t->x, DEEP_EP_FP32, 2, t->num_tokens, kHidden, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  const deep_ep_tensor weights = deep_ep_make_tensor(t->weights, DEEP_EP_FP32, 2, t->num_tokens, kTopk, 0);
  const deep_ep_tensor side = deep_ep_make_tensor(t->side, DEEP_EP_I32, 2, t->num_tokens, 2, 0);
  const deep_ep_tensor* const sides[] = {&side};
  deep_ep_dispatch_input input = {.size = sizeof(input),
                                  .x = &x,
                                  .topk_idx = &idx,
                                  .topk_weights = &weights,
                                  .side = sides,
                                  .num_side = 1,
                                  .num_experts = kExperts};
  deep_ep_dispatch_result *result = NULL, *again = NULL;
  REQUIRE_OK(deep_ep_dispatch(buffer, &input, &result));
  rows_are_the_tokens(me, result);
  deep_ep_handle* handle = deep_ep_handle_retain(deep_ep_dispatch_result_handle(result));
  handle_has_its_numbers(me, handle, t);

  // By the caller's handle, with the shortest struct that such a call can have.
  deep_ep_dispatch_input cached = {.size = offsetof(deep_ep_dispatch_input, topk_weights), .x = &x, .handle = handle};
  CHECK_OK(deep_ep_dispatch(buffer, &cached, &again));
  deep_ep_tensor rows = any_tensor(), same = any_tensor();
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &rows));
  CHECK_OK(deep_ep_dispatch_result_tensor(again, DEEP_EP_DISPATCH_X, &same));
  CHECK(same.shape[0] == rows.shape[0] &&
        memcmp(same.data, rows.data, sizeof(float) * (size_t)(rows.shape[0] * rows.shape[1])) == 0);
  deep_ep_dispatch_result_free(result);  // the handle lives on, by its other owner
  if (same.ndim == 2) rows_come_home(me, buffer, handle, &same);
  deep_ep_handle_free(handle);
  deep_ep_dispatch_result_free(again);
}

// Rows per expert, experts on more than one rank, weights applied at home: the result is the token times the sum of its
// weights.
static void dispatch_by_expert_and_back(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  int all[kExperts], count[kMaxRanks];
  const int* hosted[kMaxRanks];
  for (int e = 0; e < kExperts; ++e) all[e] = e;
  for (int r = 0; r < me->num_ranks; ++r) hosted[r] = all, count[r] = r == 0 ? kExperts : 2;
  const deep_ep_placement_lists lists = {.size = sizeof(lists),
                                         .num_ranks = me->num_ranks,
                                         .num_experts = kExperts,
                                         .hosted = hosted,
                                         .num_hosted = count,
                                         .policy = DEEP_EP_SPREAD};
  deep_ep_placement* placement = NULL;
  REQUIRE_OK(deep_ep_placement_from_lists(&lists, &placement));
  const deep_ep_tensor x = deep_ep_make_tensor(t->x, DEEP_EP_FP32, 2, t->num_tokens, kHidden, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  const deep_ep_tensor weights = deep_ep_make_tensor(t->weights, DEEP_EP_FP32, 2, t->num_tokens, kTopk, 0);
  const deep_ep_dispatch_input input = {.size = sizeof(input),
                                        .x = &x,
                                        .topk_idx = &idx,
                                        .topk_weights = &weights,
                                        .placement = placement,
                                        .num_experts = kExperts,
                                        .layout = DEEP_EP_BY_EXPERT,
                                        .expert_alignment = 4,
                                        .max_rows = 4096};
  deep_ep_dispatch_result* result = NULL;
  const deep_ep_status status = deep_ep_dispatch(buffer, &input, &result);
  deep_ep_placement_free(placement);
  REQUIRE_OK(status);
  deep_ep_tensor rows = any_tensor(), came = any_tensor(), first_row = any_tensor(), arrival_row = any_tensor();
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &rows));
  CHECK(rows.shape[0] == 4096);
  deep_ep_handle* handle = deep_ep_dispatch_result_handle(result);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_SLOT_FIRST_ROW, &first_row));
  CHECK(first_row.shape[0] == count[me->rank] + 1);
  for (int s = 0; s <= count[me->rank]; ++s) CHECK(((const int32_t*)first_row.data)[s] % 4 == 0);
  CHECK_OK(deep_ep_handle_tensor(handle, DEEP_EP_HANDLE_ARRIVAL_ROW, &arrival_row));
  CHECK(arrival_row.ndim == 2 && arrival_row.shape[1] == kTopk);
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_TOPK_WEIGHTS, &came));
  CHECK(came.ndim == 1);

  const deep_ep_combine_input back = {.size = sizeof(back),
                                      .handle = handle,
                                      .x = &rows,
                                      .weights = &weights,
                                      .topk_weights = &came,
                                      .sum_key = DEEP_EP_SUM_BY_TOPK};
  deep_ep_combine_result* sum = NULL;
  if (CHECK_OK(deep_ep_combine(buffer, &back, &sum))) {
    deep_ep_tensor home = any_tensor(), weights_home = any_tensor();
    CHECK_OK(deep_ep_combine_result_tensor(sum, DEEP_EP_COMBINE_X, &home));
    CHECK_OK(deep_ep_combine_result_tensor(sum, DEEP_EP_COMBINE_TOPK_WEIGHTS, &weights_home));
    for (int i = 0; i < t->num_tokens; ++i) {
      float factor = 0;
      for (int k = 0; k < kTopk; ++k) {
        const float weight = expert_of(me->rank, i, k) >= 0 ? weight_of(i, k) : 0.0f;
        factor += weight;
        CHECK(((const float*)weights_home.data)[i * kTopk + k] == weight);
      }
      int equal = 1;
      for (int c = 0; c < kHidden; ++c) {
        equal = equal && ((const float*)home.data)[i * kHidden + c] == factor * value_of(me->rank, i, c);
      }
      CHECK(equal);
    }
  }
  deep_ep_combine_result_free(sum);
  deep_ep_dispatch_result_free(result);
}
