// SPDX-License-Identifier: MIT
// What one rank sees when arguments are refused or a peer does not come, and the counters afterwards.
#pragma once

#include <stddef.h>

#include "capi/input.h"

// One rank's argument does not even convert: all ranks hear of it at once, and the buffer works on.
static void refused_together(const struct rank* me, deep_ep_buffer* buffer, const struct tokens* t) {
  deep_ep_tensor x = deep_ep_make_tensor(t->x, DEEP_EP_FP32, 2, t->num_tokens, kHidden, 0);
  const deep_ep_tensor idx = deep_ep_make_tensor(t->idx, DEEP_EP_I64, 2, t->num_tokens, kTopk, 0);
  const deep_ep_dispatch_input input = {.size = sizeof(input), .x = &x, .topk_idx = &idx, .num_experts = kExperts};
  deep_ep_dispatch_result* result = NULL;
  if (me->rank == 1) x.dtype = (deep_ep_dtype)99;
  CHECK_FAILS(deep_ep_dispatch(buffer, &input, &result), DEEP_EP_INVALID_ARGUMENT, me->rank == 1 ? "x: 99" : "rank 1");
  CHECK(result == NULL);
  deep_ep_wait wait = {.size = sizeof(wait)};
  CHECK(deep_ep_last_wait(&wait) == DEEP_EP_INVALID_ARGUMENT);
  x.dtype = DEEP_EP_FP32;
  if (me->rank == 0) x.size = 3;
  CHECK_FAILS(deep_ep_dispatch(buffer, &input, &result), DEEP_EP_INVALID_ARGUMENT,
              me->rank == 0 ? "x.size: 3" : "rank 0");
  x.size = sizeof(x);
  if (me->rank == 0) x.data = NULL;
  CHECK_FAILS(deep_ep_dispatch(buffer, &input, &result), DEEP_EP_INVALID_ARGUMENT,
              me->rank == 0 ? "x.data: NULL" : "rank 0");
  x.data = (void*)t->x;
  CHECK_OK(deep_ep_dispatch(buffer, &input, &result));
  deep_ep_dispatch_result_free(result);
  deep_ep_combine_result* sum = NULL;
  const deep_ep_combine_input nothing = {.size = sizeof(nothing)};
  CHECK_FAILS(deep_ep_combine(buffer, &nothing, &sum), DEEP_EP_INVALID_ARGUMENT, "handle");
}

static void statistics_count(const struct rank* me, deep_ep_buffer* buffer) {
  deep_ep_peer_statistics peers[kMaxRanks] = {{.size = sizeof(peers[0])}};
  uint64_t slots[kExperts];
  memset(slots, 0xff, sizeof(slots));
  deep_ep_statistics s = {
      .size = sizeof(s), .peers = peers, .max_peers = kMaxRanks, .rows_per_slot = slots, .max_slots = kExperts};
  REQUIRE_OK(deep_ep_get_statistics(buffer, &s));
  CHECK(s.operations > 0 && s.refused > 0 && s.timeouts == 0 && s.num_peers == me->num_ranks && s.num_slots > 0);
  CHECK(s.arena_bytes_high_water >= s.arena_bytes_in_use && s.arena_bytes_high_water > 0);
  for (int r = 0; r < me->num_ranks; ++r) {
    CHECK(peers[r].size == sizeof(peers[0]) && peers[r].bytes_sent > 0 && peers[r].wait_ns_sum >= peers[r].wait_ns_max);
  }
  for (int i = 0; i < s.num_slots && i < kExperts; ++i) CHECK(slots[i] != UINT64_MAX);
  CHECK_OK(deep_ep_reset_statistics(buffer));
  deep_ep_statistics counters_only = {.size = offsetof(deep_ep_statistics, refused)};
  counters_only.refused = 7;
  CHECK_OK(deep_ep_get_statistics(buffer, &counters_only));
  CHECK(counters_only.operations == 0 && counters_only.refused == 7);
}

// Rank 1 opens and never calls: rank 0 learns whom it waited for.
static void a_missing_rank_is_a_timeout(const struct rank* me) {
  const deep_ep_config config = {.size = sizeof(config), .arena_bytes = 8u << 20, .timeout_ms = 300};
  deep_ep_buffer* buffer = NULL;
  REQUIRE_OK(deep_ep_buffer_open(me->group, &config, NULL, &buffer));
  if (me->rank == 0) {
    struct tokens t;
    fill(&t, 0);
    const deep_ep_tensor x = deep_ep_make_tensor(t.x, DEEP_EP_FP32, 2, t.num_tokens, kHidden, 0);
    const deep_ep_tensor idx = deep_ep_make_tensor(t.idx, DEEP_EP_I64, 2, t.num_tokens, kTopk, 0);
    const deep_ep_dispatch_input input = {.size = sizeof(input), .x = &x, .topk_idx = &idx, .num_experts = kExperts};
    deep_ep_dispatch_result* result = NULL;
    CHECK_FAILS(deep_ep_dispatch(buffer, &input, &result), DEEP_EP_TIMEOUT,
                "timeout: rank 0 waited for rank 1 in dispatch");
    deep_ep_wait wait = {.size = sizeof(wait)};
    CHECK_OK(deep_ep_last_wait(&wait));
    CHECK(wait.rank == 0 && wait.peer == 1 && strcmp(wait.phase, "dispatch") == 0 && wait.expected != wait.seen);
    struct {
      size_t size;
      int rank, peer;
    } earlier = {.size = sizeof(earlier), .rank = 9, .peer = 9};
    CHECK_OK(deep_ep_last_wait((deep_ep_wait*)&earlier));
    CHECK(earlier.rank == 0 && earlier.peer == 1);
    wait.size = 2;
    CHECK(deep_ep_last_wait(&wait) == DEEP_EP_INVALID_ARGUMENT);
    deep_ep_statistics s = {.size = sizeof(s)};
    CHECK_OK(deep_ep_get_statistics(buffer, &s));
    CHECK(s.timeouts == 1);
  } else {
    usleep(900000);  // present, but silent
  }
  deep_ep_buffer_close(buffer);
}
