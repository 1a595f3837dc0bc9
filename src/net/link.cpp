// SPDX-License-Identifier: MIT
#include "net/link.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "check.h"

namespace deep_ep::net {

namespace {

static_assert(kDataChannel < kNumChannels);
constexpr std::size_t kPieceBytes = kMaxMessageBytes - sizeof(ControlHead);
constexpr std::chrono::milliseconds kGoodbye{2000};
constexpr std::chrono::milliseconds kTimeToAnswer{500};

std::span<const std::byte> bytes_of(const ControlHead& head) {
  return {reinterpret_cast<const std::byte*>(&head), sizeof head};
}

void append(Blob& blob, const Blob& key) {
  const std::uint64_t bytes = key.size();
  const auto* size = reinterpret_cast<const std::byte*>(&bytes);
  blob.insert(blob.end(), size, size + sizeof bytes);
  blob.insert(blob.end(), key.begin(), key.end());
}

std::span<const std::byte> next(std::span<const std::byte>& blob) {
  std::uint64_t bytes = 0;
  require(blob.size() >= sizeof bytes, "keys of a peer's memory: {} bytes are there, {} are needed", blob.size(),
          sizeof bytes);
  std::memcpy(&bytes, blob.data(), sizeof bytes);
  blob = blob.subspan(sizeof bytes);
  require(blob.size() >= bytes, "keys of a peer's memory: {} bytes are there, {} are needed", blob.size(), bytes);
  const auto key = blob.first(bytes);
  blob = blob.subspan(bytes);
  return key;
}

}  // namespace

std::shared_ptr<std::byte> untouched_pages(std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    throw Error(ErrorCode::kSystem, fmt::format("mmap of {} bytes between nodes: {}", bytes, std::strerror(errno)));
  return {static_cast<std::byte*>(base), [bytes](std::byte* pages) { munmap(pages, bytes); }};
}

Link::Link(const LinkInput& input)
    : rank_(input.group.rank()),
      num_ranks_(input.group.num_ranks()),
      topology_(input.topology),
      layout_(input.layout),
      control_(input.control),
      low_latency_(input.low_latency),
      doorbell_(input.doorbell),
      kernels_(input.kernels),
      memory_(plan::FarMemory::of(input.layout, input.config.forward_slot_bytes)),
      slot_bytes_(memory_.slot_bytes),
      mirror_bytes_(plan::FarMemory::mirror_bytes(input.layout)),
      mirrors_(input.memory(memory_.mirrors)),
      staging_(input.memory(memory_.slots)),
      inbox_(input.memory(memory_.slots)),
      low_latency_staging_(input.memory(std::max<std::size_t>(1, memory_.low_latency))),
      state_(num_ranks_),
      knows_we_leave_(num_ranks_),
      slot_free_(static_cast<std::size_t>(num_ranks_) * plan::kForwardSlots),
      put_bytes_(num_ranks_),
      answered_(num_ranks_),
      expected_(static_cast<std::size_t>(num_ranks_) * plan::kOperationsInFlight * kNumFlags),
      arrivals_(num_ranks_),
      peer_inbox_(num_ranks_, -1),
      peer_slots_(num_ranks_, -1) {
  for (auto& free : slot_free_) free.store(true, std::memory_order_relaxed);
  open_network(input);
}

Link::~Link() {
  say_goodbye();
  proxy_->close();
}

// Nothing is ordered: a peer might hear that we are gone before it has what we sent, or our word that we leave in good
// order. So we go when everybody has answered, has left or has died.
void Link::say_goodbye() {
  const Deadline until = Clock::now() + kGoodbye;
  proxy_->flush(until);
  ControlHead bye;
  bye.kind = ControlKind::kBye;
  for (int peer = 0; peer < num_ranks_; ++peer)
    if (peer != rank_) send(peer, bye);
  const auto ready = [&] {
    for (int peer = 0; peer < num_ranks_; ++peer)
      if (peer != rank_ && state_[peer].load(std::memory_order_acquire) == kThere &&
          !knows_we_leave_[peer].load(std::memory_order_acquire))
        return false;
    return true;
  };
  wait_until(doorbell_, until, {}, ready, [] { return true; });
}

void Link::open_network(const LinkInput& input) {
  Bootstrap& group = input.group;
  const Config& config = input.config;
  auto fabric = open_fabric(group, config.network, config.open_timeout);
  staging_region_ = fabric->register_memory({staging_.get(), memory_.slots});
  Blob mine;
  append(mine, fabric->region_key(fabric->register_memory({inbox_.get(), memory_.slots})));
  const std::size_t low_latency_bytes = layout_.arena_at - layout_.low_latency_at;
  if (low_latency_bytes > 0) {
    low_latency_region_ = fabric->register_memory({low_latency_staging_.get(), memory_.low_latency});
    append(mine, fabric->region_key(fabric->register_memory({low_latency_, low_latency_bytes})));
  }
  const auto keys = group.all_gather(mine, config.open_timeout);
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (!reaches(peer)) continue;
    std::span<const std::byte> blob = keys[peer];
    peer_inbox_[peer] = fabric->import_region(peer, next(blob));
    if (low_latency_bytes > 0) peer_slots_[peer] = fabric->import_region(peer, next(blob));
  }
  proxy_ = std::make_unique<Proxy>(
      std::move(fabric), static_cast<ProxyReceiver&>(*this),
      ProxyOptions{.bytes_in_flight = config.network.bytes_in_flight, .core = input.proxy_core});
  if (kernels_ != nullptr) proxy_->add_device_fifo(kernels_->commands);
  open_.count_down();
}

// Flags
// ---------------------------------------------------------------------------------------------------------------------

void Link::publish(int peer, const FlagMessage& flag, std::span<const std::byte> payload) {
  ControlHead head;
  head.flag = flag.flag;
  head.epoch = flag.epoch;
  head.value = flag.value;
  head.puts = flag.puts;
  head.pieces = static_cast<std::uint32_t>(std::max<std::size_t>(1, (payload.size() + kPieceBytes - 1) / kPieceBytes));
  std::vector<std::byte> message;
  for (std::uint32_t piece = 0; piece < head.pieces; ++piece) {
    const auto part = payload.subspan(piece * kPieceBytes, std::min(kPieceBytes, payload.size() - piece * kPieceBytes));
    head.at = static_cast<std::uint32_t>(piece * kPieceBytes);
    const auto head_bytes = net::bytes_of(head);
    message.assign(head_bytes.begin(), head_bytes.end());
    message.insert(message.end(), part.begin(), part.end());
    proxy_->message({peer, static_cast<std::uint32_t>(flag.epoch), message});
  }
}

// Forwarding slots
// ---------------------------------------------------------------------------------------------------------------------

int Link::free_slot(int peer, plan::Stream stream) const {
  const int begin = stream == plan::Stream::kRequests ? plan::kRequestSlot : plan::kRequestSlot + 1;
  const int end = stream == plan::Stream::kRequests ? plan::kRequestSlot + 1 : plan::kForwardSlots;
  for (int slot = begin; slot < end; ++slot)
    // Acquire: pairs with take_credit(); the peer has read what the slot held before.
    if (slot_free_[static_cast<std::size_t>(peer) * plan::kForwardSlots + slot].load(std::memory_order_acquire))
      return slot;
  return -1;
}

bool Link::has_slot(int peer, plan::Stream stream) const { return free_slot(peer, stream) >= 0; }

int Link::take_slot(int peer, plan::Stream stream) {
  const int slot = free_slot(peer, stream);
  // Relaxed: one thread at a time takes slots, and gets them back by a credit.
  if (slot >= 0)
    slot_free_[static_cast<std::size_t>(peer) * plan::kForwardSlots + slot].store(false, std::memory_order_relaxed);
  return slot;
}

void Link::leave_slot(int peer, int slot) {
  // Relaxed: as in take_slot().
  slot_free_[static_cast<std::size_t>(peer) * plan::kForwardSlots + slot].store(true, std::memory_order_relaxed);
}

void Link::put_chunk(int peer, int slot, const plan::ChunkHead& head, Deadline deadline) {
  std::memcpy(chunk(peer, slot), &head, sizeof head);
  const std::size_t bytes = plan::align_up(head.bytes, plan::kUnitAlignment);
  put_bytes_[peer].fetch_add(bytes, std::memory_order_relaxed);  // a count for people
  // Where the queue stays full to the deadline, so does the network: whoever waits for the chunk says so.
  proxy_->put({.peer = peer,
               .region = staging_region_,
               .remote_region = peer_inbox_[peer],
               .channel = slot,
               .epoch = static_cast<std::uint32_t>(head.epoch),
               .at = slot_at(peer, slot),
               .remote_at = slot_at(rank_, slot),
               .bytes = bytes},
              deadline);
}

std::uint64_t Link::chunks_left(std::uint64_t epoch) const {
  std::uint64_t left = 0;
  for (int slot = 0; slot < plan::kForwardSlots; ++slot)
    left += proxy_->completed(slot, static_cast<std::uint32_t>(epoch));
  return left;
}

std::vector<LandedChunk> Link::landed(std::uint64_t epoch) {
  std::vector<LandedChunk> mine, late, later;
  {
    std::lock_guard lock(landed_mutex_);
    for (const LandedChunk& chunk : landed_)
      (chunk.head.epoch == epoch ? mine : chunk.head.epoch < epoch ? late : later).push_back(chunk);
    landed_ = std::move(later);
  }
  give_back(late);
  return mine;
}

bool Link::has_landed(std::uint64_t epoch) const {
  std::lock_guard lock(landed_mutex_);
  return std::any_of(landed_.begin(), landed_.end(),
                     [&](const LandedChunk& chunk) { return chunk.head.epoch <= epoch; });
}

void Link::give_back(std::span<const LandedChunk> chunks) {
  for (auto one = chunks.begin(); one != chunks.end();) {
    std::uint32_t slots = 0;
    const int source = one->source;
    for (; one != chunks.end() && one->source == source; ++one) slots |= std::uint32_t{1} << one->slot;
    send_credit(source, slots);
  }
}

// Nobody has to know that it came: whoever lacks it waits, and its loss is the loss of its sender.
void Link::send_credit(int peer, std::uint32_t slots) {
  ControlHead credit;
  credit.kind = ControlKind::kCredit;
  credit.slots = static_cast<std::uint16_t>(slots);
  proxy_->message({peer, proxy_->epoch(), net::bytes_of(credit), false});
}

// Low latency
// ---------------------------------------------------------------------------------------------------------------------

void Link::put_low_latency(int peer, int ticket, const LowLatencyPut& put) {
  put_bytes_[peer].fetch_add(put.bytes, std::memory_order_relaxed);  // a count for people
  proxy_->put({.peer = peer,
               .region = low_latency_region_,
               .remote_region = peer_slots_[peer],
               .channel = kDataChannel,
               .epoch = static_cast<std::uint32_t>(put.epoch),
               .at = low_latency_at(peer, ticket) + put.at,
               .remote_at = static_cast<std::size_t>(ticket) * layout_.low_latency_ticket_bytes + put.at,
               .bytes = put.bytes},
              put.deadline);
}

void Link::note_low_latency(std::uint64_t epoch, std::uint64_t puts) {
  // Relaxed: read by the same thread when it begins a later operation.
  low_latency_puts_[epoch % plan::kOperationsInFlight].store(epoch << 32 | puts, std::memory_order_relaxed);
}

bool Link::low_latency_has_left(std::uint64_t epoch) const {
  const std::uint64_t noted = low_latency_puts_[epoch % plan::kOperationsInFlight].load(std::memory_order_relaxed);
  if (epoch == 0 || noted >> 32 != epoch) return true;  // it made none
  return proxy_->completed(kDataChannel, static_cast<std::uint32_t>(epoch)) >= (noted & 0xffffffff);
}

// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// On the proxy's thread. The mirror was written before the signal; its place there is not used again before the peer
// has what it publishes and has left the operation.
void Link::on_signal(const Signal& signal) {
  if (signal.peer < 0 || signal.peer >= num_ranks_ || !reaches(signal.peer)) return;
  if (signal.flag == kCreditSignal) {
    if (signal.value < plan::kForwardSlots) send_credit(signal.peer, std::uint32_t{1} << signal.value);
    return;
  }
  const auto flag = static_cast<Flag>(signal.flag);
  const bool reply = flag == Flag::kReplied, for_good = flag == Flag::kReleased;
  if (!reply && flag != Flag::kAnnounced && signal.payload_bytes > 0) return;
  if (signal.payload_bytes > (reply ? layout_.reply_bytes : layout_.announcement_bytes)) return;
  const std::size_t at = reply ? layout_.reply(signal.epoch, rank_) : layout_.announcement(signal.epoch, rank_);
  const std::uint64_t value = for_good ? signal.value : std::uint64_t{signal.epoch} << 32 | signal.value;
  publish(signal.peer, {flag, signal.epoch, value, signal.puts}, {mirror(signal.peer) + at, signal.payload_bytes});
}

void Link::on_completed(std::uint32_t channels) {
  if (kernels_ == nullptr) {
    // Slots are awaited by their credits; only low-latency memory is used again once it has left.
    if ((channels >> kDataChannel & 1) != 0) doorbell_.ring();
    return;
  }
  const std::uint32_t now = proxy_->epoch();
  for (std::uint32_t back = 0; back < plan::kOperationsInFlight && back < now; ++back) {
    const std::uint32_t epoch = now - back, at = epoch % plan::kOperationsInFlight;
    const auto store = [epoch](std::uint64_t& word, std::uint64_t puts) {
      // Release: the network has read these bytes; whoever acquires this may write over them.
      std::atomic_ref(word).store(std::uint64_t{epoch} << 32 | puts, std::memory_order_release);
    };
    store(kernels_->left[at], proxy_->completed(kDataChannel, epoch));
    store(kernels_->chunks_left[at], chunks_left(epoch));
  }
}

// Life and death
// ---------------------------------------------------------------------------------------------------------------------

int Link::dead_rank(const std::vector<char>& ignored) const {
  for (int peer = 0; peer < num_ranks_; ++peer)
    if (!ignored[peer] && dead(peer)) return peer;
  return -1;
}

bool Link::mark_dead(int peer) {
  int there = kThere;
  // Release: nothing is published by it but the fact; a rank that left in good order has not died.
  if (!state_[peer].compare_exchange_strong(there, kDead, std::memory_order_acq_rel)) return false;
  if (kernels_ == nullptr) return true;
  // Release: whoever sees the count finds the rank.
  std::atomic_ref(kernels_->peers()[peer].dead).store(1, std::memory_order_relaxed);
  std::atomic_ref(kernels_->deaths).fetch_add(1, std::memory_order_release);
  return true;
}

void Link::report_dead(int peer, const std::string& how) {
  if (!mark_dead(peer)) return;
  proxy_->give_up(peer, how);
  ControlHead news;
  news.kind = ControlKind::kDead;
  news.rank = peer;
  for (int other = 0; other < num_ranks_; ++other)
    if (other != rank_ && !dead(other)) send(other, news);
}

int Link::silent_rank(int suspect, const std::vector<int>& ranks) {
  ControlHead call;
  call.kind = ControlKind::kCall;
  call.value = roll_calls_.fetch_add(1, std::memory_order_relaxed) + 1;
  for (int peer : ranks)
    if (peer != rank_) send(peer, call);
  const auto is_silent = [&](int peer) {
    return peer != rank_ && state_[peer].load(std::memory_order_acquire) != kLeft &&
           answered_[peer].load(std::memory_order_acquire) < call.value;
  };
  wait_until(
      doorbell_, Clock::now() + kTimeToAnswer, {}, [&] { return std::none_of(ranks.begin(), ranks.end(), is_silent); },
      [] { return true; });
  if (is_silent(suspect)) return suspect;
  const auto silent = std::find_if(ranks.begin(), ranks.end(), is_silent);
  return silent == ranks.end() ? -1 : *silent;
}

void Link::send(int peer, const ControlHead& head) { proxy_->message({peer, proxy_->epoch(), net::bytes_of(head)}); }

// What arrives, on the proxy's thread
// ---------------------------------------------------------------------------------------------------------------------

void Link::on_notice(int source, const Notice& notice) {
  if (!reaches(source)) return;
  if (notice.channel < kDataChannel) return take_chunk(source, notice.channel, notice.epoch);
  arrivals_.add(source, notice);
  const Expected& flag = expected(source, notice.epoch, Flag::kArrived);
  if (static_cast<std::uint32_t>(flag.message.epoch) == notice.epoch) store_if_complete(source, flag);
}

void Link::take_chunk(int source, int slot, std::uint32_t epoch) {
  LandedChunk landed{source, slot, {}};
  std::memcpy(&landed.head, bytes_of(landed), sizeof landed.head);
  const plan::ChunkHead& head = landed.head;
  // What does not fit together is not ours to read: its operation then ends at the deadline.
  if (static_cast<std::uint32_t>(head.epoch) != epoch || head.bytes < plan::kChunkHeadBytes ||
      head.bytes > slot_bytes_ || (head.units == 0 && kernels_ == nullptr))
    return;
  if (kernels_ != nullptr) {
    // Release: the chunk's bytes are visible to this thread.
    std::atomic_ref(kernels_->peers()[source].landed[slot]).fetch_add(1, std::memory_order_release);
    return;
  }
  {
    std::lock_guard lock(landed_mutex_);
    landed_.push_back(landed);
  }
  doorbell_.ring();
}

void Link::on_message(int source, std::uint32_t epoch, std::span<const std::byte> payload) {
  open_.wait();
  ControlHead head;
  if (payload.size() < sizeof head) return;
  std::memcpy(&head, payload.data(), sizeof head);
  switch (head.kind) {
    case ControlKind::kFlag:
      if (static_cast<std::uint32_t>(head.epoch) == epoch) take_flag(source, head, payload.subspan(sizeof head));
      return;
    case ControlKind::kCredit: return take_credit(source, head.slots);
    case ControlKind::kDead:
      if (head.rank < 0 || head.rank >= num_ranks_ || head.rank == rank_ || !mark_dead(head.rank)) return;
      proxy_->give_up(head.rank, fmt::format("rank {} says that it has ended", source));
      return doorbell_.ring();
    case ControlKind::kBye: {
      int there = kThere;
      state_[source].compare_exchange_strong(there, kLeft, std::memory_order_acq_rel);
      ControlHead answer;
      answer.kind = ControlKind::kSeenOff;
      send(source, answer);
      // Nothing after the answer: nobody would take it, and a provider that answers in order (libfabric's shm does)
      // would hold up what we send to others behind it.
      return proxy_->see_off(source);
    }
    case ControlKind::kCall: {
      ControlHead answer;
      answer.kind = ControlKind::kHere;
      answer.value = head.value;
      return send(source, answer);
    }
    case ControlKind::kHere:
      // The latest call counts: an answer that was overtaken changes nothing.
      if (answered_[source].load(std::memory_order_relaxed) < head.value)
        answered_[source].store(head.value, std::memory_order_release);
      return doorbell_.ring();
    case ControlKind::kSeenOff: knows_we_leave_[source].store(true, std::memory_order_release); return doorbell_.ring();
  }
}

void Link::take_credit(int source, std::uint32_t slots) {
  if (!reaches(source)) return;
  for (int slot = 0; slot < plan::kForwardSlots; ++slot) {
    if ((slots >> slot & 1) == 0) continue;
    // Release: the peer has read what the slot held before; pairs with take_slot(), and with the kernels' look.
    if (kernels_ != nullptr) {
      std::atomic_ref(kernels_->peers()[source].free_again[slot]).fetch_add(1, std::memory_order_release);
    } else {
      slot_free_[static_cast<std::size_t>(source) * plan::kForwardSlots + slot].store(true, std::memory_order_release);
    }
  }
  if (kernels_ == nullptr) doorbell_.ring();
}

void Link::take_flag(int source, const ControlHead& head, std::span<const std::byte> payload) {
  if (!reaches(source)) return;
  switch (head.flag) {
    case Flag::kReleased:
      // Kernels tell in the same line up to where they write no more (cuda/exchange.h); before the word that frees.
      if (kernels_ != nullptr) store_at(layout_.released(source) + sizeof(std::uint64_t), head.puts);
      return store(source, head.flag, head.epoch, head.value);
    case Flag::kExcluded: return store(source, head.flag, head.epoch, head.value);
    case Flag::kAnnounced:
    case Flag::kReplied:
    case Flag::kArrived:
    case Flag::kFinished: break;
    default: return;  // no flag at all
  }
  Expected& flag = expected(source, head.epoch, head.flag);
  if (flag.message.epoch > head.epoch) return;  // of an operation that has lost its place
  if (flag.message.epoch < head.epoch) flag = {};
  flag.message = {head.flag, head.epoch, head.value, head.puts};
  if (!take_payload(source, head, payload)) return;
  flag.pieces = head.pieces;
  ++flag.pieces_here;
  store_if_complete(source, flag);
}

// Copies a piece of what a flag publishes to its place in our window, if it has one there.
bool Link::take_payload(int source, const ControlHead& head, std::span<const std::byte> payload) {
  if (payload.empty()) return true;
  const bool reply = head.flag == Flag::kReplied;
  if (!reply && head.flag != Flag::kAnnounced) return false;
  const std::size_t room = reply ? layout_.reply_bytes : layout_.announcement_bytes;
  if (head.at > room || payload.size() > room - head.at) return false;
  const std::size_t at = reply ? layout_.reply(head.epoch, source) : layout_.announcement(head.epoch, source);
  std::memcpy(control_ + at + head.at, payload.data(), payload.size());
  return true;
}

void Link::store_if_complete(int source, const Expected& flag) {
  if (flag.pieces == 0 || flag.pieces_here < flag.pieces) return;
  const Notice data{kDataChannel, static_cast<std::uint32_t>(flag.message.epoch)};
  if (flag.message.puts > 0 && arrivals_.count(source, data) < flag.message.puts) return;
  store(source, flag.message.flag, flag.message.epoch, flag.message.value);
}

void Link::store(int source, Flag flag, std::uint64_t epoch, std::uint64_t value) {
  store_at(place_of(layout_, flag, epoch, source), value);
}

void Link::store_at(std::size_t place, std::uint64_t value) {
  std::atomic_ref<std::uint64_t> at(*reinterpret_cast<std::uint64_t*>(control_ + place));
  // This thread alone stores it, and flags only grow: an older one that came late changes nothing.
  if (at.load(std::memory_order_relaxed) >= value) return;
  // Release: what the flag publishes was stored by this thread before, or is visible to it.
  at.store(value, std::memory_order_release);
  doorbell_.ring();
}

void Link::on_peer_failed(int peer, const std::string& reason) {
  open_.wait();
  report_dead(peer, reason);
  doorbell_.ring();
}

// Chunks and slots are ours to place: this would be a mistake of this file. Whoever waits for the bytes says so.
void Link::on_bad_command(const std::string&) {}

std::string Link::describe() const {
  const FabricCounters counters = proxy_->counters();
  const std::string refused =
      counters.refused == 0 ? "0" : fmt::format("{}, last: {}", counters.refused, counters.last_refusal);
  return proxy_->report().to_string() + fmt::format("network.refused = {}\n", refused);
}

}  // namespace deep_ep::net
