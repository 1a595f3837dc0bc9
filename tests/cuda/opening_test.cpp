// SPDX-License-Identifier: MIT
// What the first calls of a buffer find: everything that could make them wait for a GPU on which other ranks' kernels
// already wait for them was done when it opened.
#include <spawn.h>
#include <sys/wait.h>

#include <cstdlib>

#include "cuda/exchanges.h"
#include "exchange.h"

extern char** environ;

namespace deep_ep::test {
namespace {

constexpr int kRanks = 4;

int number_of(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr ? std::atoi(value) : otherwise;
}

// A kind of first call for each buffer in turn.
Shape shape_of(int turn) {
  Shape s;
  s.hidden = 256;
  s.layout = turn % 2 == 0 ? OutputLayout::kByRank : OutputLayout::kByExpert;
  s.dtype = turn / 2 % 3 == 0 ? DType::kBf16 : turn / 2 % 3 == 1 ? DType::kFp16 : DType::kFp32;
  return s;
}

// Ranks come as they like, some late.
TEST(CudaOpening, buffers_one_after_another_make_their_first_calls_at_once) {
  EP_NEEDS_GPU();
  constexpr int kKinds = 6, kTokens = 40;
  Config config = small_config();
  config.timeout = 10s;
  std::vector<std::vector<Digests>> want(kKinds, std::vector<Digests>(kRanks)), got = want;
  const auto exchange = [&](Buffer& buffer, int turn, bool on_gpu, std::vector<std::vector<Digests>>& keep) {
    const Shape shape = shape_of(turn);
    Random random(static_cast<std::uint64_t>(buffer.rank() + 1));
    const Sample sample(shape, random, kTokens);
    const Placed placed(sample, on_gpu);
    if (on_gpu && turn % 3 == 1 && buffer.rank() == turn / 3 % kRanks) std::this_thread::sleep_for(5ms);
    const DispatchOutput sent = buffer.dispatch(dispatch_of(shape, placed, 0, nullptr));
    const CombineOutput home =
        buffer.combine(combine_of(shape, placed, sent.x, sent.handle, SumOrder::by_rank(), nullptr));
    keep[turn % kKinds][buffer.rank()] = digests_of(sent, home, kRanks);
  };
  for (int turn = 0; turn < kKinds; ++turn)
    run_ranks(kRanks, config, Options{.num_workers = 1}, [&](Buffer& b) { exchange(b, turn, false, want); });
  const int buffers = number_of("EP_TEST_BUFFERS", 30);
  for (int turn = 0; turn < buffers; ++turn) {
    ASSERT_NO_THROW(run_ranks(kRanks, config, on_gpu(), [&](Buffer& b) { exchange(b, turn, true, got); }))
        << "buffer " << turn;
    ASSERT_EQ(got[turn % kKinds], want[turn % kKinds]) << "buffer " << turn;
  }
}

// Every kind of kernel for the first time in this process, while the other rank's first one waits for it.
void make_every_kind_of_call_one_rank_late(const char* network) {
  const auto late = [](AnyBuffer& buffer) {
    if (buffer.rank() == 1) std::this_thread::sleep_for(30ms);
  };
  for (const bool low_latency : {false, true})
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32})
      for (const bool fp8 : {false, true}) {
        Shape s;
        s.ranks = 2;
        if (network != nullptr) s.ranks_per_node = {1, 1}, s.network = network;
        s.dtype = dtype;
        s.hidden = 256;
        s.low_latency = low_latency;
        if (fp8) s.fp8 = Fp8Options{};
        const World world(s);
        const Homeward home = homeward(world, {.dtype = dtype, .hidden = 256});
        run_ranks(2, world.config(), [&](AnyBuffer& buffer) {
          const int rank = buffer.rank();
          late(buffer);
          const DispatchOutput sent = dispatch(buffer, world.input(rank), low_latency);
          EXPECT_EQ(difference(world, rank, sent), "") << s.to_string();
          for (const SumOrder& order : {SumOrder::by_rank(), SumOrder::by_rank_and_node()})
            for (const WireFormat wire : {WireFormat::kAsIs, WireFormat::kFp8, WireFormat::kLogFmt10}) {
              if (wire != WireFormat::kAsIs && (!low_latency || dtype == DType::kFp32)) continue;
              CombineInput back = combine_input(home, rank, sent.handle, order);
              back.wire = wire;
              late(buffer);
              (void)combine(buffer, back, low_latency);
            }
        });
      }
}

// This program again, where nothing is loaded before it is needed: as a user's process is, unless told otherwise.
int run_lazily(const std::string& test) {
  std::vector<std::string> words = {"CUDA_MODULE_LOADING=LAZY", "EP_TEST_BACKEND=cuda", "EP_TEST_LAZY=1"};
  for (char** word = environ; *word != nullptr; ++word) {
    const std::string text = *word;
    const auto names = [&](const char* name) { return text.starts_with(std::string(name) + "="); };
    if (!names("CUDA_MODULE_LOADING") && !names("EP_TEST_BACKEND") && !names("EP_TEST_LAZY")) words.push_back(text);
  }
  std::vector<char*> environment;
  for (std::string& word : words) environment.push_back(word.data());
  environment.push_back(nullptr);
  std::string program = "/proc/self/exe", filter = "--gtest_filter=" + test;
  char* arguments[] = {program.data(), filter.data(), nullptr};
  pid_t child = 0;
  if (posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, arguments, environment.data()) != 0) return -1;
  int status = 0;
  if (waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

class CudaLazyOpening : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Networks, CudaLazyOpening, testing::Values("none", "loopback"));

TEST_P(CudaLazyOpening, has_every_kernel_before_the_first_call) {
  EP_NEEDS_GPU();
  if (std::getenv("EP_TEST_LAZY") == nullptr) {
    const auto* const me = testing::UnitTest::GetInstance()->current_test_info();
    EXPECT_EQ(run_lazily(std::string(me->test_suite_name()) + "." + me->name()), 0);
    return;
  }
  const std::string network = GetParam();
  make_every_kind_of_call_one_rank_late(network == "none" ? nullptr : GetParam());
}

}  // namespace
}  // namespace deep_ep::test
