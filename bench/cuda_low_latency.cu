// SPDX-License-Identifier: MIT
// Low-latency dispatch and combine of the CUDA backend, beside the floor measured in the same run: an empty kernel, one
// signal, and the bytes at the pace of plain stores. Two ranks are threads of this process, on one GPU or on two.
// Prints JSON; bench/low_latency_tables.py makes tables of it. Arguments: the part to run (sizes, models, overlap;
// all), and the number of SMs of each rank (0: all of its share).
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/ptx.cuh"
#include "deep_ep/buffer.h"

namespace {

using namespace deep_ep;
namespace ptx = deep_ep::cuda::ptx;

constexpr int kRanks = 2, kInGraph = 16, kGraphs = 60, kWarmUp = 6, kCalls = 300, kRounds = 40;

void gpu(cudaError_t code) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(code));
  std::exit(1);
}

int num_gpus() {
  int count = 0;
  gpu(cudaGetDeviceCount(&count));
  return count;
}

// The floor
// ---------------------------------------------------------------------------------------------------------------------

__global__ void empty() {}

__global__ void copy_rows(const std::byte* src, std::byte* dst, std::size_t bytes) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * 16;
  for (std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * 16; at < bytes; at += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes) v[i] = __ldg(reinterpret_cast<const uint4*>(src + at + i * step));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes) *reinterpret_cast<uint4*>(dst + at + i * step) = v[i];
  }
}

// Both ranks answer each other: `rounds` times there and back.
__global__ void ping_pong(std::uint64_t* mine, std::uint64_t* theirs, bool first, std::uint64_t base, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    if (first) ptx::store_release_system(theirs, base + i);
    while (ptx::load_acquire_system(mine) < base + i) {
    }
    if (!first) ptx::store_release_system(theirs, base + i);
  }
}

__global__ void spin(std::uint64_t nanoseconds, std::uint64_t* took) {
  const std::uint64_t begin = ptx::nanoseconds();
  float work = static_cast<float>(threadIdx.x);
  while (ptx::nanoseconds() - begin < nanoseconds)
    for (int i = 0; i < 64; ++i) work = work * 1.0001f + 0.5f;
  if (work == -1) *took = 0;
}

// A fixed amount of arithmetic on every SM: its time tells whether anything else ran there.
__global__ void grind(int steps, float* out) {
  float a = static_cast<float>(threadIdx.x), b = 1.5f, c = 0.25f, d = 2.5f;
  for (int i = 0; i < steps; ++i) {
    a = fmaf(a, 1.0001f, 0.5f), b = fmaf(b, 0.9999f, a), c = fmaf(c, 1.0002f, 0.25f), d = fmaf(d, 0.9998f, c);
  }
  if (a + b + c + d == -1) *out = a;
}

// Ranks
// ---------------------------------------------------------------------------------------------------------------------

struct Rank {
  int rank = 0, device = 0, sms = 0, share = 0;
  cudaStream_t stream = nullptr, other = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  std::vector<float> times;
  std::byte* landing = nullptr;
  std::uint64_t* word = nullptr;
};
Rank ranks[kRanks];
std::barrier<> meeting(kRanks);
void meet() { meeting.arrive_and_wait(); }

struct Time {
  double median = 0, p99 = 0;
};

// Of the slowest rank in each run.
Time of_slowest() {
  meet();
  std::vector<float> slowest(ranks[0].times);
  for (const Rank& r : ranks)
    for (std::size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], r.times[i]);
  std::sort(slowest.begin(), slowest.end());
  const Time time{slowest[slowest.size() / 2], slowest[(slowest.size() * 99 + 99) / 100 - 1]};
  meet();
  return time;
}

Time timed(Rank& r, int warm_up, int runs, double calls, const std::function<void()>& work,
           const std::function<void()>& before = {}, const std::function<void()>& after = {}) {
  r.times.clear();
  for (int run = 0; run < warm_up + runs; ++run) {
    if (before) before();
    gpu(cudaStreamSynchronize(r.stream));
    meet();
    gpu(cudaEventRecord(r.begin, r.stream));
    work();
    gpu(cudaEventRecord(r.end, r.stream));
    if (after) after();
    gpu(cudaEventSynchronize(r.end));
    float ms = 0;
    gpu(cudaEventElapsedTime(&ms, r.begin, r.end));
    if (run >= warm_up) r.times.push_back(static_cast<float>(ms * 1000 / calls));
  }
  return of_slowest();
}

// `calls` calls captured into one graph: time of one.
Time in_graph(Rank& r, int calls, const std::function<void()>& call) {
  call();  // outside first: tables and memory
  gpu(cudaStreamSynchronize(r.stream));
  meet();
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  gpu(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) call();
  gpu(cudaStreamEndCapture(r.stream, &graph));
  gpu(cudaGraphInstantiate(&replay, graph, 0));
  gpu(cudaGraphUpload(replay, r.stream));
  gpu(cudaStreamSynchronize(r.stream));
  const Time time = timed(r, kWarmUp, kGraphs, calls, [&] { gpu(cudaGraphLaunch(replay, r.stream)); });
  gpu(cudaGraphExecDestroy(replay));
  gpu(cudaGraphDestroy(graph));
  return time;
}

// Called one after the other without a graph, by the host's clock: how fast a program that waits for nothing goes.
Time as_called(Rank& r, const std::function<void()>& call) {
  for (int i = 0; i < 20; ++i) call();
  r.times.clear();
  for (int run = 0; run < 8; ++run) {
    gpu(cudaStreamSynchronize(r.stream));
    meet();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    gpu(cudaStreamSynchronize(r.stream));
    const std::chrono::duration<float, std::micro> took = std::chrono::steady_clock::now() - begin;
    r.times.push_back(took.count() / kCalls);
  }
  return of_slowest();
}

struct Memory {
  std::byte* at = nullptr;
  explicit Memory(std::size_t bytes) { gpu(cudaMalloc(&at, bytes + 16)); }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(at); }
};

struct Floor {
  double launch = 0, launch_in_graph = 0, signal = 0, gb_per_s = 0;
};

// Pauses of other work are what a copy is compared with, so it gets the same SMs.
Floor measure_floor(Rank& r) {
  Floor floor;
  const int blocks = r.sms;
  floor.launch = timed(r, 10, 200, 1, [&] { empty<<<blocks, 512, 0, r.stream>>>(); }).median;
  floor.launch_in_graph = in_graph(r, kInGraph, [&] { empty<<<blocks, 512, 0, r.stream>>>(); }).median;
  Rank& peer = ranks[1 - r.rank];
  constexpr int kSignals = 200;
  std::uint64_t base = 0;
  floor.signal = timed(r, 3, 20, 2 * kSignals, [&] {
                   ping_pong<<<1, 1, 0, r.stream>>>(r.word, peer.word, r.rank == 0, base, kSignals);
                   base += kSignals;
                 }).median;
  constexpr std::size_t kBytes = std::size_t{16} << 20;
  Memory from(kBytes);
  gpu(cudaMemset(from.at, 1, kBytes));
  const Time time =
      timed(r, 3, 30, 1, [&] { copy_rows<<<blocks, 1024, 0, r.stream>>>(from.at, peer.landing, kBytes); });
  floor.gb_per_s = static_cast<double>(kBytes) / ((time.median - floor.launch) * 1000);
  return floor;
}

// One shape
// ---------------------------------------------------------------------------------------------------------------------

struct Shape {
  const char* name = "";
  int tokens = 0, hidden = 7168, experts = 256, topk = 8;
};

struct Inputs {
  Inputs(const Shape& s, int rank)
      : x(std::size_t(s.tokens) * s.hidden * 2), ids(8ull * s.tokens * s.topk), weights(4ull * s.tokens * s.topk) {
    std::mt19937 random(static_cast<unsigned>(17 + rank));
    std::vector<std::uint16_t> values(std::size_t(s.tokens) * s.hidden);
    for (auto& v : values) v = static_cast<std::uint16_t>((random() & 0x81ff) | 0x3e00);
    std::vector<std::int64_t> selected;
    std::vector<float> factors;
    std::vector<int> all(s.experts);
    for (int i = 0; i < s.experts; ++i) all[i] = i;
    for (int t = 0; t < s.tokens; ++t)
      for (int k = 0; k < s.topk; ++k) {
        std::swap(all[k], all[k + static_cast<int>(random() % (s.experts - k))]);
        selected.push_back(all[k]);
        factors.push_back(static_cast<float>(random() % 1000) / 1000);
        sent_rows[all[k] * kRanks / s.experts] += 1;
      }
    for (int t = 0; t < s.tokens; ++t)
      for (int r = 0; r < kRanks; ++r) {
        bool goes = false;
        for (int k = 0; k < s.topk; ++k) goes = goes || selected[t * s.topk + k] * kRanks / s.experts == r;
        messages += goes;
      }
    gpu(cudaMemcpy(x.at, values.data(), values.size() * 2, cudaMemcpyHostToDevice));
    gpu(cudaMemcpy(ids.at, selected.data(), selected.size() * 8, cudaMemcpyHostToDevice));
    gpu(cudaMemcpy(weights.at, factors.data(), factors.size() * 4, cudaMemcpyHostToDevice));
  }
  Memory x, ids, weights;
  double messages = 0, sent_rows[kRanks] = {};
};

class Bench {
 public:
  Bench(Rank& r, const std::shared_ptr<Bootstrap>& group, const Shape& s, int sms) : r_(r), s_(s), in_(s, r.rank) {
    Config config;
    config.arena_bytes = (std::size_t{1} << 30) + s.tokens * (std::size_t{24} << 20);
    config.max_experts = 1024;
    config.low_latency = {s.tokens, std::size_t(s.hidden) * 2, s.topk, 1024};
    config.timeout = std::chrono::milliseconds(5000);
    Options options;
    options.backend = BackendKind::kCuda;
    options.cuda_device = r.device;
    options.num_workers = sms;
    buffer_ = Buffer::open(group, config, options);
    dispatch_.x = TensorView(in_.x.at, DType::kBf16, {s.tokens, s.hidden});
    dispatch_.topk_idx = TensorView(in_.ids.at, DType::kI64, {s.tokens, s.topk});
    dispatch_.topk_weights = TensorView(in_.weights.at, DType::kFp32, {s.tokens, s.topk});
    dispatch_.num_experts = s.experts;
    dispatch_.layout = OutputLayout::kPadded;
    dispatch_.max_tokens_per_rank = s.tokens;
    dispatch_.fp8 = Fp8Options{};
    dispatch_.stream = r.stream;
    DispatchInput plain = dispatch_;
    plain.fp8.reset();
    rows_ = buffer_->low_latency_dispatch(plain).receive();
    combine_.x = rows_.x;
    combine_.handle = rows_.handle;
    combine_.weights = dispatch_.topk_weights;
    combine_.order = SumOrder::by_topk();
    combine_.stream = r.stream;
    buffer_->check();
  }

  std::string run(const Floor& floor) {
    DispatchInput dispatch = dispatch_, bf16 = dispatch_;
    CombineInput combine = combine_, reduced = combine_;
    reduced.order.round_per_rank = true;
    reduced.pre_reduce = true;
    DispatchInput split = dispatch;
    CombineInput combine_split = combine;
    dispatch.at_once = combine.at_once = bf16.at_once = reduced.at_once = true;
    bf16.fp8.reset();
    const Time d = in_graph(r_, kInGraph, [&] { buffer_->low_latency_dispatch(dispatch).receive(); });
    const Time d16 = in_graph(r_, kInGraph, [&] { buffer_->low_latency_dispatch(bf16).receive(); });
    const Time c = in_graph(r_, kInGraph, [&] { buffer_->low_latency_combine(combine).receive(); });
    const Time p = in_graph(r_, kInGraph, [&] { buffer_->low_latency_combine(reduced).receive(); });
    const Time ds = in_graph(r_, kInGraph, [&] { buffer_->low_latency_dispatch(split).receive(); });
    const Time cs = in_graph(r_, kInGraph, [&] { buffer_->low_latency_combine(combine_split).receive(); });
    const Time pair = in_graph(r_, kInGraph, [&] {
      buffer_->low_latency_dispatch(dispatch).receive();
      buffer_->low_latency_combine(combine).receive();
    });
    const Time called = as_called(r_, [&] {
      buffer_->low_latency_dispatch(dispatch).receive();
      buffer_->low_latency_combine(combine).receive();
    });
    const auto [d_send, d_recv] = apart([&] { return buffer_->low_latency_dispatch(split); });
    const auto [c_send, c_recv] = apart([&] { return buffer_->low_latency_combine(combine_split); });
    const auto [p_send, p_recv] = apart([&] {
      CombineInput in = reduced;
      in.at_once = false;
      return buffer_->low_latency_combine(in);
    });
    buffer_->check();
    const auto us = [&](double bytes) { return bytes / (floor.gb_per_s * 1000); };
    const double base = floor.launch_in_graph + floor.signal;
    const double wire = s_.hidden + 4.0 * (s_.hidden / 128), row = 2.0 * s_.hidden;
    double rows = 0;
    for (double n : in_.sent_rows) rows += n;
    const double floor_d = base + us((in_.messages + rows) * wire);
    const double floor_c = base + us(rows * row + s_.tokens * row);
    const double floor_p = base + us(in_.messages * row + s_.tokens * row);
    char line[1600];
    std::snprintf(
        line, sizeof line,
        "{\"shape\": \"%s\", \"tokens\": %d, \"hidden\": %d, \"experts\": %d, \"topk\": %d, "
        "\"dispatch\": {\"us\": %.2f, \"p99\": %.2f, \"split\": %.2f, \"send\": %.2f, \"recv\": %.2f, \"bf16\": "
        "%.2f, \"floor\": %.2f}, \"combine\": {\"us\": %.2f, \"p99\": %.2f, \"split\": %.2f, \"send\": %.2f, "
        "\"recv\": %.2f, \"floor\": %.2f}, \"pre_reduced\": {\"us\": %.2f, \"p99\": %.2f, \"send\": %.2f, "
        "\"recv\": %.2f, \"floor\": %.2f}, \"round_trip\": {\"graph\": %.2f, \"graph_p99\": %.2f, \"called\": "
        "%.2f}}",
        s_.name, s_.tokens, s_.hidden, s_.experts, s_.topk, d.median, d.p99, ds.median, d_send, d_recv, d16.median,
        floor_d, c.median, c.p99, cs.median, c_send, c_recv, floor_c, p.median, p.p99, p_send, p_recv, floor_p,
        pair.median, pair.p99, called.median);
    return line;
  }

  // The time of a kernel that fills every SM between send and receive, beside its time alone.
  std::string overlap() {
    Memory sink(64);
    int all = 0;
    gpu(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, r_.device));
    // The ranks of one GPU share it: one after the other would measure the sharing.
    const auto work = [&] { grind<<<8 * all, 512, 0, r_.stream>>>(60000, reinterpret_cast<float*>(sink.at)); };
    const Time alone = timed(r_, 2, 20, 1, work);
    Ticket<DispatchOutput> ticket;
    const Time overlapped = timed(
        r_, 2, 20, 1, work, [&] { ticket = buffer_->low_latency_dispatch(dispatch_); }, [&] { ticket.receive(); });
    buffer_->check();
    char line[200];
    std::snprintf(line, sizeof line, "{\"grind_alone_us\": %.1f, \"grind_between_send_and_receive_us\": %.1f}",
                  alone.median, overlapped.median);
    return line;
  }

 private:
  // Sends that nobody waits for, then receives of what has arrived; three tickets at a time.
  template <typename Send>
  std::pair<double, double> apart(const Send& send) {
    constexpr int kTickets = 3;
    std::vector<decltype(send())> tickets;
    const auto receive_all = [&] {
      for (auto& ticket : tickets) ticket.receive();
      tickets.clear();
    };
    const auto send_all = [&] {
      for (int i = 0; i < kTickets; ++i) tickets.push_back(send());
    };
    // A kernel in front holds the stream until all is enqueued: the host's pace is not what is measured.
    const auto hold = [&] { spin<<<1, 1, 0, r_.stream>>>(60000, nullptr); };
    const double held = timed(r_, 2, kRounds, 1, hold).median;
    const Time sends = timed(
        r_, 2, kRounds, 1, [&] { hold(), send_all(); }, {}, receive_all);
    const Time receives = timed(
        r_, 2, kRounds, 1, [&] { hold(), receive_all(); },
        [&] { send_all(), gpu(cudaStreamSynchronize(r_.stream)), meet(); });
    return {(sends.median - held) / kTickets, (receives.median - held) / kTickets};
  }

  Rank& r_;
  const Shape s_;
  Inputs in_;
  std::unique_ptr<Buffer> buffer_;
  DispatchInput dispatch_;
  CombineInput combine_;
  DispatchOutput rows_;
};

void bench(Rank& r, const std::shared_ptr<Bootstrap>& group, const std::string& part, int sms) {
  gpu(cudaSetDevice(r.device));
  gpu(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
  gpu(cudaStreamCreateWithFlags(&r.other, cudaStreamNonBlocking));
  gpu(cudaEventCreate(&r.begin));
  gpu(cudaEventCreate(&r.end));
  Memory landing(std::size_t{16} << 20), word(8);
  gpu(cudaMemset(word.at, 0, 8));
  r.landing = landing.at;
  r.word = reinterpret_cast<std::uint64_t*>(word.at);
  meet();
  const Floor floor = measure_floor(r);
  const bool all = part == "all";
  std::vector<Shape> shapes;
  if (all || part == "sizes")
    for (int tokens : {1, 2, 4, 8, 16, 32, 64, 128, 256, 512}) shapes.push_back({"DeepSeek-V3", tokens});
  if (all || part == "models")
    for (int tokens : {1, 8, 32, 128}) {
      shapes.push_back({"Kimi-K3", tokens, 3584, 896, 16});
      shapes.push_back({"gpt-oss", tokens, 2880, 128, 4});
      shapes.push_back({"Nemotron", tokens, 1024, 512, 22});
      shapes.push_back({"Qwen3-Next", tokens, 2048, 512, 10});
    }
  if (part == "quick")
    for (int tokens : {1, 8, 32, 128}) shapes.push_back({"DeepSeek-V3", tokens});
  std::string runs;
  for (const Shape& shape : shapes) {
    Bench one(r, group, shape, sms);
    const std::string line = one.run(floor);
    runs += (runs.empty() ? "  " : ",\n  ") + line;
    if (r.rank == 0) std::fprintf(stderr, "%s\n", line.c_str());
    meet();
  }
  std::string overlapped = "null";
  if (all || part == "overlap") {
    Bench one(r, group, {"DeepSeek-V3", 32}, sms);
    overlapped = one.overlap();
    meet();
  }
  if (r.rank == 0) {
    cudaDeviceProp info;
    gpu(cudaGetDeviceProperties(&info, r.device));
    std::printf(
        "{\"gpu\": \"%s\", \"gpus\": %d, \"ranks\": %d, \"sms_of_rank\": %d, \"calls_in_graph\": %d, \"graphs\": %d,\n"
        " \"launch_us\": %.2f, \"launch_in_graph_us\": %.2f, \"signal_us\": %.2f, \"copy_gb_per_s\": %.0f,\n"
        " \"overlap\": %s,\n \"runs\": [\n%s\n ]}\n",
        info.name, std::min(num_gpus(), kRanks), kRanks, r.sms, kInGraph, kGraphs, floor.launch, floor.launch_in_graph,
        floor.signal, floor.gb_per_s, overlapped.c_str(), runs.c_str());
  }
  meet();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "all";
  const int sms = argc > 2 ? std::atoi(argv[2]) : 0;
  const int gpus = std::min(num_gpus(), kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks[rank].rank = rank;
    ranks[rank].device = rank % gpus;
    int all = 0;
    gpu(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, rank % gpus));
    ranks[rank].sms = sms > 0 ? sms : all / (kRanks / gpus);
  }
  if (gpus > 1)
    for (int rank = 0; rank < kRanks; ++rank) {
      gpu(cudaSetDevice(rank));
      gpu(cudaDeviceEnablePeerAccess(1 - rank, 0));
    }
  auto groups = deep_ep::in_process_group(kRanks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank)
    threads.emplace_back([&, rank] {
      try {
        bench(ranks[rank], groups[rank], part, sms);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        std::exit(1);
      }
    });
  for (auto& thread : threads) thread.join();
  return 0;
}
