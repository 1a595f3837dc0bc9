// SPDX-License-Identifier: MIT
#include "host/context.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>

#include "check.h"
#include "introduction.h"

namespace deep_ep::host {

namespace {

using Bytes = Bootstrap::Blob;

Surroundings look_around(const BackendInput& input, const Config& config) {
  const int rank = input.group->rank();
  if (input.topology.num_nodes == 1) return {.rank_here = rank, .ranks_here = input.group->num_ranks()};
  const MachineIdentity machine = machine_identity();
  const auto* bytes = reinterpret_cast<const std::byte*>(&machine);
  Bytes ours(bytes, bytes + sizeof machine);
  for (const char c : config.network.provider) ours.push_back(static_cast<std::byte>(c));
  const auto all = input.group->all_gather(ours, config.open_timeout);
  Surroundings found{.needs_network = !config.network.provider.empty(), .ranks_here = 0};
  for (int peer = 0; peer < static_cast<int>(all.size()); ++peer) {
    require(all[peer].size() >= sizeof machine, "rank {} sent {} bytes of introduction, {} are needed", peer,
            all[peer].size(), sizeof machine);
    const std::string theirs(reinterpret_cast<const char*>(all[peer].data()) + sizeof machine,
                             all[peer].size() - sizeof machine);
    require(theirs == config.network.provider, "config differs: rank {} has network.provider = {}, rank {} has {}",
            rank, config.network.provider, peer, theirs);
    const bool is_here = std::memcmp(all[peer].data(), &machine, sizeof machine) == 0;
    found.needs_network = found.needs_network || !is_here;
    found.ranks_here += is_here;
    found.rank_here += is_here && peer < rank;
  }
  return found;
}

// Ours, and those of all ranks that share memory with us; the others stay null.
std::vector<std::shared_ptr<Window>> open_windows(const BackendInput& input, std::size_t bytes, bool network) {
  Bootstrap& group = *input.group;
  const int rank = group.rank(), num_ranks = group.num_ranks();
  auto own = Window::create(bytes);
  const auto addresses = exchange_addresses(group, own->address(), input.config);
  std::vector<std::shared_ptr<Window>> windows(num_ranks);
  std::optional<Error> failure;
  try {
    for (int peer = 0; peer < num_ranks; ++peer)
      if (!network || input.topology.same_node(rank, peer))
        windows[peer] = peer == rank ? own : Window::open(addresses[peer]);
  } catch (const Error& error) {
    failure = error;
  }
  // Nobody seals its window before all have opened it.
  failure = first_failure(group, failure, input.config.open_timeout);
  own->seal();
  if (failure) throw *failure;
  return windows;
}

int cores_here() { return static_cast<int>(std::thread::hardware_concurrency()); }

// A network's proxy gets a core too, where there is one.
int workers_of(const Options& options, const Surroundings& around) {
  if (options.num_workers > 0) return options.num_workers;
  return std::max(1, cores_here() / around.ranks_here - around.needs_network);
}

Patience patience_of(const Surroundings& around, int workers) {
  // Polling pays only where every rank, and its proxy, has a core of its own.
  if (around.ranks_here * (workers + around.needs_network) <= cores_here()) return {20000, {}};
  return {100, std::chrono::microseconds(200)};
}

std::uint64_t word_of(const Epoch& epoch, std::uint32_t value) { return epoch.number << 32 | value; }

std::uint64_t load_acquire(const std::uint64_t& word) {
  return std::atomic_ref<std::uint64_t>(const_cast<std::uint64_t&>(word)).load(std::memory_order_acquire);
}

void store_release(std::uint64_t& word, std::uint64_t value) {
  std::atomic_ref<std::uint64_t>(word).store(value, std::memory_order_release);
}

}  // namespace

Context::Context(const BackendInput& input)
    : rank(input.group->rank()),
      num_ranks(input.group->num_ranks()),
      topology(input.topology),
      config(input.config),
      layout_(
          plan::WindowLayout::place(config, num_ranks, plan::arena_bytes_of(config, num_ranks, plan::machine_bytes()))),
      around_(look_around(input, config)),
      windows_(open_windows(input, layout_.total_bytes, around_.needs_network)),
      arena_(
          std::make_shared<plan::Arena>(windows_[rank], windows_[rank]->base(), layout_.arena_at, layout_.arena_bytes)),
      masked_(num_ranks, 0),
      network_bytes_before_(num_ranks, 0) {
  const int count = workers_of(input.options, around_);
  const bool pin = input.options.pin_workers;
  workers_ = std::make_unique<Workers>(count, pin ? around_.rank_here * count : -1);
  for (const auto& window : windows_)
    processes_.push_back(!window || window->address().pid == getpid() ? ProcessWatch()
                                                                      : ProcessWatch(window->address().pid));
  const int proxy_core = pin ? net::proxy_core(around_.rank_here, around_.ranks_here, count) : -1;
  if (around_.needs_network)
    link_ = std::make_unique<Link>(net::LinkInput{.group = *input.group,
                                                  .config = config,
                                                  .topology = topology,
                                                  .layout = layout_,
                                                  .control = window(rank),
                                                  .low_latency = window(rank) + layout_.low_latency_at,
                                                  .doorbell = doorbell(rank),
                                                  .proxy_core = proxy_core});
  patience_ = patience_of(around_, count);
  statistics_.peers.resize(num_ranks);
}

// Epochs
// --------------------------------------------------------------------------------------------------------------------------

Epoch Context::begin(Operation operation, std::chrono::milliseconds timeout) {
  Epoch epoch{operation, 0, -1, Clock::now() + timeout};
  std::uint64_t needed = 0;  // every rank must have finished this operation, whose places we take
  {
    std::lock_guard lock(mutex_);
    epoch.number = ++last_epoch_;
    if (link_) link_->begin(epoch.number);
    ++statistics_.operations;
    std::uint64_t depth = plan::kOperationsInFlight;
    if (operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine) {
      // By the operation's number, not by a count of its own: ranks that once made different calls still agree on it.
      epoch.ticket = static_cast<int>(epoch.number % config.num_tickets);
      depth = std::min<std::uint64_t>(depth, config.num_tickets);
    }
    if (epoch.number > depth) needed = epoch.number - depth;
    pending_[epoch.number] = {epoch, Pending::kOpen};
  }
  try {
    await_own_room(epoch, needed);
    for (int peer : active_ranks())
      if (peer != rank) await_room(epoch, peer, needed);
    // What the memory of this ticket held before may still be on its way.
    if (link_ && epoch.ticket >= 0)
      await_any(
          epoch, [&] { return link_->low_latency_has_left(needed); }, [this] { return rank; });
  } catch (...) {
    finish(epoch);
    throw;
  }
  std::lock_guard lock(mutex_);
  retire(needed);
  sweep_kept_blocks();
  return epoch;
}

// All peers but the masked ones have left the operations up to this one: what we kept for them may be written over from
// now on, and a masked rank can see it, in a word of ours that nobody waits for any more.
void Context::retire(std::uint64_t up_to) {
  for (; retired_ < up_to; ++retired_) {
    const std::uint64_t number = retired_ + 1;
    // Acquire: what we write over from now on comes after the reads of whoever looked at this word before
    // (require_kept). Whoever looks later sees the number.
    std::atomic_ref<std::uint64_t>(word(rank, Flag::kFinished, number, rank))
        .exchange(number << 32, std::memory_order_acq_rel);
  }
}

void Context::require_kept(const Epoch& epoch, int peer) {
  if (peer == rank || is_far(peer)) return;
  // Changes nothing, but as a write with release it puts our reads before the exchange in retire(), unless that came
  // first; then we see it.
  const std::uint64_t retired = std::atomic_ref<std::uint64_t>(word(peer, Flag::kFinished, epoch.number, peer))
                                    .fetch_or(0, std::memory_order_acq_rel);
  if (retired >> 32 >= epoch.number) throw_timeout(epoch, peer, 1, 0, false);
}

// Our own places are free once we have finished what used them. An open ticket is the caller's to receive: that is an
// error, not a wait.
void Context::await_own_room(const Epoch& epoch, std::uint64_t needed) {
  for (;;) {
    Epoch oldest;
    {
      std::lock_guard lock(mutex_);
      advance_released();
      if (released_ >= needed) return;
      const Pending& first = pending_.at(released_ + 1);
      require(
          first.state != Pending::kOpen,
          "{}: the ticket of operation {} is still open, and {} needs its place: receive it first (num_tickets = {})",
          name(epoch.operation), first.epoch.number, epoch.number, config.num_tickets);
      oldest = first.epoch;
    }
    for (int peer : active_ranks()) {
      bool gone = false;
      if (!wait(epoch, peer, gone, [&] { return has_arrived_or_left(oldest, peer); }))
        throw_timeout(epoch, peer, 1, 0, gone);
    }
  }
}

void Context::await_room(const Epoch& epoch, int peer, std::uint64_t needed) {
  if (needed == 0) return;
  const std::uint64_t& released = word(rank, Flag::kReleased, 0, peer);
  bool gone = false;
  // Acquire: what we write next into the peer's places comes after its last reads there.
  if (!wait(epoch, peer, gone, [&] { return load_acquire(released) >= needed; }))
    throw_timeout(epoch, peer, needed, load_acquire(released), gone);
}

void Context::finish(const Epoch& epoch) {
  std::lock_guard lock(mutex_);
  if (const auto found = pending_.find(epoch.number); found != pending_.end()) found->second.state = Pending::kDone;
  advance_released();
}

void Context::abandon(const Epoch& epoch) {
  std::lock_guard lock(mutex_);
  if (const auto found = pending_.find(epoch.number); found != pending_.end())
    found->second.state = Pending::kAbandoned;
  advance_released();
}

// Under the lock, so that the word only grows.
void Context::advance_released() {
  const std::uint64_t before = released_;
  while (!pending_.empty() && pending_.begin()->first == released_ + 1) {
    const Pending& first = pending_.begin()->second;
    if (first.state == Pending::kOpen) break;
    if (first.state == Pending::kAbandoned && !everybody_is_through(first.epoch)) break;
    pending_.erase(pending_.begin());
    ++released_;
  }
  if (released_ == before) return;
  // Release: our reads of what a peer wrote come before its next writes there.
  for (int peer = 0; peer < num_ranks; ++peer) store_for_good(peer, Flag::kReleased, released_);
}

// A word of this rank as a whole, not of one operation.
void Context::store_for_good(int peer, Flag flag, std::uint64_t value) {
  if (is_far(peer)) return link_->publish(peer, {flag, value, value});
  store_release(word(peer, flag, 0, rank), value);
  if (peer != rank) doorbell(peer).ring();
}

// Whether the peer writes nothing into this operation's places any more: its data is here, it left the operation, or it
// is gone.
bool Context::has_arrived_or_left(const Epoch& epoch, int peer) const {
  return load_acquire(word(rank, Flag::kArrived, epoch.number, peer)) >> 32 >= epoch.number ||
         has_released(peer, epoch.number) || processes_[peer].ended() || (link_ && link_->dead(peer));
}

bool Context::everybody_is_through(const Epoch& epoch) const {
  for (int peer = 0; peer < num_ranks; ++peer)
    if (!masked_[peer] && !has_arrived_or_left(epoch, peer)) return false;
  return true;
}

bool Context::has_released(int peer, std::uint64_t epoch) const {
  return load_acquire(word(rank, Flag::kReleased, 0, peer)) >= epoch;
}

// Flags
// ---------------------------------------------------------------------------------------------------------------------------

void Context::publish(int peer, Flag flag, const Epoch& epoch, std::uint32_t value, std::size_t payload_bytes) {
  if (is_far(peer)) {
    const std::size_t at =
        flag == Flag::kReplied ? layout_.reply(epoch.number, rank) : layout_.announcement(epoch.number, rank);
    link_->publish(peer, {flag, epoch.number, word_of(epoch, value)}, {control(peer) + at, payload_bytes});
    return;
  }
  // Release: a peer that sees the flag sees everything that this thread, and the workers it waited for, wrote before.
  store_release(word(peer, flag, epoch.number, rank), word_of(epoch, value));
  doorbell(peer).ring();
}

void Context::publish_low_latency(int peer, const Epoch& epoch, std::uint32_t value, std::uint64_t puts) {
  if (!is_far(peer)) return publish(peer, Flag::kArrived, epoch, value);
  link_->publish(peer, {Flag::kArrived, epoch.number, word_of(epoch, value), puts});
}

void Context::publish_arrived_for(int writer, int peer, const Epoch& epoch) {
  // Release: the rows that we passed on come before it, as in publish().
  store_release(word(peer, Flag::kArrived, epoch.number, writer), word_of(epoch, 1));
  doorbell(peer).ring();
}

template <typename Ready>
bool Context::wait(const Epoch& epoch, int peer, bool& peer_gone, const Ready& ready) {
  if (ready()) return true;
  const auto start = Clock::now();
  const auto tick = [&] { return !(peer_gone = find_dead(peer) >= 0); };
  const bool came = wait_until(doorbell(rank), epoch.deadline, patience_, ready, tick);
  const auto waited = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  count([&](Statistics& statistics) {
    Statistics::Peer& counters = statistics.peers[peer];
    ++counters.waits;
    counters.wait_ns_sum += static_cast<std::uint64_t>(waited);
    counters.wait_ns_max = std::max(counters.wait_ns_max, static_cast<std::uint64_t>(waited));
  });
  return came;
}

std::uint32_t Context::await(Flag flag, const Epoch& epoch, int peer, std::uint64_t expected) {
  bool gone = false;
  const std::uint64_t& flag_word = word(rank, flag, epoch.number, peer);
  // Acquire: pairs with publish().
  if (!wait(epoch, peer, gone, [&] { return load_acquire(flag_word) >> 32 >= epoch.number; }))
    throw_timeout(epoch, peer, expected, 0, gone);
  return static_cast<std::uint32_t>(load_acquire(flag_word));
}

void Context::await_count(Flag flag, const Epoch& epoch, int peer, std::uint32_t count) {
  bool gone = false;
  const std::uint64_t& flag_word = word(rank, flag, epoch.number, peer);
  // Acquire: pairs with publish().
  if (!wait(epoch, peer, gone, [&] { return load_acquire(flag_word) >= word_of(epoch, count); }))
    throw_timeout(epoch, peer, count, static_cast<std::uint32_t>(load_acquire(flag_word)), gone);
}

void Context::await_any(const Epoch& epoch, const std::function<bool()>& ready, const std::function<int()>& blame) {
  if (ready()) return;
  const int peer = blame();
  bool gone = false;
  if (!wait(epoch, peer, gone, ready)) throw_timeout(epoch, blame(), 1, 0, gone);
}

// Whoever is known to have ended and so ends a wait for `peer`: the peer itself, or between nodes any rank, for it may
// have been the one that passes the peer's rows on. -1: nobody.
int Context::find_dead(int peer) {
  if (!link_) return processes_[peer].ended() ? peer : -1;
  for (int other : active_ranks())
    if (processes_[other].ended()) link_->report_dead(other, "its process has ended");
  return link_->dead_rank(masked_ranks());
}

void Context::throw_timeout(const Epoch& epoch, int peer, std::uint64_t expected, std::uint64_t seen, bool gone) {
  count([](Statistics& statistics) { ++statistics.timeouts; });
  const int dead = find_dead(peer);
  if (dead >= 0) {
    peer = dead;
    gone = true;
  } else if (link_) {
    // Whoever is silent altogether is to blame before one who only waits for him, or whose rows he was to pass on.
    const int silent = link_->silent_rank(peer, active_ranks());
    if (silent >= 0) peer = silent;
  }
  throw Error(WaitRecord{rank, name(epoch.operation), peer, epoch.number, expected, seen, gone});
}

void Context::require_there(const Epoch& epoch, int peer) {
  if (peer != rank && !is_far(peer) && has_released(peer, epoch.number)) throw_timeout(epoch, peer, 1, 0, false);
}

void Context::announce(const Epoch& epoch, const Announcement& ours, std::uint32_t value) {
  for (int peer : active_ranks()) announce_to(peer, epoch, ours, value);
}

void Context::announce_to(int peer, const Epoch& epoch, const Announcement& ours, std::uint32_t value) {
  announcement(peer, epoch.number, rank) = ours;
  publish(peer, Flag::kAnnounced, epoch, value, sizeof ours);
}

bool Context::has_announced(int owner, const Epoch& epoch, int writer) const {
  // Acquire: pairs with publish(); the announcement and its counts come with the flag.
  return load_acquire(word(owner, Flag::kAnnounced, epoch.number, writer)) == word_of(epoch, 0);
}

void Context::let_others_come(std::chrono::microseconds moment, const std::function<bool()>& enough) const {
  const Deadline end = Clock::now() + std::min(moment, patience_.yield_for);
  while (!enough() && Clock::now() < end) sched_yield();
}

void Context::await_announcement(const Epoch& epoch, int peer, const Signature& ours) {
  const std::uint32_t value = await(Flag::kAnnounced, epoch, peer, 1);
  const Announcement& theirs = announcement(rank, epoch.number, peer);
  try {
    require(value != kRefused, "rank {} refused this {}: {}", peer, name(epoch.operation), theirs.refusal.data());
    ours.require_same(theirs.signature, rank, peer);
  } catch (...) {
    count([](Statistics& statistics) { ++statistics.refused; });
    throw;
  }
}

bool Context::came(int peer, bool mask_silent, const std::function<void()>& wait) {
  for (;;) {
    try {
      wait();
      return true;
    } catch (const Error& error) {
      if (!mask_silent || !error.wait()) throw;
      set_masked(error.wait()->peer, true);
      if (error.wait()->peer == peer) return false;
      // Another one has died, which ends every wait between nodes: without it, the peer may still come.
    }
  }
}

void Context::refuse(Operation operation, const std::string& why) {
  count([](Statistics& statistics) { ++statistics.refused; });
  const Epoch epoch = begin(operation, config.timeout);
  Announcement refusal;
  why.copy(refusal.refusal.data(), refusal.refusal.size() - 1);
  announce(epoch, refusal, kRefused);
  for (int peer : active_ranks())
    if (epoch.ticket >= 0) publish(peer, Flag::kArrived, epoch, 0);
  // Peers may still be sending into our slots.
  epoch.ticket >= 0 ? abandon(epoch) : finish(epoch);
}

std::vector<int> Context::active_ranks() const {
  std::lock_guard lock(mutex_);
  std::vector<int> active;
  for (int peer = 0; peer < num_ranks; ++peer)
    if (!masked_[peer]) active.push_back(peer);
  return active;
}

// Memory
// --------------------------------------------------------------------------------------------------------------------------

plan::Arena::Block Context::spare_block(std::size_t bytes) {
  return arena_->in_use() + bytes <= arena_->capacity() / 2 ? arena_->allocate(bytes, false) : plan::Arena::Block{};
}

std::shared_ptr<void> Context::output_memory(std::size_t bytes) {
  if (plan::Arena::Block block = spare_block(bytes); block.owner) return std::move(block.owner);
  return Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(bytes)}).owner;
}

Tensor Context::output(DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view(static_cast<void*>(nullptr), dtype, shape);
  std::shared_ptr<void> memory = output_memory(view.bytes());
  view.data = memory.get();
  return Tensor(view, std::move(memory));
}

void Context::quarantine(const Epoch& epoch, std::shared_ptr<void> block) {
  std::lock_guard lock(mutex_);
  quarantine_[epoch.number].push_back(std::move(block));
}

void Context::keep_for_readers(const Epoch& epoch, std::shared_ptr<void> block) {
  std::lock_guard lock(mutex_);
  read_by_peers_[epoch.number].push_back(std::move(block));
}

void Context::sweep_kept_blocks() {
  const auto has_left = [this](int peer, std::uint64_t epoch) {
    return peer == rank || has_released(peer, epoch) || processes_[peer].ended();
  };
  std::erase_if(quarantine_, [&](const auto& entry) {
    for (int peer = 0; peer < num_ranks; ++peer)
      if (!has_left(peer, entry.first)) return false;
    return true;
  });
  std::erase_if(read_by_peers_, [&](const auto& entry) {
    if (entry.first > released_) return false;  // this rank reads its own rows there too
    for (int peer = 0; peer < num_ranks; ++peer)
      if (!is_far(peer) && !(masked_[peer] && entry.first <= retired_) && !has_left(peer, entry.first)) return false;
    return true;
  });
}

// Masks and statistics
// ------------------------------------------------------------------------------------------------------------

void Context::set_masked(int peer, bool masked) {
  std::lock_guard lock(mutex_);
  masked_[peer] = masked;
  // A hint that keeps a late rank from writing here; correctness rests on its words being ignored. Numbered, so that
  // the last of several counts, whichever comes last; the lowest bit is the answer.
  store_for_good(peer, Flag::kExcluded, ++mask_changes_ << 1 | static_cast<std::uint64_t>(masked));
}

bool Context::excluded_by(int peer) const { return (load_acquire(word(rank, Flag::kExcluded, 0, peer)) & 1) != 0; }

bool Context::masked(int peer) const {
  std::lock_guard lock(mutex_);
  return masked_[peer] != 0;
}

std::vector<char> Context::masked_ranks() const {
  std::lock_guard lock(mutex_);
  return masked_;
}

Statistics Context::statistics() const {
  std::lock_guard lock(mutex_);
  Statistics result = statistics_;
  for (int peer = 0; peer < num_ranks && link_; ++peer)
    result.peers[peer].network_bytes = link_->put_bytes(peer) - network_bytes_before_[peer];
  result.arena_bytes_in_use = arena_->in_use();
  result.arena_bytes_high_water = arena_->high_water();
  return result;
}

void Context::reset_statistics() {
  std::lock_guard lock(mutex_);
  statistics_ = {};
  statistics_.peers.resize(num_ranks);
  for (int peer = 0; peer < num_ranks && link_; ++peer) network_bytes_before_[peer] = link_->put_bytes(peer);
}

}  // namespace deep_ep::host
