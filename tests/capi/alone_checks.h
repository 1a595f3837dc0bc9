// SPDX-License-Identifier: MIT
// What a C program can check without any other rank: errors, struct versions, plans, placements, groups.
#pragma once

#include <stddef.h>

#include "capi/check.h"
#include "capi/input.h"

static void errors_are_codes_with_a_text(void) {
  CHECK(strcmp(deep_ep_last_error(), "") == 0);
  deep_ep_wait wait = {.size = sizeof(wait)};
  CHECK(deep_ep_last_wait(&wait) == DEEP_EP_INVALID_ARGUMENT);
  CHECK(strcmp(deep_ep_status_name(DEEP_EP_OK), "ok") == 0);
  CHECK(strcmp(deep_ep_status_name(DEEP_EP_INVALID_ARGUMENT), "invalid argument") == 0);
  CHECK(strcmp(deep_ep_status_name(DEEP_EP_UNSUPPORTED), "unsupported") == 0);
  CHECK(strcmp(deep_ep_status_name(DEEP_EP_SYSTEM), "system") == 0);
  CHECK(strcmp(deep_ep_status_name(DEEP_EP_TIMEOUT), "timeout") == 0);
  CHECK(strcmp(deep_ep_status_name((deep_ep_status)77), "unknown") == 0);
  char version[32];
  snprintf(version, sizeof(version), "%d.%d.%d", DEEP_EP_VERSION_MAJOR, DEEP_EP_VERSION_MINOR, DEEP_EP_VERSION_PATCH);
  CHECK(strcmp(deep_ep_version(), version) == 0);
  CHECK_FAILS(deep_ep_all_to_all(NULL, NULL, 0, FP32), DEEP_EP_INVALID_ARGUMENT, "deep_ep_init");
  CHECK_FAILS(deep_ep_low_latency_all_to_all(NULL, NULL, 0), DEEP_EP_INVALID_ARGUMENT, "deep_ep_init");
  CHECK(deep_ep_default_buffer() == NULL);
  CHECK_OK(deep_ep_finalize());
  CHECK(deep_ep_last_error()[0] != 0);  // success leaves the text of the last failure
}

static void null_is_refused_or_has_a_neutral_answer(void) {
  deep_ep_buffer* buffer = (deep_ep_buffer*)&counters;  // anything but NULL
  CHECK_FAILS(deep_ep_buffer_open(NULL, NULL, NULL, &buffer), DEEP_EP_INVALID_ARGUMENT, "group: NULL");
  CHECK(buffer == NULL);
  CHECK_FAILS(deep_ep_buffer_open(NULL, NULL, NULL, NULL), DEEP_EP_INVALID_ARGUMENT, "NULL");
  deep_ep_dispatch_result* dispatched = NULL;
  deep_ep_combine_result* combined = NULL;
  deep_ep_dispatch_ticket* sent = NULL;
  deep_ep_combine_ticket* returned = NULL;
  deep_ep_layout_result* layout = NULL;
  deep_ep_tensor tensor = any_tensor();
  CHECK_FAILS(deep_ep_dispatch(NULL, NULL, &dispatched), DEEP_EP_INVALID_ARGUMENT, "buffer: NULL");
  CHECK_FAILS(deep_ep_combine(NULL, NULL, &combined), DEEP_EP_INVALID_ARGUMENT, "buffer: NULL");
  CHECK_FAILS(deep_ep_low_latency_dispatch(NULL, NULL, &sent), DEEP_EP_INVALID_ARGUMENT, "buffer: NULL");
  CHECK_FAILS(deep_ep_low_latency_combine(NULL, NULL, &returned), DEEP_EP_INVALID_ARGUMENT, "buffer: NULL");
  CHECK_FAILS(deep_ep_low_latency_dispatch_receive(NULL, &dispatched), DEEP_EP_INVALID_ARGUMENT, "ticket: NULL");
  CHECK_FAILS(deep_ep_low_latency_combine_receive(NULL, &combined), DEEP_EP_INVALID_ARGUMENT, "ticket: NULL");
  CHECK_FAILS(deep_ep_dispatch_layout(NULL, NULL, 1, NULL, &layout), DEEP_EP_INVALID_ARGUMENT, "buffer: NULL");
  CHECK_FAILS(deep_ep_dispatch_result_tensor(NULL, DEEP_EP_DISPATCH_X, &tensor), DEEP_EP_INVALID_ARGUMENT,
              "result: NULL");
  CHECK(deep_ep_buffer_rank(NULL) == -1 && deep_ep_buffer_num_ranks(NULL) == -1 &&
        deep_ep_buffer_num_nodes(NULL) == -1);
  CHECK(deep_ep_buffer_node_of(NULL, 0) == -1 && deep_ep_masked(NULL, 0) == -1);
  CHECK(deep_ep_group_rank(NULL) == -1 && deep_ep_group_num_ranks(NULL) == -1);
  CHECK(deep_ep_handle_retain(NULL) == NULL && deep_ep_dispatch_result_handle(NULL) == NULL);
  CHECK(deep_ep_dispatch_result_num_side(NULL) == 0 && deep_ep_placement_fingerprint(NULL) == 0);
  deep_ep_group_free(NULL), deep_ep_placement_free(NULL), deep_ep_plan_free(NULL), deep_ep_buffer_close(NULL);
  deep_ep_allocation_free(NULL), deep_ep_handle_free(NULL), deep_ep_dispatch_result_free(NULL);
  deep_ep_layout_result_free(NULL), deep_ep_combine_result_free(NULL);
  deep_ep_dispatch_ticket_free(NULL), deep_ep_combine_ticket_free(NULL);
}

static void structs_of_other_versions_are_read_by_their_size(void) {
  struct earlier {  // a deep_ep_config as if everything after ranks_per_node had been added later
    size_t size;
    int max_experts;
    int num_ranks_per_node;
    const int* ranks_per_node;
    unsigned char not_ours[sizeof(deep_ep_config)];
  } earlier;
  memset(&earlier, 0xee, sizeof(earlier));
  earlier.size = offsetof(struct earlier, not_ours);
  CHECK_OK(deep_ep_config_default((deep_ep_config*)&earlier));
  CHECK(earlier.max_experts == 1024 && earlier.num_ranks_per_node == 0 && earlier.ranks_per_node == NULL);
  for (size_t i = 0; i < sizeof(earlier.not_ours); ++i) CHECK(earlier.not_ours[i] == 0xee);

  deep_ep_memory_plan *small = NULL, *whole = NULL;
  deep_ep_config config = {.size = sizeof(config)};
  CHECK_OK(deep_ep_plan((deep_ep_config*)&earlier, 2, &small));
  CHECK_OK(deep_ep_plan(&config, 2, &whole));
  CHECK(deep_ep_plan_total_bytes(small) == deep_ep_plan_total_bytes(whole));
  deep_ep_plan_free(small), deep_ep_plan_free(whole);

  struct later {
    deep_ep_config config;
    uint64_t added;
  } later = {.config = {.size = sizeof(later)}};
  CHECK_OK(deep_ep_plan(&later.config, 2, &small));
  deep_ep_plan_free(small);
  later.added = 1;
  CHECK_FAILS(deep_ep_plan(&later.config, 2, &small), DEEP_EP_UNSUPPORTED, "config");
  CHECK(small == NULL);

  const size_t absurd[] = {0, 1, sizeof(size_t), offsetof(deep_ep_config, ranks_per_node), 1u << 20, SIZE_MAX};
  for (size_t i = 0; i < sizeof(absurd) / sizeof(absurd[0]); ++i) {
    config.size = absurd[i];
    CHECK_FAILS(deep_ep_plan(&config, 2, &whole), DEEP_EP_INVALID_ARGUMENT, "config.size");
    CHECK_FAILS(deep_ep_config_default(&config), DEEP_EP_INVALID_ARGUMENT, "config.size");
  }
}

static void a_plan_names_every_byte(void) {
  deep_ep_config config = {.size = sizeof(config)};
  CHECK_OK(deep_ep_config_default(&config));
  CHECK(config.max_experts == 1024 && config.num_tickets == 4 && config.timeout_ms == 30000 &&
        config.open_timeout_ms == 60000);
  CHECK(config.low_latency_num_topk == 8 && config.low_latency_side_bytes == 1024);
  config.low_latency_max_tokens_per_rank = 32;
  config.low_latency_row_bytes = 256;
  deep_ep_memory_plan* plan = NULL;
  REQUIRE_OK(deep_ep_plan(&config, 4, &plan));
  size_t sum = 0;
  CHECK(deep_ep_plan_num_regions(plan) > 0);
  for (int i = 0; i < deep_ep_plan_num_regions(plan); ++i) {
    deep_ep_memory_region region = {.size = sizeof(region)};
    CHECK_OK(deep_ep_plan_region(plan, i, &region));
    CHECK(region.name[0] != 0 && region.why[0] != 0 && strstr(deep_ep_plan_text(plan), region.name) != NULL);
    sum += region.bytes;
  }
  CHECK(sum == deep_ep_plan_total_bytes(plan));
  deep_ep_memory_region region = {.size = sizeof(region)};
  CHECK_FAILS(deep_ep_plan_region(plan, -1, &region), DEEP_EP_INVALID_ARGUMENT, "index: -1");
  deep_ep_plan_free(plan);
  CHECK_FAILS(deep_ep_plan(&config, 0, &plan), DEEP_EP_INVALID_ARGUMENT, "num_ranks");

  const deep_ep_exchange_shape shape = {.size = sizeof(shape), .rows = 100, .row_bytes = 512, .num_topk = 4};
  size_t bytes = 0;
  int64_t rows = 0;
  CHECK_OK(deep_ep_arena_bytes_for(&shape, &bytes));
  CHECK(bytes >= 100 * 512);
  CHECK_OK(deep_ep_arena_rows(bytes, &shape, &rows));
  CHECK(rows >= 100);
}

static void placements_are_what_the_lists_say(void) {
  const int first[] = {0, 1, 2}, second[] = {2};
  const int* const hosted[] = {first, second};
  const int num_hosted[] = {3, 1};
  deep_ep_placement_lists lists = {.size = sizeof(lists),
                                   .num_ranks = 2,
                                   .num_experts = 3,
                                   .hosted = hosted,
                                   .num_hosted = num_hosted,
                                   .policy = DEEP_EP_LOCAL_FIRST};
  deep_ep_placement *placement = NULL, *even = NULL;
  CHECK_OK(deep_ep_placement_from_lists(&lists, &placement));
  CHECK(deep_ep_placement_num_slots(placement, 0) == 3 && deep_ep_placement_num_slots(placement, 1) == 1);
  CHECK(deep_ep_placement_expert_at(placement, 0, 1) == 1 && deep_ep_placement_expert_at(placement, 1, 0) == 2);
  CHECK(deep_ep_placement_num_slots(placement, 2) == -1 && deep_ep_placement_expert_at(placement, 1, 1) == -1);
  CHECK_OK(deep_ep_placement_even(3, 2, &even));
  CHECK(deep_ep_placement_num_slots(even, 0) == 2 && deep_ep_placement_num_slots(even, 1) == 1);
  CHECK(deep_ep_placement_fingerprint(even) != deep_ep_placement_fingerprint(placement));
  deep_ep_placement_free(even), deep_ep_placement_free(placement);
  lists.num_experts = 4;  // nobody hosts expert 3
  CHECK_FAILS(deep_ep_placement_from_lists(&lists, &placement), DEEP_EP_INVALID_ARGUMENT, "3");
  CHECK_FAILS(deep_ep_placement_even(0, 2, &even), DEEP_EP_INVALID_ARGUMENT, "num_experts");
}

static int gather_alone(void* user, const void* mine, size_t mine_bytes, deep_ep_gathered* gathered) {
  const int mode = *(const int*)user;
  if (mode == 1) return 5;
  if (mode == 2) return 0;
  CHECK(deep_ep_gathered_put(gathered, 1, mine, mine_bytes) == DEEP_EP_INVALID_ARGUMENT);
  CHECK_OK(deep_ep_gathered_put(gathered, 0, mine, mine_bytes));
  CHECK(deep_ep_gathered_put(gathered, 0, mine, mine_bytes) == DEEP_EP_INVALID_ARGUMENT);
  return 0;
}

static void a_group_may_come_from_a_callback(void) {
  int mode = 1;
  deep_ep_group* group = NULL;
  deep_ep_buffer* buffer = NULL;
  REQUIRE_OK(deep_ep_group_callback(0, 1, gather_alone, &mode, &group));
  CHECK(deep_ep_group_rank(group) == 0 && deep_ep_group_num_ranks(group) == 1);
  CHECK_FAILS(deep_ep_buffer_open(group, NULL, NULL, &buffer), DEEP_EP_SYSTEM, "returned 5");
  mode = 2;
  CHECK_FAILS(deep_ep_buffer_open(group, NULL, NULL, &buffer), DEEP_EP_SYSTEM, "rank 0");
  mode = 0;
  CHECK_OK(deep_ep_buffer_open(group, NULL, NULL, &buffer));
  CHECK(deep_ep_buffer_num_ranks(buffer) == 1);
  deep_ep_buffer_close(buffer);
  deep_ep_group_free(group);
  CHECK_FAILS(deep_ep_group_callback(0, 1, NULL, NULL, &group), DEEP_EP_INVALID_ARGUMENT, "all_gather");
  CHECK_FAILS(deep_ep_group_in_process(0, &group), DEEP_EP_INVALID_ARGUMENT, "num_ranks");
  CHECK_FAILS(deep_ep_group_callback(3, 2, gather_alone, &mode, &group), DEEP_EP_INVALID_ARGUMENT, "rank");
}

static void a_rank_that_never_comes_is_named(void) {
  const deep_ep_tcp where = {.size = sizeof(where), .port = free_port(), .num_ranks = 2, .timeout_ms = 200};
  deep_ep_group* group = NULL;
  CHECK_FAILS(deep_ep_group_tcp(&where, &group), DEEP_EP_TIMEOUT, "rank 1");
  CHECK(group == NULL);
}
