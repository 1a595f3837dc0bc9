// SPDX-License-Identifier: MIT
// Low latency on one GPU: every byte compared with the host backend's; split and at once, several tickets, graphs,
// masks.
#include <atomic>
#include <barrier>
#include <numeric>

#include "low_latency_cases.h"

namespace deep_ep::test {
namespace {

constexpr OutputLayout kLayouts[] = {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded};

std::int32_t last_of(const TensorView& tensor) {
  const auto bytes = bytes_of(tensor);
  return reinterpret_cast<const std::int32_t*>(bytes.data())[tensor.shape[0] - 1];
}

// A GPU's outputs have room for the most that can come; what is behind the last row is not compared.
void keep_output(Result& result, const Case& c, const std::string& call, const DispatchOutput& out) {
  const Handle& h = *out.handle;
  const std::int64_t arrivals = last_of(h.first_arrival);
  const std::int64_t rows = c.layout == OutputLayout::kByRank ? arrivals : last_of(h.slot_first_row);
  const auto arrived = [&](const std::string& what, const TensorView& t) {
    TensorView valid = t;
    valid.shape[0] = arrivals;
    if (t.given()) result.emplace_back(call + what, bytes_of(valid));
  };
  keep_rows(result, call + " x", out.x, h, rows);
  keep_rows(result, call + " scales", out.scales, h, rows);
  keep_rows(result, call + " topk_weights", out.topk_weights, h, rows);
  arrived(" topk_idx", out.topk_idx);
  for (const Tensor& t : out.side) arrived(" side", t);
  arrived(" src_token", h.src_token);
  arrived(" arrival_row", h.arrival_row);
  keep(result, call + " dst_rank", h.dst_rank);
  keep(result, call + " first_arrival", h.first_arrival);
  keep(result, call + " slot_rows", h.slot_rows);
  keep(result, call + " slot_first_row", h.slot_first_row);
  keep(result, call + " tokens_between", h.tokens_between);
}

const std::vector<SumOrder>& orders() {
  static const std::vector<SumOrder> all = {SumOrder::by_topk(),
                                            SumOrder::by_rank(),
                                            SumOrder::by_rank_and_node(),
                                            {SumOrder::Key::kRank, true, true, false},
                                            {SumOrder::Key::kTopK, true, false, true},
                                            {SumOrder::Key::kTopK, true, true, true}};
  return all;
}

void keep_combined(Result& result, const Case& c, Buffer& buffer, const Placed& in, const DispatchOutput& sent,
                   bool at_once) {
  for (const SumOrder& order : orders()) {
    CombineInput combine;
    combine.x = sent.x;
    combine.handle = sent.handle;
    combine.order = order;
    combine.at_once = at_once;
    if (c.layout != OutputLayout::kByRank) combine.weights = in.home;
    combine.bias[0] = in.bias;
    if (c.weights) combine.topk_weights = sent.topk_weights;
    CombineOutput back = buffer.low_latency_combine(combine).receive();
    keep(result, "combine", back.x);
    keep(result, "combine weights", back.topk_weights);
    if (c.dtype != DType::kFp32) {
      combine.wire = order.round_per_node ? WireFormat::kFp8 : WireFormat::kLogFmt10;
      back = buffer.low_latency_combine(combine).receive();
      keep(result, std::string("combine in ") + name(combine.wire), back.x);
      combine.wire = WireFormat::kAsIs;
    }
    combine.weights_home = WeightsHome::kFromOwner;
    combine.bias[0] = {};
    if (order.round_per_rank) {
      combine.pre_reduce = true;
      combine.weights = c.layout != OutputLayout::kByRank ? TensorView(in.weights) : TensorView();
    }
    back = buffer.low_latency_combine(combine).receive();
    keep(result, order.round_per_rank ? "pre-reduced combine" : "combine without bias", back.x);
    keep(result, "combine weights of the owner", back.topk_weights);
  }
}

Result run_case(const Case& c, Buffer& buffer, const Placed& in, bool at_once) {
  Result result;
  DispatchInput call = in.quantised(c);
  call.at_once = at_once;
  keep_output(result, c, "dispatch", buffer.low_latency_dispatch(call).receive());
  if (c.dtype != DType::kBf16 && c.dtype != DType::kFp16 && c.dtype != DType::kFp32) return result;
  const DispatchOutput sent = buffer.low_latency_dispatch(in.call).receive();
  keep_output(result, c, "plain dispatch", sent);
  keep_combined(result, c, buffer, in, sent, at_once);
  return result;
}

void expect_same_as_host(const Case& c) {
  std::ostringstream text;
  text << c;
  SCOPED_TRACE(text.str());
  std::vector<Result> host(c.ranks), device(c.ranks);
  Options one_worker;
  one_worker.num_workers = 1;
  run_ranks(c.ranks, config_of(c), one_worker, [&](Buffer& b) {
    const Placed in(c, inputs_of(c, b.rank()), false);
    host[b.rank()] = run_case(c, b, in, false);
  });
  for (bool at_once : {false, true}) {
    SCOPED_TRACE(at_once ? "at once" : "split");
    ASSERT_NO_THROW(run_ranks(c.ranks, config_of(c), on_gpu(c.sms), [&](Buffer& b) {
      const Placed in(c, inputs_of(c, b.rank()), true);
      device[b.rank()] = run_case(c, b, in, at_once);
    }));
    expect_equal(host, device);
  }
}

TEST(CudaLowLatency, is_the_hosts_for_every_layout_and_number_of_ranks) {
  EP_NEEDS_GPU();
  for (int ranks : {1, 2, 4, 8})
    for (OutputLayout layout : kLayouts) expect_same_as_host({.ranks = ranks, .layout = layout, .alignment = 4});
}

TEST(CudaLowLatency, is_the_hosts_for_every_kind_of_row) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32, DType::kU8, DType::kFp8E4m3})
    for (OutputLayout layout : kLayouts)
      expect_same_as_host(
          {.tokens = 17, .dtype = dtype, .layout = layout, .idx64 = false, .caller_scales = 3, .side = 5});
}

TEST(CudaLowLatency, quantises_as_the_host_does) {
  EP_NEEDS_GPU();
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32})
    for (int kind = 0; kind < 3; ++kind)
      for (bool column_major : {false, true})
        expect_same_as_host({.tokens = 12,
                             .hidden = 2064,
                             .dtype = dtype,
                             .layout = kLayouts[(kind + column_major) % 3],
                             .fp8 = true,
                             .round_scale = kind > 0,
                             .ue8m0 = kind > 1,
                             .column_major = column_major,
                             .specials = true});
}

TEST(CudaLowLatency, serves_rows_of_any_width_and_any_number_of_tokens) {
  EP_NEEDS_GPU();
  for (std::int64_t hidden : {8, 16, 136, 1000, 4096, 7168, 16400}) {
    expect_same_as_host({.tokens = 9, .hidden = hidden, .layout = OutputLayout::kPadded});
    if (hidden % 16 == 0)
      expect_same_as_host({.tokens = 9, .hidden = hidden, .layout = OutputLayout::kByExpert, .fp8 = true});
  }
  for (int tokens : {0, 1, 5, 128, 513})
    expect_same_as_host({.tokens = tokens, .hidden = 64, .layout = OutputLayout::kPadded, .fp8 = true});
}

TEST(CudaLowLatency, serves_many_selections_and_many_experts_on_any_number_of_sms) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts) {
    expect_same_as_host({.tokens = 30, .topk = 1, .layout = layout});
    expect_same_as_host({.ranks = 4, .tokens = 30, .hidden = 64, .topk = 32, .experts = 64, .layout = layout});
    expect_same_as_host({.ranks = 2, .tokens = 20, .hidden = 64, .topk = 22, .experts = 512, .layout = layout});
  }
  for (int sms : {1, 3}) expect_same_as_host({.tokens = 100, .layout = OutputLayout::kPadded, .sms = sms});
  expect_same_as_host({.tokens = 40, .hidden = 64, .experts = 4096, .layout = OutputLayout::kByExpert, .sms = 1});
}

TEST(CudaLowLatency, follows_placements_and_nodes) {
  EP_NEEDS_GPU();
  for (OutputLayout layout : kLayouts)
    expect_same_as_host(
        {.ranks = 4, .layout = layout, .side = 3, .replicas = true, .mask_weights = false, .nodes = {2}});
}

// Tickets, threads, high throughput between
// ---------------------------------------------------------------------------------------------------------------------

CombineInput back_of(const Placed& in, const DispatchOutput& sent) {
  CombineInput combine;
  combine.x = sent.x;
  combine.handle = sent.handle;
  combine.order = SumOrder::by_topk();
  combine.weights = in.home;
  return combine;
}

// Three tickets open, high throughput between their send and their receive.
Result run_mixed(const Series& series, Buffer& buffer, bool device) {
  Result result;
  const Case& c = series.c;
  constexpr int kRepeats = 4;
  std::vector<std::unique_ptr<Placed>> all;
  for (int i = 0; i < 4 * kRepeats; ++i)
    all.push_back(std::make_unique<Placed>(c, series.inputs(buffer.rank(), i), device));
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const std::unique_ptr<Placed>* in = all.data() + 4 * repeat;
    std::vector<Ticket<DispatchOutput>> tickets;
    for (int i = 0; i < 3; ++i) tickets.push_back(buffer.low_latency_dispatch(in[i]->call));
    const int order[] = {repeat % 3, (repeat + 1) % 3, (repeat + 2) % 3};
    std::vector<DispatchOutput> sent(3);
    sent[order[0]] = tickets[order[0]].receive();
    auto dropped = buffer.low_latency_dispatch(in[3]->call);
    dropped = {};
    for (int i : {order[1], order[2]}) sent[i] = tickets[i].receive();
    for (int i = 0; i < 3; ++i) keep_output(result, c, "ticket", sent[i]);
    std::vector<Ticket<CombineOutput>> back;
    for (int i = 0; i < 2; ++i) back.push_back(buffer.low_latency_combine(back_of(*in[i], sent[i])));
    DispatchInput high = in[3]->call;
    high.max_tokens_per_rank = c.layout == OutputLayout::kPadded ? c.tokens : 0;
    const DispatchOutput rows = buffer.dispatch(high);
    keep(result, "high throughput", rows.handle->dst_row);
    for (int i : {1, 0}) keep(result, "back", back[i].receive().x);
    CombineInput combine = back_of(*in[3], rows);
    keep(result, "high throughput back", buffer.combine(combine).x);
  }
  return result;
}

TEST(CudaLowLatency, keeps_tickets_open_across_other_calls_and_forgets_dropped_ones) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 4, .tokens = 20, .layout = OutputLayout::kPadded});
  Config config = config_of(series.c);
  config.num_tickets = 5;
  std::vector<Result> host(4), device(4);
  run_ranks(4, config, {.num_workers = 1}, [&](Buffer& b) { host[b.rank()] = run_mixed(series, b, false); });
  run_ranks(4, config, on_gpu(), [&](Buffer& b) { device[b.rank()] = run_mixed(series, b, true); });
  expect_equal(host, device);
}

TEST(CudaLowLatency, receives_on_other_threads) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 20, .layout = OutputLayout::kPadded});
  std::vector<std::vector<Result>> host(3, std::vector<Result>(2)), device = host;
  const auto body = [&](Buffer& b, std::vector<std::vector<Result>>& results, bool on_device) {
    std::vector<std::unique_ptr<Placed>> in;
    std::vector<Ticket<DispatchOutput>> tickets;
    for (int i = 0; i < 3; ++i) {
      in.push_back(std::make_unique<Placed>(series.c, series.inputs(b.rank(), i), on_device));
      tickets.push_back(b.low_latency_dispatch(in[i]->call));
    }
    std::vector<std::thread> threads;
    for (int i = 2; i >= 0; --i)
      threads.emplace_back([&, i] { keep_output(results[i][b.rank()], series.c, "ticket", tickets[i].receive()); });
    for (auto& thread : threads) thread.join();
  };
  run_ranks(2, config_of(series.c), {.num_workers = 1}, [&](Buffer& b) { body(b, host, false); });
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) { body(b, device, true); });
  for (int i = 0; i < 3; ++i) expect_equal(host[i], device[i]);
}

TEST(CudaLowLatency, refuses_a_call_that_needs_the_place_of_an_open_ticket) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 8, .layout = OutputLayout::kPadded});
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) {
    const Placed in(series.c, series.inputs(b.rank(), 0), true);
    std::vector<Ticket<DispatchOutput>> tickets;
    for (int i = 0; i < 4; ++i) tickets.push_back(b.low_latency_dispatch(in.call));
    try {
      b.low_latency_dispatch(in.call).receive();
      ADD_FAILURE() << "a fifth ticket where there are four";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    }
    for (auto& ticket : tickets) EXPECT_GT(ticket.receive().x.shape[0], 0);
    EXPECT_GT(b.low_latency_dispatch(in.call).receive().x.shape[0], 0);
  });
}

// Graphs
// ---------------------------------------------------------------------------------------------------------------------

// An odd number of operations, split and at once.
struct Sequence {
  DispatchOutput first, second;
  CombineOutput back;
};

Sequence enqueue(Buffer& buffer, const Placed& in, cudaStream_t stream) {
  Sequence s;
  DispatchInput call = in.call;
  call.stream = stream;
  auto one = buffer.low_latency_dispatch(call);
  call.at_once = true;
  auto two = buffer.low_latency_dispatch(call);
  s.first = one.receive();
  s.second = two.receive();
  CombineInput combine = back_of(in, s.first);
  combine.stream = stream;
  s.back = buffer.low_latency_combine(combine).receive();
  return s;
}

void keep_sequence(Result& result, const Case& c, const Sequence& s) {
  keep_output(result, c, "first", s.first);
  keep_output(result, c, "second", s.second);
  keep(result, "back", s.back.x);
}

void overwrite(const Placed& to, const Inputs& with, cudaStream_t stream) {
  const auto copy = [&](const Tensor& dst, const Tensor& src) {
    gpu(cudaMemcpyAsync(dst.data, src.data, src.bytes(), cudaMemcpyHostToDevice, stream));
  };
  copy(to.x, with.x);
  copy(to.idx, with.idx);
  copy(to.home, with.home_weights);
  if (with.weights.given()) copy(to.weights, with.weights);
  gpu(cudaStreamSynchronize(stream));
}

// In some rounds ranks leave one another out: 3 is alone then.
void set_masks(Buffer& buffer, bool masked) {
  for (int peer = 0; peer < buffer.num_ranks(); ++peer)
    if ((peer == 3) != (buffer.rank() == 3)) buffer.set_masked(peer, masked);
}

void replay_with_other_inputs_and_masks(const Series& series) {
  constexpr int kRanks = 4, kRounds = 9;
  const auto is_masked = [](int round) { return round % 4 == 2; };
  std::vector<std::vector<Result>> host(kRounds, std::vector<Result>(kRanks)), device = host;
  std::barrier<> meeting(kRanks);
  run_ranks(kRanks, config_of(series.c), {.num_workers = 1}, [&](Buffer& b) {
    for (int round = 0; round < kRounds; ++round) {
      const Placed in(series.c, series.inputs(b.rank(), round), false);
      set_masks(b, is_masked(round));
      meeting.arrive_and_wait();
      keep_sequence(host[round][b.rank()], series.c, enqueue(b, in, nullptr));
      meeting.arrive_and_wait();
    }
  });
  run_ranks(kRanks, config_of(series.c), on_gpu(), [&](Buffer& b) {
    const Placed in(series.c, series.inputs(b.rank(), 0), true);
    cudaStream_t stream;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    (void)enqueue(b, in, stream);  // the placement's tables go to the device once
    gpu(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const Sequence captured = enqueue(b, in, stream);
    gpu(cudaStreamEndCapture(stream, &graph));
    gpu(cudaGraphInstantiate(&replay, graph, 0));
    meeting.arrive_and_wait();  // instantiating allocates: not while a peer waits on the device
    for (int round = 0; round < kRounds; ++round) {
      overwrite(in, series.inputs(b.rank(), round), stream);
      set_masks(b, is_masked(round));
      meeting.arrive_and_wait();
      for (int again = 0; again < 3; ++again) gpu(cudaGraphLaunch(replay, stream));
      gpu(cudaStreamSynchronize(stream));
      b.check();
      keep_sequence(device[round][b.rank()], series.c, captured);
      meeting.arrive_and_wait();
    }
    gpu(cudaGraphExecDestroy(replay));
    gpu(cudaGraphDestroy(graph));
    gpu(cudaStreamDestroy(stream));
  });
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    expect_equal(host[round], device[round]);
  }
}

TEST(CudaLowLatencyGraph, replays_with_other_inputs_and_other_masks_as_the_host_does) {
  EP_NEEDS_GPU();
  replay_with_other_inputs_and_masks(
      Series({.ranks = 4, .tokens = 23, .hidden = 512, .layout = OutputLayout::kPadded}));
}

TEST(CudaLowLatencyGraph, replays_between_nodes_with_other_inputs_and_other_masks_as_the_host_does) {
  EP_NEEDS_GPU();
  for (const char* network : {"loopback", "tcp"})
    replay_with_other_inputs_and_masks(Series({.ranks = 4,
                                               .tokens = 23,
                                               .hidden = 512,
                                               .layout = OutputLayout::kPadded,
                                               .nodes = {2, 2},
                                               .network = network}));
}

TEST(CudaLowLatencyGraph, replays_thousands_of_times_with_equal_results) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 7, .hidden = 256, .layout = OutputLayout::kPadded});
  std::barrier<> meeting(2);
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) {
    const Placed in(series.c, series.inputs(b.rank(), 1), true);
    cudaStream_t stream;
    gpu(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Result before, after;
    keep_sequence(before, series.c, enqueue(b, in, nullptr));
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    gpu(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const Sequence captured = enqueue(b, in, stream);
    gpu(cudaStreamEndCapture(stream, &graph));
    gpu(cudaGraphInstantiate(&replay, graph, 0));
    meeting.arrive_and_wait();
    for (int i = 0; i < 3000; ++i) gpu(cudaGraphLaunch(replay, stream));
    gpu(cudaStreamSynchronize(stream));
    b.check();
    keep_sequence(after, series.c, captured);
    EXPECT_TRUE(before == after);
    meeting.arrive_and_wait();
    (void)enqueue(b, in, nullptr);  // calls outside the graph go on from there
    gpu(cudaGraphExecDestroy(replay));
    gpu(cudaGraphDestroy(graph));
    gpu(cudaStreamDestroy(stream));
  });
}

// Pressure
// ---------------------------------------------------------------------------------------------------------------------

std::uint64_t hash_of(const Result& result) {
  std::uint64_t hash = 14695981039346656037ull;
  for (const auto& [what, bytes] : result)
    for (std::byte byte : bytes) hash = (hash ^ static_cast<std::uint64_t>(byte)) * 1099511628211ull;
  return hash;
}

TEST(CudaLowLatency, gives_equal_hashes_over_repeats_of_random_shapes) {
  EP_NEEDS_GPU();
  std::mt19937 random(2026);
  for (int shape = 0; shape < 8; ++shape) {
    Case c;
    c.ranks = 2 << (random() % 3);
    c.tokens = static_cast<int>(random() % 60);
    c.hidden = 16 * (1 + static_cast<std::int64_t>(random() % 200));
    c.topk = 1 + static_cast<int>(random() % 12);
    c.experts = c.ranks * (1 + static_cast<int>(random() % 20));
    c.layout = kLayouts[random() % 3];
    c.fp8 = random() % 2 == 0;
    c.sms = static_cast<int>(random() % 10);
    std::ostringstream text;
    text << c;
    SCOPED_TRACE(text.str());
    run_ranks(c.ranks, config_of(c), on_gpu(c.sms), [&](Buffer& b) {
      const Placed in(c, inputs_of(c, b.rank()), true);
      std::uint64_t first = 0;
      for (int repeat = 0; repeat < 20; ++repeat) {
        const std::uint64_t hash = hash_of(run_case(c, b, in, repeat % 2 == 0));
        if (repeat == 0) first = hash;
        EXPECT_EQ(hash, first) << "repeat " << repeat;
      }
    });
  }
}

TEST(CudaLowLatency, is_supported_where_its_slots_fit) {
  EP_NEEDS_GPU();
  const Series series({.ranks = 2, .tokens = 8, .layout = OutputLayout::kPadded});
  run_ranks(2, config_of(series.c), on_gpu(), [&](Buffer& b) {
    CallShape shape{.hidden = series.c.hidden, .num_tokens = 8, .num_topk = 4, .num_experts = 16, .low_latency = true};
    EXPECT_TRUE(b.supports(shape)) << b.supports(shape).reason;
    shape.num_topk = 33;
    EXPECT_FALSE(b.supports(shape));
    shape.num_topk = 4;
    shape.num_tokens = 100000;
    EXPECT_FALSE(b.supports(shape));
  });
}

}  // namespace
}  // namespace deep_ep::test
