// SPDX-License-Identifier: MIT
// A C program that uses the whole C API, with ranks as processes that meet over TCP and as threads: numbers, ownership,
// errors, struct versions.
#define _GNU_SOURCE  // -std=c11 alone hides POSIX
#include "capi/alone_checks.h"
#include "capi/failure_checks.h"
#include "capi/latency_checks.h"
#include "capi/short_call_checks.h"
#include "capi/throughput_checks.h"

static void long_calls(const struct rank* me) {
  struct tokens t;
  memset(&t, 0, sizeof(t));
  fill(&t, me->rank);
  deep_ep_buffer* buffer = open_buffer(me);
  if (buffer == NULL) return;
  ranks_and_nodes(me, buffer);
  layout_counts(me, buffer, &t);
  dispatch_by_rank_and_back(me, buffer, &t);
  dispatch_by_expert_and_back(me, buffer, &t);
  low_latency_and_back(me, buffer, &t);
  fp8_rows_are_close(me, buffer, &t);
  wire_formats_are_close(me, buffer, &t);
  refused_together(me, buffer, &t);
  statistics_count(me, buffer);
  deep_ep_buffer_close(buffer);
}

int main(void) {
  open_counters();
  // Processes first: after them this process has no thread yet.
  run_processes(2, long_calls);
  run_processes(4, long_calls);
  run_processes(2, a_missing_rank_is_a_timeout);
  run_processes(2, short_calls);
  run_processes(4, short_calls);
  const int in_processes = atomic_load(&counters->made);

  errors_are_codes_with_a_text();
  null_is_refused_or_has_a_neutral_answer();
  structs_of_other_versions_are_read_by_their_size();
  a_plan_names_every_byte();
  placements_are_what_the_lists_say();
  a_group_may_come_from_a_callback();
  a_rank_that_never_comes_is_named();
  run_threads(2, long_calls);
  run_threads(4, long_calls);
  run_threads(2, a_missing_rank_is_a_timeout);
  run_threads(2, short_calls);
  run_threads(4, short_calls);
  run_threads(2, short_calls_with_one_worker);
  a_world_of_one_needs_nothing();

  const int made = atomic_load(&counters->made), failed = atomic_load(&counters->failed);
  printf("C API: %d checks (%d by ranks that are processes), %d failed\n", made, in_processes, failed);
  return failed != 0;
}
