// SPDX-License-Identifier: MIT
#include "host/workers.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace deep_ep::host {

namespace {

// A hint: where the core does not exist the thread stays unbound.
void bind_to_core(std::thread& thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

}  // namespace

Workers::Workers(int count, int first_core) {
  for (int i = 1; i < count; ++i) {
    threads_.emplace_back([this] { serve(); });
    if (first_core >= 0) bind_to_core(threads_.back(), first_core + i);
  }
}

Workers::~Workers() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  joined_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::for_range(std::int64_t n, std::int64_t piece, int limit, const Body& body) {
  if (n <= 0) return;
  const std::int64_t pieces = (n + piece - 1) / piece;
  const int helpers =
      static_cast<int>(std::min<std::int64_t>({limit > 0 ? limit - 1 : count() - 1, count() - 1, pieces - 1}));
  if (helpers == 0) return body(0, n);
  std::lock_guard turn(one_loop_);
  std::unique_lock lock(mutex_);
  loop_ = {&body, n, piece, 0, helpers, 0};
  joined_.notify_all();
  work(lock);
  loop_.seats = 0;
  done_.wait(lock, [this] { return loop_.running == 0; });
}

// Takes pieces until none is left. The lock is held only to take one: pieces are large.
void Workers::work(std::unique_lock<std::mutex>& lock) {
  while (loop_.next < loop_.n) {
    const std::int64_t begin = loop_.next, end = std::min(loop_.n, begin + loop_.piece);
    loop_.next = end;
    const Body* body = loop_.body;
    lock.unlock();
    (*body)(begin, end);
    lock.lock();
  }
}

void Workers::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    joined_.wait(lock, [this] { return stop_ || (loop_.seats > 0 && loop_.next < loop_.n); });
    if (stop_) return;
    --loop_.seats;
    ++loop_.running;
    work(lock);
    if (--loop_.running == 0) done_.notify_all();
  }
}

}  // namespace deep_ep::host
