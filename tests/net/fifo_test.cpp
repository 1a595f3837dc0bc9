// SPDX-License-Identifier: MIT
// The queue between workers and the proxy: every command comes once, whole, and after what its producer wrote.
#include "net/fifo.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace deep_ep::net {
namespace {

TEST(fifo, commands_survive_packing_at_their_limits) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 1000; ++i) {
    Command command;
    const auto below = [&](std::uint64_t limit) { return i == 0 ? 0 : i == 1 ? limit - 1 : random() % limit; };
    command.peer = static_cast<int>(below(Command::kMaxPeers));
    command.region = static_cast<int>(below(Command::kMaxRegions));
    command.remote_region = static_cast<int>(below(Command::kMaxRegions));
    command.channel = static_cast<int>(below(16));
    command.epoch = static_cast<std::uint32_t>(below(std::uint64_t{1} << 32));
    command.at = below(std::uint64_t{1} << 32) * Command::kUnit;
    command.remote_at = below(std::uint64_t{1} << 32) * Command::kUnit;
    command.bytes = below(std::uint64_t{1} << 24) * Command::kUnit;
    for (const bool lap : {false, true}) {
      const PackedCommand packed = PackedCommand::of(command, lap);
      EXPECT_EQ(packed.lap(), lap);
      for (const int distance : {-127, 0, 127}) {
        const Command back = packed.unpack(command.epoch + static_cast<std::uint32_t>(distance));
        EXPECT_EQ(back.peer, command.peer);
        EXPECT_EQ(back.region, command.region);
        EXPECT_EQ(back.remote_region, command.remote_region);
        EXPECT_EQ(back.channel, command.channel);
        EXPECT_EQ(back.epoch, command.epoch);
        EXPECT_EQ(back.at, command.at);
        EXPECT_EQ(back.remote_at, command.remote_at);
        EXPECT_EQ(back.bytes, command.bytes);
      }
    }
  }
}

TEST(fifo, signals_survive_packing_at_their_limits) {
  std::mt19937_64 random(5);
  for (int i = 0; i < 1000; ++i) {
    Signal signal;
    const auto below = [&](std::uint64_t limit) { return i == 0 ? 0 : i == 1 ? limit - 1 : random() % limit; };
    signal.peer = static_cast<int>(below(Command::kMaxPeers));
    signal.flag = static_cast<int>(below(16));
    signal.epoch = static_cast<std::uint32_t>(below(std::uint64_t{1} << 32));
    signal.value = static_cast<std::uint32_t>(below(std::uint64_t{1} << 32));
    signal.puts = static_cast<std::uint32_t>(below(std::uint64_t{1} << 32));
    signal.payload_bytes = below(std::uint64_t{1} << 24) * Command::kUnit;
    for (const bool lap : {false, true}) {
      const PackedCommand packed = PackedCommand::of(signal, lap);
      EXPECT_EQ(packed.lap(), lap);
      EXPECT_TRUE(packed.is_signal());
      EXPECT_FALSE(PackedCommand::of(Command{}, lap).is_signal());
      for (const int distance : {-127, 0, 127}) {
        const Signal back = packed.unpack_signal(signal.epoch + static_cast<std::uint32_t>(distance));
        EXPECT_EQ(back.peer, signal.peer);
        EXPECT_EQ(back.flag, signal.flag);
        EXPECT_EQ(back.epoch, signal.epoch);
        EXPECT_EQ(back.value, signal.value);
        EXPECT_EQ(back.puts, signal.puts);
        EXPECT_EQ(back.payload_bytes, signal.payload_bytes);
      }
    }
  }
}

TEST(fifo, it_is_full_after_its_capacity_and_empty_again_after_as_many) {
  const auto memory = std::make_unique<FifoMemory>();
  FifoWriter writer(*memory);
  FifoReader reader(*memory);
  for (int lap = 0; lap < 3; ++lap) {
    EXPECT_TRUE(reader.is_empty());
    EXPECT_FALSE(reader.pop());
    Command command;
    for (std::uint64_t i = 0; i < FifoMemory::kCapacity; ++i) {
      command.at = i * Command::kUnit;
      ASSERT_TRUE(writer.push(command));
    }
    EXPECT_FALSE(writer.push(command));
    for (std::uint64_t i = 0; i < FifoMemory::kCapacity; ++i) {
      const auto packed = reader.pop();
      ASSERT_TRUE(packed);
      EXPECT_EQ(packed->unpack(0).at, i * Command::kUnit);
    }
  }
}

// Under ThreadSanitizer this is the proof of the memory order: the payload is plain memory.
TEST(fifo, producers_on_several_threads_lose_nothing_and_payloads_come_before_commands) {
  constexpr int kProducers = 4;
  constexpr std::uint64_t kEach = 5000;
  const auto memory = std::make_unique<FifoMemory>();
  FifoWriter writer(*memory);
  FifoReader reader(*memory);
  std::vector<std::uint64_t> payload(kProducers * kEach);
  std::vector<std::thread> producers;
  for (int producer = 0; producer < kProducers; ++producer) {
    producers.emplace_back([&, producer] {
      for (std::uint64_t i = 0; i < kEach; ++i) {
        const std::uint64_t place = producer * kEach + i;
        payload[place] = place * 3 + 1;
        Command command;
        command.peer = producer;
        command.at = place * Command::kUnit;
        while (!writer.push(command)) std::this_thread::yield();
      }
    });
  }
  std::vector<std::uint64_t> next(kProducers);
  for (std::uint64_t taken = 0; taken < kProducers * kEach;) {
    const auto packed = reader.pop();
    if (!packed) {
      std::this_thread::yield();
      continue;
    }
    const Command command = packed->unpack(0);
    const std::uint64_t place = command.at / Command::kUnit;
    ASSERT_EQ(payload[place], place * 3 + 1);
    ASSERT_EQ(place, command.peer * kEach + next[command.peer]++) << "a producer's commands keep their order";
    ++taken;
  }
  for (auto& producer : producers) producer.join();
  EXPECT_TRUE(reader.is_empty());
  EXPECT_EQ(writer.pushed(), kProducers * kEach);
}

}  // namespace
}  // namespace deep_ep::net
