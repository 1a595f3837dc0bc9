// SPDX-License-Identifier: MIT
// Puts are RMA writes. Where the provider carries at least 4 bytes to the target's completion queue with a write, that
// is the notice (fi_writedata); else the write asks for its delivery to be confirmed, and then a message is the notice.
#include "net/libfabric.h"

#include <fmt/format.h>
#include <rdma/fi_rma.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <numeric>
#include <utility>

#include "check.h"
#include "net/libfabric_memory.h"
#include "net/libfabric_open.h"
#include "net/wire.h"

namespace deep_ep::net {

namespace {

constexpr int kReceives = 64;           // messages that may arrive between two calls of progress()
constexpr int kMessagesPerSlab = 16;    // buffers for outgoing messages are allocated so many at a time,
constexpr int kMessagesToOnePeer = 64;  // and one peer that takes none holds no more than this
constexpr int kCompletionsAtOnce = 64;

enum class OpKind : std::uint8_t { kReceive, kMessage, kPut, kPutThenNotice };

/// An operation that libfabric has; `context` is what it knows it by, and may scribble into.
struct Op {
  fi_context2 context{};
  OpKind kind = OpKind::kReceive;
  int peer = -1;
  std::size_t bytes = 0;  // of a put
  Completions* completions = nullptr;
  Notice notice;
  std::byte* buffer = nullptr;  // of a message
  void* descriptor = nullptr;
  bool is_under_way = false;
};

struct PeerState {
  fi_addr_t address = FI_ADDR_NOTAVAIL;
  std::vector<RegionKey> regions;
  std::uint64_t bytes_in_flight = 0;
  int puts = 0, messages = 0;  // under way
  std::optional<std::string> failure;
};

class Libfabric final : public Fabric {
 public:
  explicit Libfabric(const EngineInput& input)
      : rank_(input.rank),
        num_ranks_(input.num_ranks),
        objects_storage_(open_libfabric_objects(input.settings)),
        objects_(*objects_storage_),
        gate_(input.job, input.rank, input.num_ranks),
        peers_(input.num_ranks),
        memory_(objects_) {
    const fi_info& info = *objects_.info;
    immediate_bytes_ = std::min(info.domain_attr->cq_data_size, input.most_immediate_bytes);
    immediate_bytes_ = immediate_bytes_ >= 8 ? 8 : immediate_bytes_ >= 4 ? 4 : 0;
    if (!Gate::can_name(num_ranks_, immediate_bytes_)) immediate_bytes_ = 0;
    report_.capabilities = {input.settings.provider, immediate_bytes_, !objects_.needs(FI_MR_PROV_KEY)};
    report_.interface = objects_.interface;
    report_.knobs = libfabric_knobs(input.settings, info);
  }
  ~Libfabric() override { close(); }
  Libfabric(const Libfabric&) = delete;
  Libfabric& operator=(const Libfabric&) = delete;

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }
  const FabricReport& report() const override { return report_; }

  Blob address() const override {
    std::size_t bytes = 0;
    (void)fi_getname(&objects_.endpoint->fid, nullptr, &bytes);  // says how long it is
    Blob name(bytes);
    require_ok(fi_getname(&objects_.endpoint->fid, name.data(), &bytes), "fi_getname");
    name.resize(bytes);
    return name;
  }

  void connect(std::span<const Blob> addresses) override {
    require_eq(static_cast<int>(addresses.size()), num_ranks_, "addresses == num_ranks");
    const std::size_t bytes = address().size();
    for (int peer = 0; peer < num_ranks_; ++peer) {
      if (addresses[peer].empty()) continue;
      require(addresses[peer].size() == bytes, "the address of rank {} has {} bytes, ours has {}", peer,
              addresses[peer].size(), bytes);
      const int inserted =
          fi_av_insert(objects_.addresses.get(), addresses[peer].data(), 1, &peers_[peer].address, 0, nullptr);
      require(inserted == 1, "the address of rank {} is none that {} knows", peer, report_.capabilities.provider);
    }
    post_receives();
    is_connected_ = true;
  }

  int register_memory(const Memory& memory) override {
    require(is_connected_, "register_memory before connect: nobody is admitted yet");
    return memory_.add(memory);
  }

  void unregister_memory(int region) override { memory_.remove(region); }

  Blob region_key(int region) const override {
    const RegionKey key = memory_.key(region);
    Blob blob(sizeof key);
    std::memcpy(blob.data(), &key, sizeof key);
    return blob;
  }

  int import_region(int peer, std::span<const std::byte> key) override {
    require(peer >= 0 && peer < num_ranks_, "import_region: peer {} of {}", peer, num_ranks_);
    require_eq(key.size(), sizeof(RegionKey), "import_region: bytes of the key");
    std::memcpy(&peers_[peer].regions.emplace_back(), key.data(), key.size());
    return static_cast<int>(peers_[peer].regions.size()) - 1;
  }

  bool put(const Put& put) override {
    const RegionKey& target = check(put);
    PeerState& peer = peers_[put.peer];
    if (peer.failure) {
      if (put.completions != nullptr) put.completions->failed.fetch_add(1, std::memory_order_release);
      return true;
    }
    const bool carries = put.notice && immediate_bytes_ > 0;
    Op& op = take_op(put_ops_, free_puts_);
    op.kind = put.notice && !carries ? OpKind::kPutThenNotice : OpKind::kPut;
    op.peer = put.peer;
    op.bytes = put.bytes;
    op.completions = put.completions;
    if (put.notice) op.notice = *put.notice;
    if (!started(write(put, target, op, carries), op, free_puts_)) return false;
    ++peer.puts;
    peer.bytes_in_flight += put.bytes;
    bytes_in_flight_ += put.bytes;
    ++counters_.puts;
    counters_.put_bytes += put.bytes;
    return true;
  }

  bool message(const Message& message) override {
    const int peer = message.peer;
    require(peer >= 0 && peer < num_ranks_ && peers_[peer].address != FI_ADDR_NOTAVAIL, "message: peer {} of {}", peer,
            num_ranks_);
    require(message.payload.size() <= kMaxMessageBytes, "message: {} bytes, at most {}", message.payload.size(),
            kMaxMessageBytes);
    return send(message, MessageKind::kPayload);
  }

  bool progress(Receiver& receiver) override {
    bool found = false;
    std::array<fi_cq_data_entry, kCompletionsAtOnce> entries;
    const auto count = fi_cq_read(objects_.completions.get(), entries.data(), entries.size());
    for (std::int64_t i = 0; i < count; ++i) complete(entries[static_cast<std::size_t>(i)], receiver);
    found |= count > 0;
    if (count == -FI_EAVAIL) found |= read_error();
    found |= send_late_notices();
    for (const int peer : std::exchange(failed_, {})) {
      receiver.on_peer_failed(peer, *peers_[peer].failure);
      found = true;
    }
    return found;
  }

  void set_epoch(std::uint32_t epoch) override { gate_.set_epoch(epoch); }

  int wait_fd() const override { return objects_.wait_fd; }
  bool prepare_wait() override {
    if (!late_notices_.empty() || !failed_.empty()) return false;
    fid* queue = &objects_.completions->fid;
    return fi_trywait(objects_.fabric.get(), &queue, 1) == 0;
  }

  const std::optional<std::string>& peer_failure(int peer) const override { return peers_.at(peer).failure; }

  void give_up(int peer, const std::string& reason) override {
    if (!peers_.at(peer).failure) peers_[peer].failure = reason;
  }

  std::uint64_t bytes_in_flight() const override { return bytes_in_flight_; }
  std::uint64_t bytes_in_flight_to(int peer) const override { return peers_.at(peer).bytes_in_flight; }

  // What was sent to a failed peer ends whenever libfabric gives up, which may be much later; nobody waits for it.
  bool is_idle() const override {
    return late_notices_.empty() && std::all_of(peers_.begin(), peers_.end(), [](const PeerState& peer) {
             return peer.failure || peer.puts + peer.messages == 0;
           });
  }

  FabricCounters counters() const override {
    FabricCounters counters = counters_;
    counters.refused = gate_.refused();
    counters.duplicates = gate_.duplicates();
    counters.last_refusal = gate_.last_refusal();
    return counters;
  }

  void close() override {
    if (!objects_storage_) return;
    // Without an endpoint nothing is read or written any more; but memory that is bound to it goes first.
    if (!objects_.needs(FI_MR_ENDPOINT)) objects_.endpoint.reset();
    memory_.clear();
    slabs_.clear();
    objects_storage_.reset();
    for (Op& op : put_ops_)
      if (op.is_under_way && op.completions != nullptr) op.completions->failed.fetch_add(1, std::memory_order_release);
    put_ops_.clear();
  }

 private:
  struct Slab {
    std::vector<std::byte> bytes;
    FidPtr<fid_mr> registration;
  };

  const RegionKey& check(const Put& put) {
    require(put.peer >= 0 && put.peer < num_ranks_ && peers_[put.peer].address != FI_ADDR_NOTAVAIL,
            "put: peer {} of {}", put.peer, num_ranks_);
    const std::size_t there = memory_.at(put.region).memory.bytes;
    require(put.bytes > 0 && put.at <= there && put.bytes <= there - put.at, "put: {} bytes at {} of a region of {}",
            put.bytes, put.at, there);
    const auto& regions = peers_[put.peer].regions;
    require(put.remote_region >= 0 && put.remote_region < static_cast<int>(regions.size()),
            "put: remote region {} of {} of rank {}", put.remote_region, regions.size(), put.peer);
    const RegionKey& target = regions[put.remote_region];
    require(put.remote_at <= target.bytes && put.bytes <= target.bytes - put.remote_at,
            "put: {} bytes at {} of rank {}'s region of {}", put.bytes, put.remote_at, put.peer, target.bytes);
    require(!put.notice || put.notice->channel < kNumChannels, "put: channel {} of {}", put.notice->channel,
            kNumChannels);
    return target;
  }

  // Operations
  // -------------------------------------------------------------------------------------------------------------------

  static Op& take_op(std::deque<Op>& ops, std::vector<Op*>& free) {
    if (free.empty()) return ops.emplace_back();
    Op& op = *free.back();
    free.pop_back();
    return op;
  }

  // Whether libfabric took the operation; it is free again if not. Throws what is no lack of room.
  bool started(std::int64_t result, Op& op, std::vector<Op*>& free) {
    op.is_under_way = result == 0;
    if (result == 0) return true;
    free.push_back(&op);
    if (result == -FI_EAGAIN || result == -FI_ENOMEM) return false;
    lose(op.peer, LibfabricLibrary::get().text(result));
    return false;  // the next try finds the peer failed
  }

  std::int64_t write(const Put& put, const RegionKey& target, Op& op, bool carries) {
    const LibfabricMemory::Region& mine = memory_.at(put.region);
    std::byte* const from = mine.memory.base + put.at;
    void* const descriptor = fi_mr_desc(mine.registration.get());
    const std::uint64_t to = target.base + put.remote_at;
    const fi_addr_t address = peers_[put.peer].address;
    if (carries) {
      const std::uint64_t word = gate_.seal(put.peer, *put.notice, immediate_bytes_);
      return fi_writedata(objects_.endpoint.get(), from, put.bytes, descriptor, word, address, to, target.key, &op);
    }
    if (op.kind == OpKind::kPut)
      return fi_write(objects_.endpoint.get(), from, put.bytes, descriptor, address, to, target.key, &op);
    const iovec local{from, put.bytes};
    const fi_rma_iov remote{to, put.bytes, target.key};
    void* descriptors[1] = {descriptor};
    const fi_msg_rma message{&local, descriptors, 1, address, &remote, 1, &op, 0};
    return fi_writemsg(objects_.endpoint.get(), &message, FI_COMPLETION | FI_DELIVERY_COMPLETE);
  }

  bool send(const Message& what, MessageKind kind) {
    PeerState& peer = peers_[what.peer];
    if (peer.failure) return true;
    if (peer.messages >= kMessagesToOnePeer) return false;
    if (free_messages_.empty()) add_message_slab();
    Op& op = *free_messages_.back();
    free_messages_.pop_back();
    const Blob wire = gate_.seal(what.peer, what.epoch, what.payload, kind);
    std::memcpy(op.buffer, wire.data(), wire.size());
    op.peer = what.peer;
    const iovec local{op.buffer, wire.size()};
    void* descriptors[1] = {op.descriptor};
    const fi_msg message{&local, descriptors, 1, peer.address, &op, 0};
    // Delivered, not only sent: is_idle() then means that peers have all that they were told. It costs an answer.
    const std::uint64_t flags = FI_COMPLETION | (what.is_confirmed ? FI_DELIVERY_COMPLETE : 0);
    const auto result = fi_sendmsg(objects_.endpoint.get(), &message, flags);
    if (!started(result, op, free_messages_)) return false;
    ++peer.messages;
    ++counters_.messages;
    return true;
  }

  Slab& add_slab(int buffers) {
    Slab& slab = slabs_.emplace_back();
    slab.bytes.resize(kMaxWireBytes * static_cast<std::size_t>(buffers));
    if (objects_.needs(FI_MR_LOCAL))
      slab.registration = memory_.registered({slab.bytes.data(), slab.bytes.size()}, FI_SEND | FI_RECV);
    return slab;
  }

  void add_message_slab() {
    Slab& slab = add_slab(kMessagesPerSlab);
    for (int i = 0; i < kMessagesPerSlab; ++i) free_messages_.push_back(&new_op(slab, i, OpKind::kMessage));
  }

  Op& new_op(Slab& slab, int place, OpKind kind) {
    Op& op = message_ops_.emplace_back();
    op.kind = kind;
    op.buffer = slab.bytes.data() + kMaxWireBytes * static_cast<std::size_t>(place);
    op.descriptor = slab.registration ? fi_mr_desc(slab.registration.get()) : nullptr;
    return op;
  }

  void post_receives() {
    Slab& slab = add_slab(kReceives);
    for (int i = 0; i < kReceives; ++i) post(new_op(slab, i, OpKind::kReceive));
  }

  void post(Op& op) {
    const auto result = fi_recv(objects_.endpoint.get(), op.buffer, kMaxWireBytes, op.descriptor, FI_ADDR_UNSPEC, &op);
    require_ok(result, "fi_recv");
  }

  // Completions
  // -------------------------------------------------------------------------------------------------------------------

  void complete(const fi_cq_data_entry& entry, Receiver& receiver) {
    if ((entry.flags & FI_REMOTE_CQ_DATA) != 0 && (entry.flags & FI_RECV) == 0)
      return take_notice(entry.data, receiver);
    if (entry.op_context == nullptr) return;
    Op& op = *static_cast<Op*>(entry.op_context);
    if (op.kind == OpKind::kReceive) return take_message(op, entry.len, receiver);
    end(op, false);
  }

  void take_notice(std::uint64_t word, Receiver& receiver) {
    const auto opened = gate_.open(word, immediate_bytes_);
    if (!opened) return;
    ++counters_.notices;
    receiver.on_notice(opened->source, opened->notice);
  }

  void take_message(Op& op, std::size_t bytes, Receiver& receiver) {
    const auto opened = gate_.open(std::span(op.buffer, std::min(bytes, kMaxWireBytes)));
    if (opened && opened->kind == MessageKind::kNotice) {
      ++counters_.notices;
      receiver.on_notice(opened->source, {std::to_integer<std::uint8_t>(opened->payload[0]), opened->epoch});
    } else if (opened) {
      ++counters_.messages_received;
      receiver.on_message(opened->source, opened->epoch, opened->payload);
    }
    post(op);
  }

  // A put or a message of ours has ended.
  void end(Op& op, bool failed) {
    op.is_under_way = false;
    PeerState& peer = peers_[op.peer];
    if (op.kind == OpKind::kMessage) {
      --peer.messages;
      free_messages_.push_back(&op);
      return;
    }
    --peer.puts;
    peer.bytes_in_flight -= op.bytes;
    bytes_in_flight_ -= op.bytes;
    if (op.kind == OpKind::kPutThenNotice && !failed) late_notices_.emplace_back(op.peer, op.notice);
    // Release: whoever sees the count may write the bytes again, which the network has read.
    if (op.completions != nullptr)
      (failed ? op.completions->failed : op.completions->done).fetch_add(1, std::memory_order_release);
    free_puts_.push_back(&op);
  }

  bool send_late_notices() {
    bool found = false;
    while (!late_notices_.empty()) {
      const auto& [peer, notice] = late_notices_.front();
      const std::byte channel{notice.channel};
      if (!send({peer, notice.epoch, {&channel, 1}}, MessageKind::kNotice)) break;
      late_notices_.pop_front();
      found = true;
    }
    return found;
  }

  bool read_error() {
    fi_cq_err_entry error{};
    if (fi_cq_readerr(objects_.completions.get(), &error, 0) != 1) return false;
    if (error.op_context == nullptr) {
      gate_.refuse(fmt::format("the network: {}", LibfabricLibrary::get().text(-error.err)));
      return true;
    }
    Op& op = *static_cast<Op*>(error.op_context);
    if (op.kind == OpKind::kReceive) {
      gate_.refuse(fmt::format("a message: {}", LibfabricLibrary::get().text(-error.err)));
      post(op);
      return true;
    }
    lose(op.peer, LibfabricLibrary::get().text(-error.err));
    end(op, true);
    return true;
  }

  void lose(int peer, const std::string& reason) {
    if (peers_[peer].failure) return;
    peers_[peer].failure = reason;
    failed_.push_back(peer);
  }

  const int rank_, num_ranks_;
  std::optional<LibfabricObjects> objects_storage_;  // nothing once closed
  LibfabricObjects& objects_;
  Gate gate_;
  FabricReport report_;
  FabricCounters counters_;
  std::size_t immediate_bytes_ = 0;
  bool is_connected_ = false;
  std::vector<PeerState> peers_;
  LibfabricMemory memory_;
  std::deque<Slab> slabs_;
  std::deque<Op> message_ops_, put_ops_;
  std::vector<Op*> free_messages_, free_puts_;
  std::deque<std::pair<int, Notice>> late_notices_;  // their puts are delivered
  std::vector<int> failed_;                          // that the receiver has not been told of
  std::uint64_t bytes_in_flight_ = 0;
};

}  // namespace

std::unique_ptr<Fabric> open_libfabric(const EngineInput& input) { return std::make_unique<Libfabric>(input); }

}  // namespace deep_ep::net
