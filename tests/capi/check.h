// SPDX-License-Identifier: MIT
// Checks that count, and ranks as threads or as processes, for C programs that test the C API.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "deep_ep.h"

enum { kMaxRanks = 4, kFailuresShown = 20 };

/* In memory shared with forked ranks. */
struct counters {
  atomic_int made;
  atomic_int failed;
};
static struct counters* counters;

static inline void open_counters(void) {
  counters = mmap(NULL, sizeof(*counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (counters == MAP_FAILED) abort();
}

static inline int check_that(int holds, const char* what, const char* file, int line) {
  atomic_fetch_add(&counters->made, 1);
  if (!holds && atomic_fetch_add(&counters->failed, 1) < kFailuresShown) {
    fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", file, line, what, deep_ep_last_error());
  }
  return holds;
}

#define CHECK(condition) check_that((condition) != 0, #condition, __FILE__, __LINE__)
#define CHECK_OK(call) CHECK((call) == DEEP_EP_OK)
/* Without the result of the call the rest of the function makes no sense. */
#define REQUIRE_OK(call)         \
  do {                           \
    if (!CHECK_OK(call)) return; \
  } while (0)
/* The call fails with `code` and a text that contains `part`. */
#define CHECK_FAILS(call, code, part)                    \
  do {                                                   \
    CHECK((call) == (code));                             \
    CHECK(strstr(deep_ep_last_error(), (part)) != NULL); \
  } while (0)

/* One rank of a test: `group` is there for ranks that are threads, `port` for ranks that are processes. */
struct rank {
  int rank;
  int num_ranks;
  int port;
  deep_ep_group* group;
  void (*body)(const struct rank* me);
};

static inline int free_port(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof(address);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0 || bind(fd, (struct sockaddr*)&address, length) != 0) abort();
  if (getsockname(fd, (struct sockaddr*)&address, &length) != 0) abort();
  close(fd);
  return ntohs(address.sin_port);
}

static inline void* thread_of_rank(void* rank) {
  const struct rank* me = rank;
  me->body(me);
  return NULL;
}

static inline void run_threads(int num_ranks, void (*body)(const struct rank* me)) {
  pthread_t threads[kMaxRanks];
  struct rank ranks[kMaxRanks];
  deep_ep_group* groups[kMaxRanks];
  REQUIRE_OK(deep_ep_group_in_process(num_ranks, groups));
  for (int r = 0; r < num_ranks; ++r) {
    ranks[r] = (struct rank){.rank = r, .num_ranks = num_ranks, .group = groups[r], .body = body};
    if (pthread_create(&threads[r], NULL, thread_of_rank, &ranks[r]) != 0) abort();
  }
  for (int r = 0; r < num_ranks; ++r) pthread_join(threads[r], NULL);
  for (int r = 0; r < num_ranks; ++r) deep_ep_group_free(groups[r]);
}

static inline void run_process(int rank, int num_ranks, int port, void (*body)(const struct rank* me)) {
  struct rank me = {.rank = rank, .num_ranks = num_ranks, .port = port, .body = body};
  const deep_ep_tcp where = {.size = sizeof(where),
                             .port = port,
                             .rank = rank,
                             .num_ranks = num_ranks,
                             .job = "c_api_test",
                             .timeout_ms = 60000};
  if (CHECK_OK(deep_ep_group_tcp(&where, &me.group))) body(&me);
  deep_ep_group_free(me.group);
}

static inline void run_processes(int num_ranks, void (*body)(const struct rank* me)) {
  pid_t children[kMaxRanks];
  const int port = free_port();
  for (int r = 0; r < num_ranks; ++r) {
    children[r] = fork();
    if (children[r] < 0) abort();
    if (children[r] != 0) continue;
    run_process(r, num_ranks, port, body);
    exit(0); /* with the exit handlers: a leak that a sanitizer finds in a rank is a failure too */
  }
  for (int r = 0; r < num_ranks; ++r) {
    int status = -1;
    CHECK(waitpid(children[r], &status, 0) == children[r] && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}
