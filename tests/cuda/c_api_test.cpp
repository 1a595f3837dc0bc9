// SPDX-License-Identifier: MIT
// The C API on device pointers: dispatch and combine, streams, the limit of multiprocessors, the short calls.
#include <algorithm>
#include <cmath>
#include <thread>

#include "cuda/gpu.h"
#include "deep_ep.h"

namespace deep_ep::test {
namespace {

constexpr int kTokens = 20, kHidden = 64, kTopk = 2, kExperts = 8;

struct CRank {
  int rank;
  int num_ranks;
  deep_ep_group* group;
  int node_size;  // 0: one node
};

// Each rank on a thread of its own.
void run_c_ranks(int num_ranks, const std::function<void(const CRank&)>& body, int node_size = 0) {
  std::vector<deep_ep_group*> groups(static_cast<std::size_t>(num_ranks));
  ASSERT_EQ(deep_ep_group_in_process(num_ranks, groups.data()), DEEP_EP_OK);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank)
    threads.emplace_back([&, rank] {
      device::use_for(rank);
      body({rank, num_ranks, groups[static_cast<std::size_t>(rank)], node_size});
    });
  for (std::thread& thread : threads) thread.join();
  for (deep_ep_group* group : groups) deep_ep_group_free(group);
}

deep_ep_buffer* open_on_gpu(const CRank& me) {
  deep_ep_config config{};
  config.size = sizeof config;
  config.arena_bytes = std::size_t{32} << 20;
  config.timeout_ms = 10000;
  config.low_latency_max_tokens_per_rank = kTokens;
  config.low_latency_row_bytes = kHidden * sizeof(float);
  config.ranks_per_node = &me.node_size;
  config.num_ranks_per_node = me.node_size > 0 ? 1 : 0;
  const int device = device::of_rank(me.rank);
  deep_ep_options options{};
  options.size = sizeof options;
  options.backend = DEEP_EP_CUDA;
  options.cuda_device = &device;
  deep_ep_buffer* buffer = nullptr;
  EXPECT_EQ(deep_ep_buffer_open(me.group, &config, &options, &buffer), DEEP_EP_OK) << deep_ep_last_error();
  return buffer;
}

deep_ep_tensor c_tensor(const TensorView& view) {
  return deep_ep_make_tensor(view.data, static_cast<deep_ep_dtype>(view.dtype), view.ndim, view.shape[0], view.shape[1],
                             0);
}

// Small whole numbers: sums are exact in any order.
float value(int rank, int token, int channel) { return static_cast<float>(rank * 100 + token + channel % 5); }
std::int64_t expert(int rank, int token, int k) { return (rank + token * (k + 1) + 3 * k) % kExperts; }

struct Tokens {
  Tensor x, ids, out;
  std::vector<int> copies;  // ranks that each token goes to
  Tokens(int rank, int num_ranks, int tokens) {
    std::vector<float> values(static_cast<std::size_t>(tokens) * kHidden);
    std::vector<std::int64_t> numbers;
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < kHidden; ++c) values[static_cast<std::size_t>(t * kHidden + c)] = value(rank, t, c);
      for (int k = 0; k < kTopk; ++k) numbers.push_back(expert(rank, t, k));
      const int per_rank = kExperts / num_ranks;
      copies.push_back(expert(rank, t, 0) / per_rank == expert(rank, t, 1) / per_rank ? 1 : 2);
    }
    x = to_gpu(TensorView(values.data(), DType::kFp32, {tokens, kHidden}));
    ids = to_gpu(TensorView(numbers.data(), DType::kI64, {tokens, kTopk}));
    out = to_gpu(x);
  }
};

deep_ep_dispatch_input c_dispatch(const deep_ep_tensor& x, const deep_ep_tensor& ids) {
  deep_ep_dispatch_input in{};
  in.size = sizeof in;
  in.x = &x;
  in.topk_idx = &ids;
  in.num_experts = kExperts;
  return in;
}

deep_ep_tensor rows_of(const deep_ep_dispatch_result* came) {
  deep_ep_tensor rows{};
  rows.size = sizeof rows;
  EXPECT_EQ(deep_ep_dispatch_result_tensor(came, DEEP_EP_DISPATCH_X, &rows), DEEP_EP_OK);
  return rows;
}

deep_ep_combine_input c_combine(const deep_ep_dispatch_result* came, const deep_ep_tensor& rows,
                                const deep_ep_tensor& out) {
  deep_ep_combine_input back{};
  back.size = sizeof back;
  back.handle = deep_ep_dispatch_result_handle(came);
  back.x = &rows;
  back.out = &out;
  return back;
}

// Every token came home as often as `copies` says.
void expect_sums(const Tensor& out, int rank, const std::vector<int>& copies) {
  const auto sums = bytes_of(out);
  for (int t = 0; t < kTokens; ++t)
    for (int c = 0; c < kHidden; ++c)
      EXPECT_EQ(reinterpret_cast<const float*>(sums.data())[t * kHidden + c],
                value(rank, t, c) * static_cast<float>(copies[static_cast<std::size_t>(t)]));
}

void go_there_and_back_also_on_a_stream(const CRank& me) {
  deep_ep_buffer* buffer = open_on_gpu(me);
  ASSERT_NE(buffer, nullptr);
  const Tokens tokens(me.rank, me.num_ranks, kTokens);
  const deep_ep_tensor x = c_tensor(tokens.x), ids = c_tensor(tokens.ids), out = c_tensor(tokens.out);
  cudaStream_t stream;
  gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (void* const on : {static_cast<void*>(nullptr), static_cast<void*>(stream)}) {
    deep_ep_dispatch_input in = c_dispatch(x, ids);
    in.stream = on;
    deep_ep_dispatch_result* came = nullptr;
    ASSERT_EQ(deep_ep_dispatch(buffer, &in, &came), DEEP_EP_OK) << deep_ep_last_error();
    const deep_ep_tensor rows = rows_of(came);
    deep_ep_combine_input back = c_combine(came, rows, out);
    back.stream = on;
    deep_ep_combine_result* home = nullptr;
    ASSERT_EQ(deep_ep_combine(buffer, &back, &home), DEEP_EP_OK) << deep_ep_last_error();
    EXPECT_EQ(deep_ep_check(buffer), DEEP_EP_OK) << deep_ep_last_error();
    expect_sums(tokens.out, me.rank, tokens.copies);
    deep_ep_combine_result_free(home);
    deep_ep_dispatch_result_free(came);
  }
  deep_ep_statistics statistics{};
  statistics.size = sizeof statistics;
  EXPECT_EQ(deep_ep_get_statistics(buffer, &statistics), DEEP_EP_OK);
  EXPECT_EQ(statistics.operations, 4u);
  deep_ep_buffer_close(buffer);
  gpu(cudaStreamDestroy(stream));
}

TEST(CudaCApi, takes_device_pointers_there_and_back_also_on_a_stream) {
  EP_NEEDS_GPU();
  run_c_ranks(2, go_there_and_back_also_on_a_stream);
}

void send_and_receive_low_latency_tickets(const CRank& me) {
  deep_ep_buffer* buffer = open_on_gpu(me);
  ASSERT_NE(buffer, nullptr);
  const Tokens tokens(me.rank, me.num_ranks, kTokens);
  const deep_ep_tensor x = c_tensor(tokens.x), ids = c_tensor(tokens.ids), out = c_tensor(tokens.out);
  deep_ep_dispatch_input in = c_dispatch(x, ids);
  in.layout = DEEP_EP_PADDED;
  in.max_tokens_per_rank = kTokens;
  deep_ep_dispatch_ticket *ticket = nullptr, *dropped = nullptr;
  deep_ep_dispatch_result* came = nullptr;
  ASSERT_EQ(deep_ep_low_latency_dispatch(buffer, &in, &ticket), DEEP_EP_OK) << deep_ep_last_error();
  ASSERT_EQ(deep_ep_low_latency_dispatch(buffer, &in, &dropped), DEEP_EP_OK) << deep_ep_last_error();
  deep_ep_dispatch_ticket_free(dropped);
  ASSERT_EQ(deep_ep_low_latency_dispatch_receive(ticket, &came), DEEP_EP_OK) << deep_ep_last_error();
  deep_ep_dispatch_ticket_free(ticket);
  const deep_ep_tensor rows = rows_of(came);
  deep_ep_combine_input back = c_combine(came, rows, out);
  deep_ep_combine_ticket* returning = nullptr;
  deep_ep_combine_result* home = nullptr;
  ASSERT_EQ(deep_ep_low_latency_combine(buffer, &back, &returning), DEEP_EP_OK) << deep_ep_last_error();
  ASSERT_EQ(deep_ep_low_latency_combine_receive(returning, &home), DEEP_EP_OK) << deep_ep_last_error();
  expect_sums(tokens.out, me.rank, std::vector<int>(kTokens, kTopk));  // a row for each selection
  deep_ep_combine_result_free(home);
  deep_ep_combine_ticket_free(returning);
  deep_ep_dispatch_result_free(came);
  deep_ep_buffer_close(buffer);
}

TEST(CudaCApi, sends_and_receives_low_latency_tickets_on_device_pointers) {
  EP_NEEDS_GPU();
  run_c_ranks(2, send_and_receive_low_latency_tickets);
}

TEST(CudaCApi, crosses_the_network_between_nodes_that_the_environment_names) {
  EP_NEEDS_GPU();
  for (const char* network : {"loopback", "tcp"}) {
    setenv("EP_NETWORK_PROVIDER", network, 1);
    run_c_ranks(4, go_there_and_back_also_on_a_stream, 2);
    run_c_ranks(4, send_and_receive_low_latency_tickets, 2);
  }
  unsetenv("EP_NETWORK_PROVIDER");
}

unsigned widest_grid(cudaGraph_t graph) {
  std::size_t count = 0;
  gpu(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  gpu(cudaGraphGetNodes(graph, nodes.data(), &count));
  unsigned widest = 0;
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    gpu(cudaGraphNodeGetType(node, &type));
    if (type != cudaGraphNodeTypeKernel) continue;
    cudaKernelNodeParams kernel;
    gpu(cudaGraphKernelNodeGetParams(node, &kernel));
    widest = std::max(widest, kernel.gridDim.x * kernel.gridDim.y * kernel.gridDim.z);
  }
  return widest;
}

// The grids are read from a captured call.
TEST(CudaCApi, the_sm_limit_bounds_the_grid) {
  EP_NEEDS_GPU();
  run_c_ranks(1, [](const CRank& me) {
    deep_ep_buffer* buffer = open_on_gpu(me);
    ASSERT_NE(buffer, nullptr);
    const Tokens tokens(0, 1, 4096);
    const deep_ep_tensor x = c_tensor(tokens.x), ids = c_tensor(tokens.ids);
    cudaStream_t stream;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    deep_ep_dispatch_input in = c_dispatch(x, ids);
    in.max_rows = 4096;
    deep_ep_dispatch_result* first = nullptr;
    ASSERT_EQ(deep_ep_dispatch(buffer, &in, &first), DEEP_EP_OK) << deep_ep_last_error();
    deep_ep_dispatch_result_free(first);
    in.stream = stream;
    for (const int limit : {32, 5, 1}) {
      ASSERT_EQ(deep_ep_set_sm_limit(limit), DEEP_EP_OK);
      cudaGraph_t graph;
      deep_ep_dispatch_result* came = nullptr;
      gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      EXPECT_EQ(deep_ep_dispatch(buffer, &in, &came), DEEP_EP_OK) << deep_ep_last_error();
      gpu(cudaStreamEndCapture(stream, &graph));
      EXPECT_EQ(widest_grid(graph), static_cast<unsigned>(limit));
      gpu(cudaGraphDestroy(graph));
      deep_ep_dispatch_result_free(came);
    }
    deep_ep_set_sm_limit(0);
    deep_ep_buffer_close(buffer);
    gpu(cudaStreamDestroy(stream));
  });
}

float sent(int from, int to, int i) {
  const unsigned mixed = static_cast<unsigned>(i + 1) * 2654435761u + static_cast<unsigned>(from) * 40503u;
  return (static_cast<float>(mixed >> 8) * std::ldexp(1.0f, -23) - 1.0f) * static_cast<float>(1 + to) * 3.0f;
}

void check_all_to_all(const CRank& me, int chunk, deep_ep_dtype wire) {
  std::vector<float> input(static_cast<std::size_t>(chunk * me.num_ranks));
  for (int to = 0; to < me.num_ranks; ++to)
    for (int i = 0; i < chunk; ++i) input[static_cast<std::size_t>(to * chunk + i)] = sent(me.rank, to, i);
  const auto size = static_cast<int>(input.size());
  const Tensor there = to_gpu(TensorView(input.data(), DType::kFp32, {size}));
  const Tensor came = to_gpu(there);
  ASSERT_EQ(deep_ep_all_to_all(there.as<float>(), came.as<float>(), size, wire), DEEP_EP_OK) << deep_ep_last_error();
  const auto bytes = bytes_of(came);
  const auto* got = reinterpret_cast<const float*>(bytes.data());
  for (int from = 0; from < me.num_ranks; ++from)
    for (int i = 0; i < chunk; ++i) {
      const float want = sent(from, me.rank, i);
      const float size_of = 3.0f * static_cast<float>(1 + me.rank);
      const float bound = wire == DEEP_EP_FP32   ? 0.0f
                          : wire == DEEP_EP_BF16 ? std::abs(want) / 256
                                                 : std::abs(want) / 16 + size_of / 448 / 1024;
      ASSERT_LE(std::abs(got[from * chunk + i] - want), bound) << "wire " << wire << ", from " << from << ", " << i;
    }
}

// Block r of the rows goes to rank r.
void check_low_latency_all_to_all(const CRank& me, int rows_each, int hidden) {
  const int block = rows_each * hidden;
  std::vector<float> query(static_cast<std::size_t>(block * me.num_ranks));
  for (int to = 0; to < me.num_ranks; ++to)
    for (int i = 0; i < block; ++i) query[static_cast<std::size_t>(to * block + i)] = sent(me.rank, to, i);
  const Tensor there = to_gpu(TensorView(query.data(), DType::kFp32, {static_cast<std::int64_t>(query.size())}));
  const Tensor came = to_gpu(there);
  ASSERT_EQ(deep_ep_low_latency_all_to_all(there.as<float>(), came.as<float>(), rows_each * me.num_ranks), DEEP_EP_OK)
      << deep_ep_last_error();
  const auto bytes = bytes_of(came);
  for (int from = 0; from < me.num_ranks; ++from)
    for (int i = 0; i < block; ++i)
      ASSERT_EQ(reinterpret_cast<const float*>(bytes.data())[from * block + i], sent(from, me.rank, i))
          << rows_each << " rows, from " << from << ", " << i;
}

TEST(CudaCApi, the_short_calls_take_device_pointers) {
  EP_NEEDS_GPU();
  run_c_ranks(4, [](const CRank& me) {
    deep_ep_init_config config{};
    config.size = sizeof config;
    config.group = me.group;
    config.hidden = 64;
    config.max_batch = 16;
    config.per_thread = 1;
    config.arena_bytes = std::size_t{32} << 20;
    config.timeout_ms = 10000;
    config.backend = DEEP_EP_CUDA;
    ASSERT_EQ(deep_ep_init(&config), DEEP_EP_OK) << deep_ep_last_error();
    for (const int chunk : {1, 3, 4, 127, 128, 300, 5000})
      for (const deep_ep_dtype wire : {DEEP_EP_FP32, DEEP_EP_BF16, DEEP_EP_FP8}) check_all_to_all(me, chunk, wire);
    for (const int rows_each : {0, 1, 4, 2}) check_low_latency_all_to_all(me, rows_each, config.hidden);
    EXPECT_EQ(deep_ep_finalize(), DEEP_EP_OK);
  });
}

}  // namespace
}  // namespace deep_ep::test
