// SPDX-License-Identifier: MIT
// What the benchmarks exchange: the same numbers as bench/python_workload.py has, which
// tests/python/test_bench_workload.py compares with the same file. Results of the two can be compared only as long as
// they make the same exchange.
#include "bench/workload.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "bench/digest.h"

namespace deep_ep::bench {
namespace {

nlohmann::json golden() { return nlohmann::json::parse(std::ifstream(EP_GOLDEN_WORKLOAD)); }

Workload workload_of(const nlohmann::json& golden) {
  Workload work;
  work.num_ranks = golden["ranks"];
  work.num_tokens = golden["tokens"];
  work.num_ll_tokens = golden["ll_tokens"];
  work.hidden = golden["hidden"];
  work.num_topk = golden["topk"];
  work.num_experts = golden["experts"];
  work.seed = golden["seed"];
  return work;
}

TEST(Workload, routes_tokens_as_python_does) {
  const nlohmann::json wanted = golden();
  const Workload work = workload_of(wanted["workload"]);
  for (int rank = 0; rank < work.num_ranks; ++rank) {
    const Routing routing = make_routing(work, rank, work.num_tokens);
    std::vector<std::int32_t> weight_bits;
    for (const float weight : routing.topk_weights) weight_bits.push_back(std::bit_cast<std::int32_t>(weight));
    EXPECT_EQ(nlohmann::json(routing.topk_idx), wanted["ranks"][rank]["topk_idx"]) << "rank " << rank;
    EXPECT_EQ(nlohmann::json(weight_bits), wanted["ranks"][rank]["weight_bits"]) << "rank " << rank;
  }
}

TEST(Workload, fills_rows_and_takes_digests_as_python_does) {
  const nlohmann::json wanted = golden();
  const Workload work = workload_of(wanted["workload"]);
  const auto row_bytes = static_cast<std::size_t>(work.row_bytes());
  for (int rank = 0; rank < work.num_ranks; ++rank) {
    std::vector<std::uint16_t> rows(static_cast<std::size_t>(work.num_tokens * work.hidden));
    fill_rows(work, rank, work.num_tokens, rows.data());
    Digest all, of_slot_1;
    for (int row = 0; row < work.num_tokens; ++row) all.add(rows.data() + row * work.hidden, row_bytes);
    for (int row = 0; row < work.num_ll_tokens; ++row) of_slot_1.add(rows.data() + row * work.hidden, row_bytes, 1);
    rows.resize(4);
    EXPECT_EQ(nlohmann::json(rows), wanted["ranks"][rank]["first_row_bits"]) << "rank " << rank;
    EXPECT_EQ(nlohmann::json(all.value()), wanted["ranks"][rank]["digest"]) << "rank " << rank;
    EXPECT_EQ(nlohmann::json(of_slot_1.value()), wanted["ranks"][rank]["digest_of_slot_1"]) << "rank " << rank;
  }
}

}  // namespace
}  // namespace deep_ep::bench
