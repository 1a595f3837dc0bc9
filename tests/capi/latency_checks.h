// SPDX-License-Identifier: MIT
// The low-latency calls of one rank, FP8 rows, and wire formats.
#pragma once

#include "capi/input.h"

static deep_ep_dispatch_input padded_input(const deep_ep_tensor* x, const deep_ep_tensor* idx) {
  const deep_ep_dispatch_input input = {.size = sizeof(input),
                                        .x = x,
                                        .topk_idx = idx,
                                        .num_experts = kExperts,
                                        .layout = DEEP_EP_PADDED,
                                        .max_tokens_per_rank = kTokens};
  return input;
}

// What a token's rows are multiplied with when they come home, in all.
static float factor_of(int rank, int token) {
  float factor = 0;
  for (int k = 0; k < kTopk; ++k) factor += expert_of(rank, token, k) >= 0 ? weight_of(token, k) : 0.0f;
  return factor;
}

static void low_latency_and_back(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  const deep_ep_tensor x = deep_ep_make_tensor(t->x, DEEP_EP_FP32, 2, t->num_tokens, kHidden, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  const deep_ep_tensor weights = deep_ep_make_tensor(t->weights, DEEP_EP_FP32, 2, t->num_tokens, kTopk, 0);
  const deep_ep_dispatch_input input = padded_input(&x, &idx);
  deep_ep_dispatch_ticket *ticket = NULL, *dropped = NULL;
  deep_ep_dispatch_result* result = NULL;
  REQUIRE_OK(deep_ep_low_latency_dispatch(buffer, &input, &ticket));
  CHECK_OK(deep_ep_low_latency_dispatch(buffer, &input, &dropped));
  deep_ep_dispatch_ticket_free(dropped);
  CHECK_OK(deep_ep_low_latency_dispatch_receive(ticket, &result));
  deep_ep_dispatch_result* twice = NULL;
  CHECK_FAILS(deep_ep_low_latency_dispatch_receive(ticket, &twice), DEEP_EP_INVALID_ARGUMENT, "ticket");
  deep_ep_dispatch_ticket_free(ticket);
  if (result == NULL) return;
  deep_ep_tensor rows = any_tensor();
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &rows));
  CHECK(rows.ndim == 3 && rows.shape[0] == experts_per_rank(me->num_ranks) && rows.shape[1] == me->num_ranks * kTokens);

  const deep_ep_combine_input back = {.size = sizeof(back),
                                      .handle = deep_ep_dispatch_result_handle(result),
                                      .x = &rows,
                                      .weights = &weights,
                                      .sum_key = DEEP_EP_SUM_BY_TOPK};
  deep_ep_combine_ticket* returning = NULL;
  deep_ep_combine_result* sum = NULL;
  if (CHECK_OK(deep_ep_low_latency_combine(buffer, &back, &returning))) {
    CHECK_OK(deep_ep_low_latency_combine_receive(returning, &sum));
    deep_ep_tensor home = any_tensor();
    CHECK_OK(deep_ep_combine_result_tensor(sum, DEEP_EP_COMBINE_X, &home));
    for (int i = 0; i < t->num_tokens && home.data != NULL; ++i) {
      CHECK(((const float*)home.data)[i * kHidden + 5] == factor_of(me->rank, i) * value_of(me->rank, i, 5));
    }
  }
  deep_ep_combine_result_free(sum);
  deep_ep_combine_ticket_free(returning);
  deep_ep_dispatch_result_free(result);
}

// Received FP8 rows decode to the tokens within the format's error; E4M3 by hand here, apart from the library's own.
static float from_fp8(unsigned char code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 0 ? (float)mantissa * power2(-9) : (float)(8 + mantissa) * power2(exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

static void fp8_rows_are_close(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  enum { kWide = 32 };  // an FP8 row of 16 bytes times 2
  float narrow[kTokens * kWide];
  for (int i = 0; i < t->num_tokens; ++i) memcpy(narrow + i * kWide, t->x + i * kHidden, kWide * sizeof(float));
  const deep_ep_tensor rows = deep_ep_make_tensor(narrow, DEEP_EP_FP32, 2, t->num_tokens, kWide, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  deep_ep_dispatch_input input = {.size = sizeof(input),
                                  .x = &rows,
                                  .topk_idx = &idx,
                                  .num_experts = kExperts,
                                  .fp8 = DEEP_EP_FP8_SCALES,
                                  .scale_order = DEEP_EP_COLUMN_MAJOR};
  deep_ep_dispatch_result* result = NULL;
  REQUIRE_OK(deep_ep_dispatch(buffer, &input, &result));
  deep_ep_tensor codes = any_tensor(), scales = any_tensor(), src = any_tensor(), first = any_tensor();
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &codes));
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_SCALES, &scales));
  CHECK_OK(deep_ep_handle_tensor(deep_ep_dispatch_result_handle(result), DEEP_EP_HANDLE_SRC_TOKEN, &src));
  CHECK_OK(deep_ep_handle_tensor(deep_ep_dispatch_result_handle(result), DEEP_EP_HANDLE_FIRST_ARRIVAL, &first));
  CHECK(codes.dtype == DEEP_EP_FP8 && scales.dtype == DEEP_EP_FP32 && scales.strides[0] == 1);
  for (int r = 0; r < me->num_ranks; ++r) {
    for (int row = ((const int32_t*)first.data)[r]; row < ((const int32_t*)first.data)[r + 1]; ++row) {
      const float scale = ((const float*)scales.data)[row];
      int close = 1;
      for (int c = 0; c < kWide; ++c) {
        const float true_value = value_of(r, ((const int32_t*)src.data)[row], c);
        const float got = scale * from_fp8(((const unsigned char*)codes.data)[row * kWide + c]);
        close = close && magnitude_of(got - true_value) <= true_value * power2(-4) + scale * power2(-10);
      }
      CHECK(close);
    }
  }
  deep_ep_dispatch_result_free(result);
  input.fp8 = (deep_ep_fp8_mode)4;
  CHECK_FAILS(deep_ep_dispatch(buffer, &input, &result), DEEP_EP_INVALID_ARGUMENT, "fp8");
}

static float from_bf16(uint16_t code) {
  const uint32_t bits = (uint32_t)code << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint16_t to_bf16(float value) {  // towards 0
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}

// Rows that come home in a wire format are as close as that format promises.
static void wire_formats_are_close(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  enum { kWide = 32 };
  const float within[] = {0.0f, 0.016f, 1.0f / 16};
  uint16_t narrow[kTokens * kWide];
  for (int i = 0; i < t->num_tokens; ++i)
    for (int c = 0; c < kWide; ++c) narrow[i * kWide + c] = to_bf16(t->x[i * kHidden + c]);
  const deep_ep_tensor x = deep_ep_make_tensor(narrow, DEEP_EP_BF16, 2, t->num_tokens, kWide, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  const deep_ep_tensor weights = deep_ep_make_tensor(t->weights, DEEP_EP_FP32, 2, t->num_tokens, kTopk, 0);
  const deep_ep_dispatch_input input = padded_input(&x, &idx);
  deep_ep_dispatch_ticket* ticket = NULL;
  deep_ep_dispatch_result* result = NULL;
  REQUIRE_OK(deep_ep_low_latency_dispatch(buffer, &input, &ticket));
  CHECK_OK(deep_ep_low_latency_dispatch_receive(ticket, &result));
  deep_ep_dispatch_ticket_free(ticket);
  if (result == NULL) return;
  deep_ep_tensor rows = any_tensor();
  CHECK_OK(deep_ep_dispatch_result_tensor(result, DEEP_EP_DISPATCH_X, &rows));
  deep_ep_combine_input back = {.size = sizeof(back),
                                .handle = deep_ep_dispatch_result_handle(result),
                                .x = &rows,
                                .weights = &weights,
                                .sum_key = DEEP_EP_SUM_BY_TOPK};
  for (int wire = DEEP_EP_WIRE_AS_IS; wire <= DEEP_EP_WIRE_FP8; ++wire) {
    back.wire = (deep_ep_wire_format)wire;
    deep_ep_combine_ticket* returning = NULL;
    deep_ep_combine_result* sum = NULL;
    if (CHECK_OK(deep_ep_low_latency_combine(buffer, &back, &returning))) {
      CHECK_OK(deep_ep_low_latency_combine_receive(returning, &sum));
      deep_ep_tensor home = any_tensor();
      CHECK_OK(deep_ep_combine_result_tensor(sum, DEEP_EP_COMBINE_X, &home));
      int close = home.data != NULL;
      for (int i = 0; close && i < t->num_tokens; ++i) {
        for (int c = 0; c < kWide; ++c) {
          const float want = factor_of(me->rank, i) * from_bf16(narrow[i * kWide + c]);
          const float got = from_bf16(((const uint16_t*)home.data)[i * kWide + c]);
          close = close && magnitude_of(got - want) <= want * (within[wire] + power2(-7));  // rounded twice to bf16
        }
      }
      CHECK(close);
    }
    deep_ep_combine_result_free(sum);
    deep_ep_combine_ticket_free(returning);
  }
  deep_ep_combine_ticket* never = NULL;
  back.wire = (deep_ep_wire_format)3;
  CHECK_FAILS(deep_ep_low_latency_combine(buffer, &back, &never), DEEP_EP_INVALID_ARGUMENT, "wire");
  back.wire = DEEP_EP_WIRE_AS_IS;
  back.pre_reduce = 1;
  CHECK_FAILS(deep_ep_low_latency_combine(buffer, &back, &never), DEEP_EP_INVALID_ARGUMENT, "round_per_rank");
  deep_ep_dispatch_result_free(result);
}
