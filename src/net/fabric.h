// SPDX-License-Identifier: MIT
// Between nodes: one rank's end of a network that can write into registered memory of its peers. Two engines implement
// it: libfabric (libfabric.cpp) and a network in memory for tests (loopback.h).
//
// Nothing here is ordered. Puts overtake each other, and messages overtake puts, as they do on adaptively routed
// networks. What is certain: a notice is handed out after the bytes of its own put are visible, and never twice. So
// arrival is counted: "n puts of channel c in epoch e are here" (arrivals.h), never inferred from what came last.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "deep_ep/bootstrap.h"
#include "deep_ep/config.h"

namespace deep_ep::net {

using Blob = Bootstrap::Blob;

/// Longest payload of one message.
inline constexpr std::size_t kMaxMessageBytes = 8192;
/// Channels tell apart what puts of one epoch are for, so that each kind is counted alone.
inline constexpr int kNumChannels = 16;
/// A notice whose epoch is farther than this from set_epoch() is refused: narrow networks carry its low bits only.
inline constexpr std::uint32_t kEpochReach = 100;

/// What a put tells its target once its bytes are visible there.
struct Notice {
  std::uint8_t channel = 0;  // < kNumChannels
  std::uint32_t epoch = 0;
};

/// Puts whose source bytes may be reused, counted by the engine in progress(). The caller owns it and keeps it alive
/// until done + failed equals the puts that name it, or the fabric is closed.
struct Completions {
  std::atomic<std::uint64_t> done{0};
  std::atomic<std::uint64_t> failed{0};  // the peer is lost; these bytes are free too
};

/// One write into a peer's memory.
struct Put {
  int peer = -1;
  int region = -1;         // of ours, from register_memory()
  std::uint64_t at = 0;    // offset in it
  int remote_region = -1;  // of the peer's, from import_region()
  std::uint64_t remote_at = 0;
  std::size_t bytes = 0;  // at least 1
  std::optional<Notice> notice;
  Completions* completions = nullptr;  // may be null
};

/// A few bytes for a peer, copied when they are handed over.
struct Message {
  int peer = -1;
  std::uint32_t epoch = 0;
  std::span<const std::byte> payload;
  bool is_confirmed = true;  // under way until the peer has it; else until it has left
};

/// Memory to register.
struct Memory {
  std::byte* base = nullptr;
  std::size_t bytes = 0;
};

/// Takes what arrives. Called from progress() only; must be short, and may call put() and message().
class Receiver {
 public:
  virtual ~Receiver() = default;
  /// The bytes of one put by `source` are visible to this thread, and to whomever it tells by a release store.
  virtual void on_notice(int source, const Notice& notice) = 0;
  /// The payload is valid during the call only.
  virtual void on_message(int source, std::uint32_t epoch, std::span<const std::byte> payload) = 0;
  /// Once per peer: nothing more will reach it or come from it.
  virtual void on_peer_failed(int peer, const std::string& reason) = 0;
};

/// How a network that we were given works.
struct Capabilities {
  std::string provider;             // "loopback", "tcp;ofi_rxm", "verbs;ofi_rxm", ...
  std::size_t immediate_bytes = 0;  // that a put carries to its target in the same operation: 8, 4; 0: a message
                                    // follows
  bool random_keys = false;         // region keys are ours to choose, and random
};

/// One setting and what became of it: "applied" or "not applied: <provider>: why".
struct AppliedKnob {
  std::string name, value, state;
};

struct FabricReport {
  Capabilities capabilities;
  std::string interface;  // as chosen, with the reason: "mlx5_0 (PCIe distance 2 to device 0)"
  std::vector<AppliedKnob> knobs;
  /// One line each, for logs.
  std::string to_string() const;
};

/// Counters of one endpoint since it opened.
struct FabricCounters {
  std::uint64_t puts = 0, put_bytes = 0, messages = 0;  // handed to the network
  std::uint64_t notices = 0, messages_received = 0;     // handed to the receiver
  std::uint64_t duplicates = 0;                         // of either, refused by sequence
  std::uint64_t refused = 0;                            // corrupt, a stranger's, or out of epoch
  std::string last_refusal;
};

/// One rank's endpoint. Not thread-safe: one thread at a time calls it (Proxy is that thread). No call blocks.
class Fabric {
 public:
  virtual ~Fabric() = default;  // as close()

  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;
  virtual const FabricReport& report() const = 0;

  // Opening: address() on all ranks, exchanged by the caller; connect(); then memory
  // -------------------------------------------------------------------------------------------------------------------
  /// Where peers reach this endpoint. Opaque.
  virtual Blob address() const = 0;
  /// By rank; an empty entry is a rank that is never spoken to. Throws kInvalidArgument on a malformed address.
  virtual void connect(std::span<const Blob> addresses) = 0;

  // Memory
  // -------------------------------------------------------------------------------------------------------------------
  /// Makes memory a source of puts and a target for those who get its key. Only after connect(): nobody reaches memory
  /// before he is admitted. The memory stays alive until unregister_memory() or close().
  virtual int register_memory(const Memory& memory) = 0;
  /// No put from it may be under way; those into it fail at their sources.
  virtual void unregister_memory(int region) = 0;
  /// What a peer needs in import_region(). Carries the region's length; puts beyond it are refused at their source.
  virtual Blob region_key(int region) const = 0;
  virtual int import_region(int peer, std::span<const std::byte> key) = 0;

  // Moving
  // -------------------------------------------------------------------------------------------------------------------
  /// Starts a write. False: no room now, call progress() and try again. Towards a failed peer: true, counted as failed;
  /// puts that were under way when a peer failed are counted as failed too, once nothing reads their bytes any more.
  /// Throws kInvalidArgument for what can never succeed (unknown peer or region, bytes outside of them).
  virtual bool put(const Put& put) = 0;
  /// Starts a message; the payload is copied. Return and errors as put().
  virtual bool message(const Message& message) = 0;
  /// Moves things on: completions, arrivals, failures. Returns whether anything happened.
  virtual bool progress(Receiver& receiver) = 0;
  /// The operation that this rank is in: notices and messages of epochs within kEpochReach of it are taken.
  virtual void set_epoch(std::uint32_t epoch) = 0;
  /// A descriptor that becomes readable when progress() would find something; -1: poll. `prepare_wait` must have
  /// returned true just before, else there is something already.
  virtual int wait_fd() const = 0;
  virtual bool prepare_wait() = 0;

  // State
  // -------------------------------------------------------------------------------------------------------------------
  /// Why the peer is lost; nothing while it is fine.
  virtual const std::optional<std::string>& peer_failure(int peer) const = 0;
  /// The caller knows that a peer is lost (its process ended, another rank said so): frees what waits for it. The
  /// receiver is not told.
  virtual void give_up(int peer, const std::string& reason) = 0;
  /// Of puts that have not ended; to all peers, and to one.
  virtual std::uint64_t bytes_in_flight() const = 0;
  virtual std::uint64_t bytes_in_flight_to(int peer) const = 0;
  /// Nothing is under way: all puts have ended, and the messages have been delivered (those that are confirmed) or
  /// their peers have failed.
  virtual bool is_idle() const = 0;
  virtual FabricCounters counters() const = 0;
  /// Never waits for a peer. Afterwards no memory is touched, and no call but the destructor is allowed.
  virtual void close() = 0;
};

/// Opens this rank's endpoint and connects it to all others. Collective over the group: ranks agree on a random job
/// number, on the engine, and on everybody's address. `config` is complete: what the environment adds is its maker's to
/// add (NetworkConfig::with_environment). Throws kUnsupported naming what is there where the wanted provider is not,
/// kTimeout where a rank does not come.
std::unique_ptr<Fabric> open_fabric(Bootstrap& group, const NetworkConfig& config, std::chrono::milliseconds timeout);

}  // namespace deep_ep::net
