// SPDX-License-Identifier: MIT
// A first program: two ranks, threads of one process, exchange tokens. Each rank has four tokens and hosts one expert.
// "Expert 0" multiplies by 10, "expert 1" by 100; every token chooses one of them or both.
#include <deep_ep/buffer.h>
#include <fmt/format.h>

#include <algorithm>
#include <mutex>
#include <thread>
#include <vector>

constexpr int kTokens = 4;
constexpr int kHidden = 4;  // a row must be a multiple of 16 bytes: four FP32 numbers
constexpr int kTopK = 2;

void run_rank(const std::shared_ptr<deep_ep::Bootstrap>& group) {
  using deep_ep::DType;
  const int rank = group->rank();
  const auto buffer = deep_ep::Buffer::open(group);  // collective: returns when both ranks are there

  // Token t of rank r holds 10 r + t + 1 in every channel.
  std::vector<float> x(kTokens * kHidden);
  for (int t = 0; t < kTokens; ++t) std::fill_n(&x[t * kHidden], kHidden, static_cast<float>(10 * rank + t + 1));
  const std::vector<int> experts = {0, -1, 1, -1, 0, 1, 1, 0};  // [token][selection]; -1: no selection

  // Every token goes once to each rank that hosts an expert it chose.
  deep_ep::DispatchInput send;
  send.x = {x.data(), DType::kFp32, {kTokens, kHidden}};
  send.topk_idx = {experts.data(), DType::kI32, {kTokens, kTopK}};
  send.num_experts = 2;
  const deep_ep::DispatchOutput received = buffer->dispatch(send);

  // The expert that lives here, on the rows that came. Buffer memory lets the other rank read the result in place.
  const deep_ep::Tensor rows = buffer->allocate(DType::kFp32, {received.x.size(0), kHidden});
  for (std::int64_t i = 0; i < rows.numel(); ++i) {
    rows.as<float>()[i] = received.x.as<float>()[i] * (rank == 0 ? 10.0F : 100.0F);
  }

  // The rows go home and are added up there.
  deep_ep::CombineInput bring_home;
  bring_home.x = rows;
  bring_home.handle = received.handle;
  const deep_ep::CombineOutput result = buffer->combine(bring_home);

  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  fmt::print("rank {}: expert {} got {} rows\n", rank, rank, received.x.size(0));
  for (int t = 0; t < kTokens; ++t) {
    fmt::print("  token {}: {:>2} -> {}\n", t, x[t * kHidden], result.x.as<float>()[t * kHidden]);
  }
}

int main() {
  std::vector<std::thread> ranks;
  for (auto& group : deep_ep::in_process_group(2)) ranks.emplace_back(run_rank, group);
  for (std::thread& rank : ranks) rank.join();
}
