// SPDX-License-Identifier: MIT
// One rank of a group of processes on the GPUs of this machine: MASTER_ADDR, RANK and WORLD_SIZE say which. Dispatches,
// combines, and checks that a token comes home multiplied by the number of ranks it went to.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "deep_ep/buffer.h"

using namespace deep_ep;

int main() {
  try {
    const TcpRendezvous where = TcpRendezvous::from_environment();
    int gpus = 0;
    if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) return 77;
    Config config;
    config.arena_bytes = std::size_t{256} << 20;
    Options options;
    options.backend = BackendKind::kCuda;
    options.cuda_device = where.rank % gpus;
    auto buffer = Buffer::open(tcp_group(where), config, options);
    constexpr int kTokens = 128, kHidden = 1024, kTopk = 2, kExperts = 8;
    std::vector<float> x(kTokens * kHidden);
    std::vector<std::int32_t> ids;
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 1000 + where.rank);
    for (int t = 0; t < kTokens; ++t) ids.insert(ids.end(), {t % kExperts, (t * 3 + 1) % kExperts});
    float* device_x = nullptr;
    std::int32_t* device_ids = nullptr;
    cudaMalloc(&device_x, x.size() * 4);
    cudaMalloc(&device_ids, ids.size() * 4);
    cudaMemcpy(device_x, x.data(), x.size() * 4, cudaMemcpyHostToDevice);
    cudaMemcpy(device_ids, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice);
    DispatchInput input;
    input.x = TensorView(device_x, DType::kFp32, {kTokens, kHidden});
    input.topk_idx = TensorView(device_ids, DType::kI32, {kTokens, kTopk});
    input.num_experts = kExperts;
    int wrong = 0;
    for (int round = 0; round < 5; ++round) {
      const DispatchOutput out = buffer->dispatch(input);
      CombineInput back;
      back.x = out.x;
      back.handle = out.handle;
      const CombineOutput home = buffer->combine(back);
      std::vector<float> sums(x.size());
      std::vector<std::int32_t> ranks(ids.size());
      cudaMemcpy(sums.data(), home.x.data, sums.size() * 4, cudaMemcpyDeviceToHost);
      cudaMemcpy(ranks.data(), out.handle->dst_rank.data, ranks.size() * 4, cudaMemcpyDeviceToHost);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const std::size_t token = i / kHidden;
        wrong += sums[i] != x[i] * (ranks[2 * token] == ranks[2 * token + 1] ? 1 : 2);
      }
    }
    std::printf("rank %d of %d on GPU %d: %d wrong values\n", where.rank, where.num_ranks, options.cuda_device, wrong);
    return wrong == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
