// SPDX-License-Identifier: MIT
#include "net/proxy.h"

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "check.h"

namespace deep_ep::net {

namespace {

using std::chrono::microseconds;

constexpr microseconds kLongSleep{100'000};  // the network's descriptor, or a ring, ends it
constexpr microseconds kPollPause{50};       // where nobody rings for us
constexpr microseconds kRetryPause{1'000};   // the network had no room
constexpr int kCommandsAtOnce = 64;          // before the network is looked after again

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void pin(std::thread& thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  // Where the core is not ours to choose (a container's set), the thread runs where it may.
  (void)pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

}  // namespace

int proxy_core(int local_rank, int local_ranks, int workers_per_rank) {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  if (local_ranks * (workers_per_rank + 1) > cores) return -1;
  return cores - 1 - local_rank;
}

Proxy::Proxy(std::unique_ptr<Fabric> fabric, ProxyReceiver& receiver, const ProxyOptions& options)
    : fabric_(std::move(fabric)),
      receiver_(receiver),
      options_(options),
      report_(fabric_->report()),
      held_(fabric_->num_ranks()),
      outgoing_(fabric_->num_ranks()),
      has_left_(fabric_->num_ranks()),
      memory_(std::make_unique<FifoMemory>()),
      writer_(*memory_) {
  readers_.emplace_back(*memory_);
  thread_ = std::thread([this] { run(); });
  if (options_.core >= 0) pin(thread_, options_.core);
}

Proxy::~Proxy() { close(); }

// From any thread
// ---------------------------------------------------------------------------------------------------------------------

bool Proxy::put(const Command& command, Clock::time_point deadline) {
  require(command.peer >= 0 && command.peer < static_cast<int>(held_.size()), "put: peer {} of {}", command.peer,
          held_.size());
  require(command.channel >= 0 && command.channel < kNumChannels, "put: channel {} of {}", command.channel,
          kNumChannels);
  require(command.region >= 0 && command.region < Command::kMaxRegions && command.remote_region >= 0 &&
              command.remote_region < Command::kMaxRegions,
          "put: regions {} and {}, at most {} fit a command", command.region, command.remote_region,
          Command::kMaxRegions);
  require((command.at | command.remote_at | command.bytes) % Command::kUnit == 0,
          "put: offsets {} and {} and {} bytes must be multiples of {}", command.at, command.remote_at, command.bytes,
          Command::kUnit);
  require(command.bytes > 0 && command.bytes <= Command::kMaxBytes && command.at <= Command::kMaxOffset &&
              command.remote_at <= Command::kMaxOffset,
          "put: {} bytes from {} to {} do not fit a command (at most {} bytes, offsets up to {})", command.bytes,
          command.at, command.remote_at, Command::kMaxBytes, Command::kMaxOffset);
  while (!writer_.push(command)) {
    if (Clock::now() >= deadline) return false;
    wake_.ring();
    std::this_thread::sleep_for(kPollPause);
  }
  wake_.ring();
  return true;
}

void Proxy::message(const Message& message) {
  const auto& payload = message.payload;
  require(message.peer >= 0 && message.peer < static_cast<int>(outgoing_.size()), "message: peer {} of {}",
          message.peer, outgoing_.size());
  require(payload.size() <= kMaxMessageBytes, "message: {} bytes, at most {}", payload.size(), kMaxMessageBytes);
  request([this, peer = message.peer,
           outgoing = Outgoing{message.epoch, Blob(payload.begin(), payload.end()), message.is_confirmed}]() mutable {
    if (!has_left_[peer]) outgoing_[peer].push_back(std::move(outgoing));
  });
}

void Proxy::set_epoch(std::uint32_t epoch) { epoch_.store(epoch, std::memory_order_relaxed); }

// Requests are taken in the order in which they were made.
void Proxy::see_off(int peer) {
  request([this, peer] { has_left_[peer] = 1; });
}

void Proxy::give_up(int peer, const std::string& reason) {
  request([this, peer, reason] { fabric_->give_up(peer, reason); });
}

void Proxy::add_device_fifo(FifoMemory& memory) {
  request([this, &memory] {
    readers_.emplace_back(memory);
    polls_ = true;
  });
}

void Proxy::request(std::function<void()> what) {
  {
    std::lock_guard lock(mutex_);
    requests_.push_back(std::move(what));
  }
  wake_.ring();
}

std::uint64_t Proxy::completed(int channel, std::uint32_t epoch) const {
  // Acquire: the network has read these bytes before the proxy counted them.
  const std::uint64_t word = completed_[epoch % kDepth][channel].load(std::memory_order_acquire);
  return word >> 32 == epoch ? word & 0xffffffff : 0;
}

bool Proxy::flush(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const std::uint64_t wanted = ++flushes_wanted_;
  wake_.ring();
  return flushed_.wait_until(lock, deadline, [&] { return flushes_done_ >= wanted; });
}

FabricCounters Proxy::counters() const {
  std::lock_guard lock(mutex_);
  return counters_;
}

void Proxy::close() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.ring();
  thread_.join();
  counters_ = fabric_->counters();
  fabric_->close();
}

// The thread
// ---------------------------------------------------------------------------------------------------------------------

void Proxy::run() {
  std::uint64_t answered = ~std::uint64_t{0};  // rings whose requests are taken
  for (;;) {
    // Before we look for work: a ring in between ends the sleep at once.
    const std::uint64_t seen = wake_.count();
    bool found = false;
    // Requests are made first and rung for then.
    if (std::exchange(answered, seen) != seen && !take_requests(found)) return;
    found |= take_commands();
    fabric_->set_epoch(epoch_.load(std::memory_order_relaxed));
    found |= use_network();
    publish_completions();
    if (is_flushing_) answer_flushes();
    bytes_in_flight_.store(fabric_->bytes_in_flight(), std::memory_order_relaxed);
    if (found) {
      idle_rounds_ = 0;
    } else if (++idle_rounds_ <= options_.spins) {
      pause_core();
    } else {
      sleep(seen);
    }
  }
}

// A network that breaks down as a whole is the loss of every peer; nobody may end this process for it.
bool Proxy::use_network() {
  try {
    bool found = send_messages();
    found |= send_puts();
    // A broken one only ends what is given to it: all peers are lost.
    return (!is_broken_ && fabric_->progress(receiver_)) || found;
  } catch (const std::exception& error) {
    is_broken_ = true;
    for (int peer = 0; peer < fabric_->num_ranks(); ++peer) {
      if (fabric_->peer_failure(peer)) continue;
      fabric_->give_up(peer, error.what());
      receiver_.on_peer_failed(peer, error.what());
    }
    return true;
  }
}

bool Proxy::take_requests(bool& found) {
  std::vector<std::function<void()>> requests;
  {
    std::lock_guard lock(mutex_);
    if (stop_) return false;
    requests.swap(requests_);
    is_flushing_ = flushes_done_ != flushes_wanted_;
  }
  for (auto& what : requests) what();
  found = !requests.empty();
  return true;
}

bool Proxy::take_commands() {
  bool found = false;
  for (FifoReader& reader : readers_) {
    for (int i = 0; i < kCommandsAtOnce && has_room_; ++i) {
      const auto packed = reader.pop();
      if (!packed) break;
      found = true;
      const std::uint32_t now = epoch_.load(std::memory_order_relaxed);
      if (packed->is_signal()) {
        receiver_.on_signal(packed->unpack_signal(now));
      } else {
        hold(packed->unpack(now));
      }
    }
    follow_kernels(reader);
  }
  return found;
}

// Operations that kernels begin, replayed by a graph perhaps, are counted on the device alone. After their commands
// were taken, whose numbers this one is not behind then.
void Proxy::follow_kernels(const FifoReader& reader) {
  if (const std::uint64_t theirs = reader.epoch(); theirs != 0) set_epoch(static_cast<std::uint32_t>(theirs));
}

void Proxy::hold(const Command& command) {
  if (command.peer >= static_cast<int>(held_.size())) {
    receiver_.on_bad_command(fmt::format("put: peer {} of {}", command.peer, held_.size()));
    return;
  }
  held_[command.peer].push_back(command);
  // A peer that takes nothing fills its list first; only then must the others wait.
  if (held_[command.peer].size() >= kMaxHeldPerPeer) has_room_ = false;
}

bool Proxy::send_messages() {
  bool found = false;
  for (int peer = 0; peer < static_cast<int>(outgoing_.size()); ++peer) {
    auto& queue = outgoing_[peer];
    while (!queue.empty() &&
           fabric_->message({peer, queue.front().epoch, queue.front().payload, queue.front().is_confirmed})) {
      queue.pop_front();
      found = true;
    }
  }
  return found;
}

bool Proxy::send_puts() {
  bool found = false;
  has_room_ = true;
  for (auto& queue : held_) {
    for (int i = 0; i < kCommandsAtOnce && !queue.empty() && start(queue.front()); ++i) {
      queue.pop_front();
      found = true;
    }
    has_room_ = has_room_ && queue.size() < kMaxHeldPerPeer;
  }
  return found;
}

// Whether the command is on its way, or will never be.
bool Proxy::start(const Command& command) {
  const std::uint64_t all = fabric_->bytes_in_flight(), to_peer = fabric_->bytes_in_flight_to(command.peer);
  if (all > 0 && all + command.bytes > options_.bytes_in_flight) return false;
  if (to_peer > 0 && to_peer + command.bytes > options_.bytes_in_flight / 4) return false;
  Tally& tally = tally_of(command.channel, command.epoch);
  Put put;
  put.peer = command.peer;
  put.region = command.region;
  put.at = command.at;
  put.remote_region = command.remote_region;
  put.remote_at = command.remote_at;
  put.bytes = command.bytes;
  put.notice = Notice{static_cast<std::uint8_t>(command.channel), command.epoch};
  put.completions = &tally.completions;
  try {
    if (!fabric_->put(put)) {
      if (!tally.is_busy && !is_current(tally)) tallies_.erase(tally.self);
      return false;
    }
  } catch (const Error& error) {
    tally.completions.failed.fetch_add(1, std::memory_order_relaxed);
    receiver_.on_bad_command(error.what());
  }
  ++tally.puts;
  if (!tally.is_busy) busy_.push_back(&tally);
  tally.is_busy = true;
  return true;
}

Proxy::Tally& Proxy::tally_of(int channel, std::uint32_t epoch) {
  Tally*& current = current_[epoch % kDepth][channel];
  if (current != nullptr && current->epoch == epoch) return *current;
  Tally& tally = tallies_.emplace_back();
  tally.epoch = epoch;
  tally.channel = channel;
  tally.self = std::prev(tallies_.end());
  // One that comes after its place was taken by a later epoch is counted for the engine only.
  const bool is_newer = current == nullptr || static_cast<std::int32_t>(epoch - current->epoch) > 0;
  if (!is_newer) return tally;
  Tally* const before = std::exchange(current, &tally);
  if (before != nullptr && !before->is_busy) tallies_.erase(before->self);
  return tally;
}

void Proxy::publish_completions() {
  std::uint32_t channels = 0;  // with news
  std::erase_if(busy_, [&](Tally* tally) {
    const std::uint64_t ended = tally->ended();
    if (is_current(*tally) && ended != tally->published) {
      tally->published = ended;
      channels |= std::uint32_t{1} << tally->channel;
      // Release: pairs with completed().
      completed_[tally->epoch % kDepth][tally->channel].store(std::uint64_t{tally->epoch} << 32 | ended,
                                                              std::memory_order_release);
    }
    if (ended != tally->puts) return false;
    tally->is_busy = false;
    if (!is_current(*tally)) tallies_.erase(tally->self);
    return true;
  });
  if (channels != 0) receiver_.on_completed(channels);
}

bool Proxy::has_nothing_left() const {
  const auto is_empty = [](const auto& queue) { return queue.empty(); };
  return requests_.empty() && fabric_->is_idle() && std::all_of(held_.begin(), held_.end(), is_empty) &&
         std::all_of(outgoing_.begin(), outgoing_.end(), is_empty) &&
         std::all_of(readers_.begin(), readers_.end(), [](const FifoReader& reader) { return reader.is_empty(); });
}

void Proxy::answer_flushes() {
  std::lock_guard lock(mutex_);
  if (flushes_done_ == flushes_wanted_ || !has_nothing_left()) return;
  flushes_done_ = flushes_wanted_;
  is_flushing_ = false;
  counters_ = fabric_->counters();
  flushed_.notify_all();
}

void Proxy::sleep(std::uint64_t seen) {
  {
    std::lock_guard lock(mutex_);
    counters_ = fabric_->counters();
  }
  const bool waits_for_room = std::any_of(held_.begin(), held_.end(), [](const auto& queue) { return !queue.empty(); });
  if (polls_) return wake_.sleep(seen, -1, kPollPause);
  if (fabric_->wait_fd() < 0 || is_broken_)
    return wake_.sleep(seen, -1, std::min(kRetryPause, idle_rounds_ * kPollPause));
  if (fabric_->prepare_wait()) wake_.sleep(seen, fabric_->wait_fd(), waits_for_room ? kRetryPause : kLongSleep);
}

}  // namespace deep_ep::net
