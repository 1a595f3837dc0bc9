// SPDX-License-Identifier: MIT
// Only those who know the secret meet; and names whose server does not answer do not hold anybody up.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "bootstrap/groups.h"
#include "bootstrap/proof.h"
#include "bootstrap/socket.h"

namespace deep_ep::test {
namespace {

TcpRendezvous with_secret(int port, int rank, int num_ranks, const std::string& secret) {
  TcpRendezvous where = rendezvous(port, rank, num_ranks);
  where.secret = secret;
  return where;
}

TEST(Secret, the_proof_is_hmac_sha256) {
  // RFC 4231, test case 2.
  const std::string key = "Jefe", message = "what do ya want for nothing?";
  const auto proof = bootstrap::hmac_sha256(key, std::as_bytes(std::span(message.data(), message.size())));
  std::string text;
  char digits[3];
  for (const std::byte b : proof) {
    std::snprintf(digits, sizeof digits, "%02x", std::to_integer<unsigned>(b));
    text += digits;
  }
  EXPECT_EQ(text, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(Secret, proofs_differ_by_side_claim_challenge_and_secret) {
  using namespace bootstrap;
  const std::vector<std::byte> claim(20, std::byte{1}), other_claim(20, std::byte{2});
  const Nonce one = random_nonce(), two = random_nonce();
  EXPECT_NE(one, two);
  const Proof proof = prove(ProofOf::kJoiningRank, "secret", claim, one);
  EXPECT_TRUE(is_same(proof, prove(ProofOf::kJoiningRank, "secret", claim, one)));
  EXPECT_FALSE(is_same(proof, prove(ProofOf::kRank0, "secret", claim, one)));
  EXPECT_FALSE(is_same(proof, prove(ProofOf::kJoiningRank, "secret", other_claim, one)));
  EXPECT_FALSE(is_same(proof, prove(ProofOf::kJoiningRank, "secret", claim, two)));
  EXPECT_FALSE(is_same(proof, prove(ProofOf::kJoiningRank, "Secret", claim, one)));
  EXPECT_FALSE(is_same(proof, std::span(proof).first(31)));
}

TEST(Secret, ranks_that_know_it_meet) {
  const int port = free_port();
  expect_no_error(run_threads(4, [&](int rank) {
    const auto group = tcp_group(with_secret(port, rank, 4, "open sesame"));
    EXPECT_EQ(group->all_gather(blob_of(rank, 1), kLong), blobs_of(4, 1));
  }));
}

TEST(Secret, one_that_does_not_know_it_is_refused_and_the_group_meets_without_it) {
  const int port = free_port();
  Caught wrong, none;
  expect_no_error(run_threads(3, [&](int rank) {
    if (rank == 2) {
      // Both come before the one who may take this place.
      wrong = catch_error([&] { tcp_group(with_secret(port, 2, 3, "open barley")); });
      none = catch_error([&] { tcp_group(with_secret(port, 2, 3, "")); });
    }
    const auto group = tcp_group(with_secret(port, rank, 3, "open sesame"));
    EXPECT_EQ(group->all_gather(blob_of(rank, 1), kLong), blobs_of(3, 1));
  }));
  expect_error(wrong, ErrorCode::kInvalidArgument, "secret: its answer is wrong");
  expect_error(none, ErrorCode::kInvalidArgument, "secret: rank 0 asks for one, rank 2 has none");
}

TEST(Secret, a_rank_0_that_does_not_know_it_is_left) {
  const int port = free_port();
  const auto caught = run_threads(2, [&](int rank) {
    const auto group = tcp_group(with_secret(port, rank, 2, rank == 0 ? "" : "open sesame"));
    group->all_gather(blob_of(rank, 1), kLong);
  });
  expect_error(caught[1], ErrorCode::kInvalidArgument, "secret: rank 0 does not know it, or has none");
  EXPECT_EQ(caught[0].code, ErrorCode::kSystem);  // rank 1 has left
}

TEST(Secret, it_is_read_from_the_environment_or_a_file_but_not_both) {
  const std::string path = ::testing::TempDir() + "/secret_of_secret_test";
  std::ofstream(path) << "from a file\n";
  setenv("EP_RENDEZVOUS_SECRET_FILE", path.c_str(), 1);
  EXPECT_EQ(TcpRendezvous::from_environment().secret, "from a file");
  setenv("EP_RENDEZVOUS_SECRET", "spoken", 1);
  expect_error(catch_error([] { TcpRendezvous::from_environment(); }), ErrorCode::kInvalidArgument, "both are set");
  unsetenv("EP_RENDEZVOUS_SECRET_FILE");
  EXPECT_EQ(TcpRendezvous::from_environment().secret, "spoken");
  unsetenv("EP_RENDEZVOUS_SECRET");
  EXPECT_EQ(TcpRendezvous::from_environment().secret, "");
  std::ofstream(path, std::ios::trunc);
  setenv("EP_RENDEZVOUS_SECRET_FILE", path.c_str(), 1);
  expect_error(catch_error([] { TcpRendezvous::from_environment(); }), ErrorCode::kInvalidArgument, "or is empty");
  unsetenv("EP_RENDEZVOUS_SECRET_FILE");
  std::remove(path.c_str());
}

int no_answer(const char*, const char*, const addrinfo*, addrinfo**) {
  std::this_thread::sleep_for(300ms);
  return EAI_AGAIN;
}

TEST(Resolve, a_silent_name_server_ends_at_the_deadline_and_numbers_need_none) {
  using namespace bootstrap;
  std::string failure;
  EXPECT_TRUE(resolve("node7.cluster", 1, Deadline(30ms), failure, &no_answer).empty());
  EXPECT_EQ(failure, "getaddrinfo 'node7.cluster': the name server did not answer in time");
  EXPECT_EQ(resolve("127.0.0.1", 1, Deadline(0ms), failure, &no_answer).size(), 1u);
  EXPECT_EQ(resolve("::1", 1, Deadline(0ms), failure, &no_answer).size(), 1u);
  // Its thread may still sleep when the program ends, which it may.
}

}  // namespace
}  // namespace deep_ep::test
