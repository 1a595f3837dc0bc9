// SPDX-License-Identifier: MIT
// Dispatch and combine of the CUDA backend, beside the copy limit of the same SMs measured in the same run. Ranks are
// threads of this process: all on one GPU, or one GPU each where there are enough. Prints JSON.
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/ptx.cuh"
#include "deep_ep/buffer.h"

namespace {

using namespace deep_ep;

constexpr int kMaxRanks = 2, kTokens = 4096, kHidden = 7168, kTopk = 8, kExperts = 256, kWarmUp = 6, kRuns = 40;

void gpu(cudaError_t code) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(code));
  std::exit(1);
}

// The limit: one load and `copies` stores of every 16 bytes, by all threads or by bulk copies.
__global__ void copy_by_stores(const std::byte* src, std::byte* a, std::byte* b, std::size_t bytes) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * 16;
  std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * 16;
  for (; at + 3 * step < bytes; at += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __ldg(reinterpret_cast<const uint4*>(src + at + i * step));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(a + at + i * step) = v[i];
      if (b != nullptr) *reinterpret_cast<uint4*>(b + at + i * step) = v[i];
    }
  }
  for (; at < bytes; at += step) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(src + at));
    *reinterpret_cast<uint4*>(a + at) = v;
    if (b != nullptr) *reinterpret_cast<uint4*>(b + at) = v;
  }
}

constexpr int kChunk = 14336, kRing = 4, kCopyWarps = 3;

__global__ void copy_by_bulk(const std::byte* src, std::byte* a, std::byte* b, std::size_t chunks) {
#if EP_BULK_COPY
  namespace ptx = deep_ep::cuda::ptx;
  extern __shared__ __align__(128) std::byte ring[];
  __shared__ std::uint64_t full[kCopyWarps * kRing];
  if (threadIdx.x % 32 != 0) return;
  const int warp = static_cast<int>(threadIdx.x / 32);
  for (int i = 0; i < kRing; ++i) ptx::barrier_init(full + warp * kRing + i);
  ptx::barrier_init_done();
  const std::size_t first = std::size_t{blockIdx.x} * kCopyWarps + warp, step = std::size_t{gridDim.x} * kCopyWarps;
  const std::size_t count = first < chunks ? (chunks - first + step - 1) / step : 0;
  const auto stage = [&](std::size_t k) { return ring + (warp * kRing + k % kRing) * kChunk; };
  const auto load = [&](std::size_t k) {
    ptx::bulk_load(stage(k), src + (first + k * step) * kChunk, kChunk, full + warp * kRing + k % kRing);
  };
  for (std::size_t k = 0; k < count && k < kRing - 1; ++k) load(k);
  for (std::size_t k = 0; k < count; ++k) {
    ptx::barrier_wait(full + warp * kRing + k % kRing, static_cast<std::uint32_t>(k / kRing) & 1);
    ptx::bulk_store(a + (first + k * step) * kChunk, stage(k), kChunk);
    if (b != nullptr) ptx::bulk_store(b + (first + k * step) * kChunk, stage(k), kChunk);
    ptx::bulk_commit();
    if (k + kRing - 1 >= count) continue;
    ptx::bulk_wait_read<1>();
    load(k + kRing - 1);
  }
  ptx::bulk_wait_all();
#else
  (void)src, (void)a, (void)b, (void)chunks;
#endif
}

// The limit of combine: two loads, one sum's worth of stores.
__global__ void sum_two(const std::byte* a, const std::byte* b, std::byte* dst, std::size_t bytes) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x * 16;
  for (std::size_t at = (std::size_t{blockIdx.x} * blockDim.x + threadIdx.x) * 16; at < bytes; at += 4 * step) {
    uint4 v[4] = {}, w[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes) {
        v[i] = __ldcs(reinterpret_cast<const uint4*>(a + at + i * step));
        w[i] = __ldcs(reinterpret_cast<const uint4*>(b + at + i * step));
      }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i * step < bytes)
        __stcs(reinterpret_cast<uint4*>(dst + at + i * step),
               uint4{v[i].x ^ w[i].x, v[i].y ^ w[i].y, v[i].z ^ w[i].z, v[i].w ^ w[i].w});
  }
}

int num_gpus() {
  int count = 0;
  gpu(cudaGetDeviceCount(&count));
  return count;
}

struct Rank {
  int rank = 0, device = 0;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  std::vector<float> times;
};

std::vector<Rank> ranks;
int num_ranks = kMaxRanks;
std::barrier<>* meeting = nullptr;
void meet() { meeting->arrive_and_wait(); }

// The median over the runs of the slowest rank, in microseconds. Every rank calls it.
double timed(Rank& r, const std::function<void()>& call) {
  r.times.clear();
  for (int run = 0; run < kWarmUp + kRuns; ++run) {
    gpu(cudaStreamSynchronize(r.stream));
    meet();
    gpu(cudaEventRecord(r.begin, r.stream));
    call();
    gpu(cudaEventRecord(r.end, r.stream));
    gpu(cudaEventSynchronize(r.end));
    float ms = 0;
    gpu(cudaEventElapsedTime(&ms, r.begin, r.end));
    if (run >= kWarmUp) r.times.push_back(ms * 1000);
  }
  meet();
  std::vector<float> slowest(kRuns);
  for (int i = 0; i < kRuns; ++i)
    for (const Rank& other : ranks) slowest[i] = std::max(slowest[i], other.times[i]);
  std::nth_element(slowest.begin(), slowest.begin() + kRuns / 2, slowest.end());
  const double median = slowest[kRuns / 2];
  meet();
  return median;
}

struct Memory {
  std::byte* at = nullptr;
  explicit Memory(std::size_t bytes) { gpu(cudaMalloc(&at, bytes)); }
  ~Memory() { cudaFree(at); }
};

std::byte* landing[kMaxRanks];  // of each rank, for the limit

void bench(Rank& r, std::shared_ptr<Bootstrap> group) {
  gpu(cudaSetDevice(r.device));
  gpu(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
  gpu(cudaEventCreate(&r.begin));
  gpu(cudaEventCreate(&r.end));
  const std::size_t row_bytes = kHidden * 2, bytes = row_bytes * kTokens;
  Memory x(bytes), ids(sizeof(std::int64_t) * kTokens * kTopk), weights(4 * kTokens * kTopk), own(bytes), target(bytes);
  landing[r.rank] = target.at;
  std::mt19937 random(static_cast<unsigned>(17 + r.rank));
  std::vector<std::uint16_t> values(kTokens * kHidden);
  for (auto& v : values) v = static_cast<std::uint16_t>((random() & 0x81ff) | 0x3e00);
  std::vector<std::int64_t> selected;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<int> all(kExperts);
    for (int i = 0; i < kExperts; ++i) all[i] = i;
    for (int k = 0; k < kTopk; ++k) {
      std::swap(all[k], all[k + static_cast<int>(random() % (kExperts - k))]);
      selected.push_back(all[k]);
    }
  }
  gpu(cudaMemcpy(x.at, values.data(), bytes, cudaMemcpyHostToDevice));
  gpu(cudaMemcpy(ids.at, selected.data(), selected.size() * 8, cudaMemcpyHostToDevice));
  gpu(cudaMemset(weights.at, 0, 4 * kTokens * kTopk));
  gpu(cudaFuncSetAttribute(copy_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kCopyWarps * kRing * kChunk));
  Config config;
  config.arena_bytes = std::size_t{2} << 30;
  Options options;
  options.backend = BackendKind::kCuda;
  options.cuda_device = r.device;
  auto buffer = Buffer::open(group, config, options);
  DispatchInput input;
  input.x = TensorView(x.at, DType::kBf16, {kTokens, kHidden});
  input.topk_idx = TensorView(ids.at, DType::kI64, {kTokens, kTopk});
  input.topk_weights = TensorView(weights.at, DType::kFp32, {kTokens, kTopk});
  input.num_experts = kExperts;
  input.stream = r.stream;

  std::string json;
  for (int sms : {4, 8, 16, 24, 48, 64}) {
    // Written by each rank: its rows for itself and for the peer, as dispatch does.
    std::byte* const peer = landing[(r.rank + 1) % num_ranks];
    const double stores = timed(r, [&] { copy_by_stores<<<sms, 1024, 0, r.stream>>>(x.at, own.at, peer, bytes); });
    const double bulk = timed(r, [&] {
      copy_by_bulk<<<sms, kCopyWarps * 32, kCopyWarps * kRing * kChunk, r.stream>>>(x.at, own.at, peer, bytes / kChunk);
    });
    const double bulk_half = timed(r, [&] {
      copy_by_bulk<<<sms, kCopyWarps * 32, kCopyWarps * kRing * kChunk, r.stream>>>(x.at, own.at, peer,
                                                                                    bytes / 2 / kChunk);
    });
    const double stores_half =
        timed(r, [&] { copy_by_stores<<<sms, 1024, 0, r.stream>>>(x.at, own.at, peer, bytes / 2); });
    const double sum = timed(r, [&] { sum_two<<<sms, 1024, 0, r.stream>>>(own.at, peer, x.at + 0, bytes); });
    gpu(cudaMemcpy(x.at, values.data(), bytes, cudaMemcpyHostToDevice));
    input.num_workers = sms;
    DispatchInput cached = input;
    cached.topk_idx = {};
    cached.topk_weights = {};
    cached.num_experts = 0;
    input.fp8.reset();
    const DispatchOutput out = buffer->dispatch(input);
    cached.handle = out.handle;
    DispatchInput cached8 = cached, input8 = input;
    cached8.fp8 = input8.fp8 = Fp8Options{};
    const double bf16 = timed(r, [&] { buffer->dispatch(cached); });
    const double fp8 = timed(r, [&] { buffer->dispatch(cached8); });
    const double bf16_uncached = timed(r, [&] { buffer->dispatch(input); });
    const double fp8_uncached = timed(r, [&] { buffer->dispatch(input8); });
    CombineInput back;
    back.x = out.x;
    back.handle = out.handle;
    back.stream = r.stream;
    back.num_workers = sms;
    const double combine = timed(r, [&] { buffer->combine(back); });
    buffer->check();
    char line[640];
    std::snprintf(
        line, sizeof line,
        "%s  {\"sms\": %d, \"limit_stores_us\": %.1f, \"limit_bulk_us\": %.1f, \"limit_half_stores_us\": %.1f, "
        "\"limit_half_bulk_us\": %.1f, \"limit_sum_us\": %.1f, \"dispatch_bf16_us\": %.1f, \"dispatch_fp8_us\": "
        "%.1f, \"dispatch_bf16_uncached_us\": %.1f, \"dispatch_fp8_uncached_us\": %.1f, \"combine_bf16_us\": "
        "%.1f, \"bf16_of_limit\": %.3f, \"fp8_of_limit\": %.3f, \"combine_of_limit\": %.3f}",
        json.empty() ? "" : ",\n", sms, stores, bulk, stores_half, bulk_half, sum, bf16, fp8, bf16_uncached,
        fp8_uncached, combine, std::min(stores, bulk) / bf16, std::min(stores_half, bulk_half) / fp8, sum / combine);
    json += line;
    if (r.rank == 0) std::fprintf(stderr, "%s\n", line);
  }
  if (r.rank == 0) {
    cudaDeviceProp info;
    gpu(cudaGetDeviceProperties(&info, r.device));
    std::printf(
        "{\"gpu\": \"%s\", \"gpus\": %d, \"ranks\": %d, \"tokens\": %d, \"hidden\": %d, \"topk\": %d, \"experts\": %d, "
        "\"median_of\": %d,\n \"runs\": [\n%s\n ]}\n",
        info.name, std::min(num_gpus(), num_ranks), num_ranks, kTokens, kHidden, kTopk, kExperts, kRuns, json.c_str());
  }
  meet();
}

}  // namespace

// An argument of 1 makes a world of one rank, for a profiler that runs kernels one by one.
int main(int argc, char** argv) {
  if (argc > 1) num_ranks = std::clamp(std::atoi(argv[1]), 1, kMaxRanks);
  std::barrier<> barrier(num_ranks);
  meeting = &barrier;
  const int gpus = num_gpus();
  for (int rank = 0; rank < num_ranks; ++rank) {
    ranks.emplace_back();
    ranks.back().rank = rank;
    ranks.back().device = rank % gpus;
  }
  if (gpus > 1 && num_ranks > 1)
    for (int rank = 0; rank < num_ranks; ++rank) {
      gpu(cudaSetDevice(rank));
      gpu(cudaDeviceEnablePeerAccess(1 - rank, 0));
    }
  auto groups = deep_ep::in_process_group(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank)
    threads.emplace_back([&, rank] {
      try {
        bench(ranks[rank], groups[rank]);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        std::exit(1);
      }
    });
  for (auto& thread : threads) thread.join();
  return 0;
}
