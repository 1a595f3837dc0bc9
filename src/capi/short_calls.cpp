// SPDX-License-Identifier: MIT
// The short calls: an all-to-all is a dispatch in which every rank hosts one expert and sends one token to each.
#include <algorithm>
#include <mutex>
#include <numeric>

#include "capi/objects.h"
#include "capi/staging.h"

namespace deep_ep::capi {

namespace {

constexpr std::int64_t kRowBytes = 16;  // what a row on the wire is a multiple of

// Relaxed everywhere: a number by itself, which publishes nothing.
std::atomic<int> sm_limit{0};

struct Communicator {
  deep_ep_buffer buffer;
  std::unique_ptr<Staging> staging;
  int hidden = 0;
  int max_batch = 0;
};

struct Defaults {
  std::mutex mutex;
  std::shared_ptr<Communicator> of_process;
};

// Never destroyed: a process may end, or a forked child of it, without deep_ep_finalize, and joining threads then could
// hang.
Defaults& defaults() {
  static Defaults& all = *new Defaults;
  return all;
}

thread_local std::shared_ptr<Communicator> of_thread;

std::shared_ptr<Communicator> find_communicator() {
  if (of_thread) return of_thread;
  const std::scoped_lock lock(defaults().mutex);
  return defaults().of_process;
}

std::shared_ptr<Communicator> communicator() {
  auto found = find_communicator();
  require(found != nullptr, "no default communicator is open: call deep_ep_init first");
  return found;
}

std::int64_t padded(std::int64_t elements, DType dtype) {
  const auto per_row = kRowBytes / static_cast<std::int64_t>(item_bytes(dtype));
  return (elements + per_row - 1) / per_row * per_row;
}

int positive_or(int value, int fallback, const char* name) {
  require(value >= 0, "{}: {}, at least 0", name, value);
  return value != 0 ? value : fallback;
}

std::shared_ptr<Communicator> open_communicator(const deep_ep_init_config& c) {
  auto made = std::make_shared<Communicator>();
  made->hidden = positive_or(c.hidden, 7168, "hidden");
  made->max_batch = positive_or(c.max_batch, 128, "max_batch");
  const auto timeout = timeout_of(c.timeout_ms);

  Config config;
  config.max_experts = positive_or(c.num_experts, config.max_experts, "num_experts");
  config.low_latency.max_tokens_per_rank = made->max_batch;
  config.low_latency.row_bytes = static_cast<std::size_t>(padded(made->hidden, DType::kFp32)) * sizeof(float);
  config.low_latency.num_topk = positive_or(c.num_topk, 1, "num_topk");
  config.arena_bytes = c.arena_bytes;
  if (timeout.count() != 0) config.timeout = config.open_timeout = timeout;

  std::shared_ptr<Bootstrap> group;
  if (c.group != nullptr) {
    group = c.group->group;
  } else {
    TcpRendezvous where = TcpRendezvous::from_environment();
    if (timeout.count() != 0) where.timeout = timeout;
    group = tcp_group(where);
  }
  config.max_experts = std::max(config.max_experts, group->num_ranks());
  Options options{.num_workers = c.num_workers};
  choose_backend(c.backend, c.cuda_device, options);
  made->buffer.buffer = Buffer::open(std::move(group), config, options);
  made->staging = options.backend == BackendKind::kCuda ? cuda_staging(*made->buffer.buffer) : host_staging();
  return made;
}

void require_none_open(const std::shared_ptr<Communicator>& open) {
  require(open == nullptr, "deep_ep_init: a default communicator is open; call deep_ep_finalize first");
}

void init(const deep_ep_init_config* config) {
  const auto c = read(config, "config", EP_END_OF(deep_ep_init_config, max_batch));
  if (c.per_thread != 0) {
    require_none_open(of_thread);
    of_thread = open_communicator(c);
    return;
  }
  {
    const std::scoped_lock lock(defaults().mutex);
    require_none_open(defaults().of_process);
  }
  auto opened = open_communicator(c);  // takes as long as the slowest rank, so without the lock
  const std::scoped_lock lock(defaults().mutex);
  require_none_open(defaults().of_process);
  defaults().of_process = std::move(opened);
}

/// Makes `checks`; where they throw, the peers' same call throws too.
template <typename Checks>
void check_together(Buffer& buffer, Operation operation, Checks&& checks) {
  try {
    checks();
  } catch (const std::exception& error) {
    buffer.refuse(operation, error.what());
    throw;
  }
}

/// One all-to-all: `chunk` elements for each rank, on the wire in rows of `row` elements.
struct Chunks {
  int num_ranks;
  int size;
  deep_ep_dtype wire;
  std::int64_t chunk;
  std::int64_t row;

  DType dtype() const { return wire == DEEP_EP_BF16 ? DType::kBf16 : DType::kFp32; }
};

void check_all_to_all(const float* input, const float* output, int size, deep_ep_dtype wire, int num_ranks) {
  require(size >= 0 && size % num_ranks == 0, "size: {}, a multiple of the {} ranks", size, num_ranks);
  require(size == 0 || input != nullptr, "input: NULL for size {}", size);
  require(size == 0 || output != nullptr, "output: NULL for size {}", size);
  require(wire == DEEP_EP_FP32 || wire == DEEP_EP_BF16 || wire == DEEP_EP_FP8,
          "wire: {}, possible are FP32, BF16, FP8 ({}, {}, {})", static_cast<int>(wire), static_cast<int>(DEEP_EP_FP32),
          static_cast<int>(DEEP_EP_BF16), static_cast<int>(DEEP_EP_FP8));
}

DispatchOutput exchange(Communicator& on, const float* input, const Chunks& c) {
  std::vector<std::int32_t> to(c.num_ranks);
  std::iota(to.begin(), to.end(), 0);
  std::vector<std::int32_t> call(2 * to.size(),
                                 c.size);  // (size, wire) beside every row: padding could hide that they differ
  for (std::size_t i = 1; i < call.size(); i += 2) call[i] = static_cast<std::int32_t>(c.wire);

  Tensor x, ids, calls;
  check_together(*on.buffer.buffer, Operation::kDispatch, [&] {
    x = on.staging->pack({input, c.num_ranks, c.chunk, c.row, c.dtype()});
    ids = on.staging->place(to, c.num_ranks, 1);
    calls = on.staging->place(call, c.num_ranks, 2);
  });
  DispatchInput in;
  in.x = x;
  in.topk_idx = ids;
  in.side = {calls};
  in.num_experts = c.num_ranks;
  if (c.wire == DEEP_EP_FP8) in.fp8 = Fp8Options{};
  in.num_workers = workers_of(0);
  return on.buffer.buffer->dispatch(in);
}

/// Every rank sees the calls of all ranks, so all come to one verdict.
void require_equal_calls(Staging& staging, const DispatchOutput& came, const Chunks& c) {
  const std::vector<std::int32_t> first = staging.read(came.handle->first_arrival),
                                  calls = staging.read(came.side.at(0));
  for (int source = 0; source < c.num_ranks; ++source) {
    if (first[source] == first[source + 1]) continue;
    const std::int32_t* call = calls.data() + std::int64_t{2} * first[source];
    require(call[0] == c.size, "size: {} here, {} on rank {}", c.size, call[0], source);
    require(call[1] == static_cast<std::int32_t>(c.wire), "wire: {} here, {} on rank {}", static_cast<int>(c.wire),
            call[1], source);
  }
}

void all_to_all(const float* input, float* output, int size, deep_ep_dtype wire) {
  const auto on = communicator();
  Buffer& buffer = *on->buffer.buffer;
  const int num_ranks = buffer.num_ranks();
  check_together(buffer, Operation::kDispatch, [&] { check_all_to_all(input, output, size, wire, num_ranks); });

  Chunks c{num_ranks, size, wire, size / num_ranks, 0};
  // At least one element: a rank with another size is then an error at once, and not a timeout.
  c.row = padded(std::max<std::int64_t>(c.chunk, 1), wire == DEEP_EP_FP8 ? DType::kFp8E4m3 : c.dtype());
  const DispatchOutput came = exchange(*on, input, c);
  require_equal_calls(*on->staging, came, c);
  if (c.chunk > 0) on->staging->unpack({came, num_ranks, 1, c.chunk, output});
}

void check_low_latency(const Communicator& on, const float* query, const float* result, int batch_size) {
  const int num_ranks = on.buffer.buffer->num_ranks();
  require(batch_size >= 0 && batch_size % num_ranks == 0, "batch_size: {}, a multiple of the {} ranks", batch_size,
          num_ranks);
  require(batch_size <= on.max_batch, "batch_size: {}, max_batch of deep_ep_init: {}", batch_size, on.max_batch);
  require(batch_size == 0 || query != nullptr, "query: NULL for batch_size {}", batch_size);
  require(batch_size == 0 || result != nullptr, "result: NULL for batch_size {}", batch_size);
}

DispatchOutput exchange_rows(Communicator& on, const float* query, int batch_size) {
  const int rows_per_rank = batch_size / on.buffer.buffer->num_ranks();
  std::vector<std::int32_t> to(batch_size);
  for (int i = 0; i < batch_size; ++i) to[i] = i / rows_per_rank;
  Tensor x, ids;
  check_together(*on.buffer.buffer, Operation::kLowLatencyDispatch, [&] {
    x = on.staging->pack({query, batch_size, on.hidden, padded(on.hidden, DType::kFp32), DType::kFp32});
    ids = on.staging->place(to, batch_size, 1);
  });
  DispatchInput in;
  in.x = x;
  in.topk_idx = ids;
  in.num_experts = on.buffer.buffer->num_ranks();
  in.max_tokens_per_rank = on.max_batch;
  in.num_workers = workers_of(0);
  return on.buffer.buffer->low_latency_dispatch(in).receive();
}

void low_latency_all_to_all(const float* query, float* result, int batch_size) {
  const auto on = communicator();
  Buffer& buffer = *on->buffer.buffer;
  check_together(buffer, Operation::kLowLatencyDispatch, [&] { check_low_latency(*on, query, result, batch_size); });

  const int num_ranks = buffer.num_ranks();
  const int rows_per_rank = batch_size / num_ranks;
  const DispatchOutput came = exchange_rows(*on, query, batch_size);
  const std::vector<std::int32_t> first = on->staging->read(came.handle->first_arrival);
  for (int source = 0; source < num_ranks; ++source) {
    const int rows = first[source + 1] - first[source];
    require(rows == rows_per_rank || (rows == 0 && buffer.masked(source)),
            "batch_size: {} rows for each rank here, {} on rank {}", rows_per_rank, rows, source);
  }
  if (rows_per_rank > 0) on->staging->unpack({came, num_ranks, rows_per_rank, on->hidden, result});
}

}  // namespace

int workers_of(int num_workers) { return num_workers != 0 ? num_workers : sm_limit.load(std::memory_order_relaxed); }

}  // namespace deep_ep::capi

using namespace deep_ep::capi;

extern "C" {

deep_ep_status deep_ep_init(const deep_ep_init_config* config) {
  return guarded([&] { init(config); });
}

deep_ep_status deep_ep_finalize(void) {
  return guarded([&] {
    if (of_thread) {
      of_thread.reset();
      return;
    }
    std::shared_ptr<Communicator> last;  // closed after the lock is given back
    const std::scoped_lock lock(defaults().mutex);
    last.swap(defaults().of_process);
  });
}

deep_ep_buffer* deep_ep_default_buffer(void) {
  const auto found = find_communicator();
  return found != nullptr ? &found->buffer : nullptr;
}

deep_ep_status deep_ep_all_to_all(const float* input, float* output, int size, deep_ep_dtype wire) {
  return guarded([&] { all_to_all(input, output, size, wire); });
}

deep_ep_status deep_ep_low_latency_all_to_all(const float* query, float* result, int batch_size) {
  return guarded([&] { low_latency_all_to_all(query, result, batch_size); });
}

deep_ep_status deep_ep_set_sm_limit(int limit) {
  sm_limit.store(std::max(limit, 0), std::memory_order_relaxed);
  return DEEP_EP_OK;
}

int deep_ep_sm_limit(void) { return sm_limit.load(std::memory_order_relaxed); }

}  // extern "C"
