// SPDX-License-Identifier: MIT
// The example programs as a user starts them: what they print, write and return.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

namespace {

struct Ended {
  int status = -1;
  std::string output;  // stdout and stderr
};

Ended shell(const std::string& command) {
  Ended run;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return run;
  char part[4096];
  for (std::size_t bytes = 0; (bytes = fread(part, 1, sizeof(part), pipe)) > 0;) run.output.append(part, bytes);
  const int status = pclose(pipe);
  run.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return run;
}

Ended start(const std::string& arguments) { return shell(std::string(EP_EXAMPLE_PROGRAMS) + "/" + arguments); }

/// Runs the demo in small, its files in a folder of the test's own.
class Demo : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "deep_ep_demo_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    out_ = pattern;
    std::string lines;
    for (int i = 0; i < 40; ++i)
      lines += fmt::format("line {} of a text of {} words, read by token {}\n", i, 11, 7 * i);
    text_ = text_file("text.txt", lines);
  }
  void TearDown() override { std::filesystem::remove_all(out_); }

  std::string sizes() const { return " --tokens 32 --hidden 128 --inter 64 --repeat 2 --out " + out_.string(); }
  /// A short text, because a vocabulary takes longer to learn from the machine's own texts than all the rest.
  std::string arguments(const std::string& more = "") const { return sizes() + " --text " + text_ + " " + more; }
  Ended run(const std::string& more = "") { return start("moe_layer" + arguments(more)); }
  /// The same program, whose library errs by one bit in that call.
  Ended run_wrong(const std::string& call) {
    return shell("EP_TEST_WRONG=" + call + " " + EP_TEST_PROGRAMS + "/wrong_bit_main" + arguments());
  }
  std::string content(const char* file) const {
    std::ifstream in(out_ / file);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  std::string text_file(const char* name, const std::string& text) {
    std::ofstream(out_ / name) << text;
    return (out_ / name).string();
  }

  std::filesystem::path out_;
  std::string text_;
};

TEST_F(Demo, passes_on_the_machines_own_texts_and_writes_picture_and_report) {
  const Ended demo = start("moe_layer" + sizes());
  ASSERT_EQ(demo.status, 0) << demo.output;
  EXPECT_EQ(content("traffic.svg").substr(0, 4), "<svg");
  const auto report = nlohmann::json::parse(content("report.json"));
  EXPECT_TRUE(report["verdict"]["passed"]);
  EXPECT_GT(report["verdict"]["bf16"]["values_compared"], 0);
  EXPECT_EQ(report["verdict"]["bf16"]["values_that_differ"], 0);
  EXPECT_GT(report["verdict"]["fp8"]["relative_l2_error"], 0);
}

TEST_F(Demo, fails_where_a_single_bit_is_wrong) {
  const Ended right = run_wrong("nowhere");
  EXPECT_EQ(right.status, 0) << right.output;
  const Ended demo = run_wrong("combine");
  EXPECT_EQ(demo.status, 1) << demo.output;
  const auto report = nlohmann::json::parse(content("report.json"));
  EXPECT_FALSE(report["verdict"]["passed"]);
  EXPECT_EQ(report["verdict"]["bf16"]["values_that_differ"], 1);
}

TEST_F(Demo, fails_where_a_single_fp8_code_is_wrong) {
  const Ended demo = run_wrong("dispatch");
  EXPECT_EQ(demo.status, 1) << demo.output;
  const auto report = nlohmann::json::parse(content("report.json"));
  EXPECT_FALSE(report["verdict"]["passed"]);
  EXPECT_EQ(report["verdict"]["bf16"]["values_that_differ"], 0);
}

TEST_F(Demo, reports_figures_that_agree_with_one_another) {
  const Ended demo = run();
  ASSERT_EQ(demo.status, 0) << demo.output;
  const auto report = nlohmann::json::parse(content("report.json"));
  const auto sum = [](const std::vector<std::int64_t>& values) {
    return std::accumulate(values.begin(), values.end(), std::int64_t{0});
  };
  const std::int64_t tokens = sum(report["tokens_per_rank"]);
  const std::int64_t selections = tokens * report["settings"]["topk"].get<int>();
  EXPECT_EQ(sum(report["expert_rows"]), selections);
  EXPECT_EQ(sum(report["rows_per_rank"]), selections);
  std::int64_t sent = 0;
  for (const auto& row : report["dispatch_tokens_between_ranks"]) sent += sum(row);
  EXPECT_NEAR(static_cast<double>(sent) / static_cast<double>(tokens),
              report["reach"]["group_limited"]["ranks_per_token"], 1e-9);
  EXPECT_EQ(report["phases"]["dispatch BF16"]["bytes"], sent * report["row_bytes"]["bf16"].get<std::int64_t>());
  EXPECT_LE(report["reach"]["group_limited"]["ranks_per_token"],
            4);  // a group is a rank here, and 4 groups are the limit
}

TEST_F(Demo, keeps_tokens_on_one_node_where_a_group_is_a_node) {
  const Ended demo = run("--groups 2 --topk-groups 1");
  ASSERT_EQ(demo.status, 0) << demo.output;
  const auto report = nlohmann::json::parse(content("report.json"));
  EXPECT_EQ(report["reach"]["group_limited"]["nodes_per_token"], 1);
  EXPECT_GT(report["reach"]["without_limit"]["nodes_per_token"], 1);
}

TEST_F(Demo, takes_other_worlds_and_uneven_nodes) {
  for (const char* world :
       {"--ranks 1", "--ranks 3 --ranks-per-node 2", "--ranks 5 --experts 24 --groups 3 --topk-groups 2"}) {
    const Ended demo = run(world);
    EXPECT_EQ(demo.status, 0) << world << "\n" << demo.output;
  }
}

TEST_F(Demo, takes_a_text_too_short_for_every_rank) {
  const Ended demo = start("moe_layer" + sizes() + " --text " + text_file("short.txt", "one line\n"));
  EXPECT_EQ(demo.status, 0) << demo.output;
}

TEST_F(Demo, refuses_a_text_of_white_space) {
  const Ended demo = start("moe_layer" + sizes() + " --text " + text_file("white.txt", " \n\n \n"));
  EXPECT_NE(demo.status, 0);
  EXPECT_NE(demo.output.find("white space"), std::string::npos) << demo.output;
}

TEST_F(Demo, refuses_sizes_that_contradict_each_other) {
  const Ended demo = run("--topk 40");
  EXPECT_NE(demo.status, 0);
  EXPECT_NE(demo.output.find("--topk 40 exceeds the 32 experts"), std::string::npos) << demo.output;
}

TEST_F(Demo, reports_a_rank_that_dies_and_ends) {
  const Ended demo = run("--fail-rank 3");
  EXPECT_EQ(demo.status, 1);
  EXPECT_NE(demo.output.find("rank 3 (process"), std::string::npos) << demo.output;
  EXPECT_NE(demo.output.find("signal 9"), std::string::npos) << demo.output;
  EXPECT_FALSE(std::filesystem::exists(out_ / "report.json"));
}

TEST(FirstProgram, prints_what_both_experts_made_of_each_token) {
  const Ended program = start("01_two_ranks");
  ASSERT_EQ(program.status, 0) << program.output;
  for (const char* line : {"token 0:  1 -> 10", "token 1:  2 -> 200", "token 2:  3 -> 330", "token 3: 14 -> 1540"}) {
    EXPECT_NE(program.output.find(line), std::string::npos) << line << "\n" << program.output;
  }
}

}  // namespace
