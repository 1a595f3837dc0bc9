// SPDX-License-Identifier: MIT
// What the gate lets in, and what it refuses and counts.
#include "net/wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>

#include "net/fabric_ends.h"
#include "net/loopback.h"

namespace deep_ep::net {
namespace {

using ::testing::HasSubstr;

constexpr std::uint64_t kJob = 0x1234'5678'9abc'def0;

Blob payload_of(const std::string& text) {
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

TEST(wire, a_message_comes_through_whole_and_once) {
  Gate sender(kJob, 1, 4), receiver(kJob, 2, 4);
  const Blob payload = payload_of("seventeen bytes..");
  const Blob wire = sender.seal(2, 9, payload);
  receiver.set_epoch(8);
  const auto opened = receiver.open(wire);
  ASSERT_TRUE(opened);
  EXPECT_EQ(opened->source, 1);
  EXPECT_EQ(opened->epoch, 9u);
  EXPECT_TRUE(std::equal(opened->payload.begin(), opened->payload.end(), payload.begin(), payload.end()));
  EXPECT_FALSE(receiver.open(wire));
  EXPECT_EQ(receiver.duplicates(), 1u);
  EXPECT_EQ(receiver.refused(), 0u);
}

TEST(wire, a_message_with_any_damaged_byte_or_a_wrong_length_is_refused) {
  Gate sender(kJob, 1, 4), receiver(kJob, 2, 4);
  const Blob wire = sender.seal(2, 0, payload_of("payload"));
  std::uint64_t refused = 0;
  for (std::size_t i = 0; i < wire.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      Blob damaged = wire;
      damaged[i] ^= std::byte{1} << bit;
      EXPECT_FALSE(receiver.open(damaged)) << "bit " << bit << " of byte " << i;
      EXPECT_EQ(receiver.refused(), ++refused);
    }
  }
  for (std::size_t bytes = 0; bytes < wire.size(); ++bytes) {
    EXPECT_FALSE(receiver.open(std::span(wire).first(bytes)));
    EXPECT_EQ(receiver.refused(), ++refused);
  }
  Blob longer = wire;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(receiver.open(longer));
  EXPECT_TRUE(receiver.open(wire));
}

TEST(wire, a_message_of_another_job_for_another_rank_or_of_a_distant_epoch_is_refused) {
  Gate receiver(kJob, 2, 4);
  EXPECT_FALSE(receiver.open(Gate(kJob + 1, 1, 4).seal(2, 0, {})));
  EXPECT_THAT(receiver.last_refusal(), HasSubstr("another job"));
  EXPECT_FALSE(receiver.open(Gate(kJob, 1, 4).seal(3, 0, {})));
  EXPECT_THAT(receiver.last_refusal(), HasSubstr("from 1 to 3 at rank 2"));
  EXPECT_FALSE(receiver.open(Gate(kJob, 5, 6).seal(2, 0, {})));
  EXPECT_THAT(receiver.last_refusal(), HasSubstr("from 5 to 2"));
  EXPECT_FALSE(receiver.open(Gate(kJob, 1, 4).seal(2, kEpochReach + 1, {})));
  EXPECT_THAT(receiver.last_refusal(), HasSubstr("epoch 101 (here: 0)"));
  EXPECT_EQ(receiver.refused(), 4u);
}

class NoticeWidth : public ::testing::TestWithParam<std::size_t> {};

TEST_P(NoticeWidth, notices_of_near_epochs_come_through_and_others_do_not) {
  Gate sender(kJob, 3, 4), receiver(kJob, 1, 4);
  for (const std::uint32_t here : {0u, 5u, 255u, 256u, 65535u, 70000u, 0xffff'fff0u}) {
    receiver.set_epoch(here);
    for (const int offset : {-100, -99, -1, 0, 1, 16, 100}) {
      const Notice notice{static_cast<std::uint8_t>(offset & 15), here + static_cast<std::uint32_t>(offset)};
      const auto opened = receiver.open(sender.seal(1, notice, GetParam()), GetParam());
      ASSERT_TRUE(opened) << receiver.last_refusal();
      EXPECT_EQ(opened->source, 3);
      EXPECT_EQ(opened->notice.channel, notice.channel);
      EXPECT_EQ(opened->notice.epoch, notice.epoch);
    }
    for (const int offset : {-101, 101, 127})
      EXPECT_FALSE(
          receiver.open(sender.seal(1, {0, here + static_cast<std::uint32_t>(offset)}, GetParam()), GetParam()));
  }
}

TEST_P(NoticeWidth, random_words_hardly_ever_pass) {
  Gate receiver(kJob, 1, 4);
  std::mt19937_64 random(5);
  constexpr int kWords = 100000;
  int passed = 0;
  for (int i = 0; i < kWords; ++i) {
    const std::uint64_t word = GetParam() == 8 ? random() : random() & 0xffff'ffff;
    passed += receiver.open(word, GetParam()).has_value();
  }
  // Sources 4 of 2^12 and the check 2^-8 in the narrow form: about one in 300 000.
  EXPECT_LE(passed, 4);
  EXPECT_EQ(receiver.refused(), static_cast<std::uint64_t>(kWords - passed));
}

INSTANTIATE_TEST_SUITE_P(Widths, NoticeWidth, ::testing::Values(4, 8));

TEST(wire, numbers_of_a_sequence_are_taken_once_in_any_order) {
  SequenceWindow window;
  EXPECT_FALSE(window.take(0));
  for (const std::uint64_t sequence : {5, 1, 3, 2, 4}) EXPECT_TRUE(window.take(sequence));
  for (const std::uint64_t sequence : {5, 1, 3, 2, 4}) EXPECT_FALSE(window.take(sequence));
  const std::uint64_t far = 10 * SequenceWindow::kReach;
  EXPECT_TRUE(window.take(far));
  EXPECT_FALSE(window.take(6));  // older than the window reaches: counts as seen
  EXPECT_TRUE(window.take(far - SequenceWindow::kReach + 1));
  EXPECT_FALSE(window.take(far - SequenceWindow::kReach));
  EXPECT_FALSE(window.take(far));
}

TEST(wire, strangers_on_the_network_are_refused_and_counted_and_the_rest_goes_on) {
  const auto network = LoopbackNetwork::create(2, {}, kJob);
  std::vector<End> ends;
  for (int rank = 0; rank < 2; ++rank) ends.emplace_back(network->open(rank), 64);
  connect_all(ends);
  network->inject_message(1, payload_of("GET / HTTP/1.1\r\n\r\n"));
  network->inject_message(1, Gate(kJob ^ 1, 0, 2).seal(1, 0, payload_of("let me in")));
  network->inject_notice(1, 0x0000'0000'0000'0000);
  network->inject_notice(1, Gate(kJob ^ 1, 0, 2).seal(1, Notice{0, 0}, 8));
  ASSERT_TRUE(ends[0].fabric->message({1, 0, payload_of("hello")}));
  ASSERT_TRUE(turn_until(ends, [&] { return ends[1].messages == 1; }));
  turn(ends, 5);
  EXPECT_EQ(ends[1].messages, 1);
  EXPECT_EQ(ends[1].arrivals.count(0, {0, 0}), 0u);
  EXPECT_EQ(ends[1].fabric->counters().refused, 4u);
}

}  // namespace
}  // namespace deep_ep::net
