// SPDX-License-Identifier: MIT
// The thread that owns a rank's network endpoint. Workers hand it puts through a queue (fifo.h) and messages; it moves
// them, and tells a receiver what arrived. Between queue and network it keeps a list for each peer, so that one that
// takes nothing does not hold up the others.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "net/fabric.h"
#include "net/fifo.h"
#include "net/wake.h"

namespace deep_ep::net {

/// What a proxy calls, on its thread. Short: store words, fill queues, ring doorbells. None is called after close().
class ProxyReceiver : public Receiver {
 public:
  /// Proxy::completed() says more than before, for these channels (a bit for each).
  virtual void on_completed(std::uint32_t /*channels*/) {}
  /// A kernel asks for a flag to be sent, with what it published before this signal.
  virtual void on_signal(const Signal&) {}
  /// A command that can never succeed came from the queue (offsets, regions); it was dropped and counts as completed.
  virtual void on_bad_command(const std::string& why) = 0;
};

struct ProxyOptions {
  std::size_t bytes_in_flight = 32 << 20;  // of puts at once; a quarter of it towards one peer
  int core = -1;                           // to run on; -1: where the system likes
  int spins = 0;                           // rounds without work before it sleeps: many only where it has a core
};

/// A core for the proxy of the local_rank-th of local_ranks ranks with so many workers each, from the machine's last
/// one down; -1 where there are not enough for each worker and each proxy.
int proxy_core(int local_rank, int local_ranks, int workers_per_rank);

/// Thread-safe but for start() and close(). Memory is registered, and keys imported, before the proxy gets the fabric.
class Proxy {
 public:
  using Clock = std::chrono::steady_clock;

  /// Starts the thread. The receiver lives until close() has returned.
  Proxy(std::unique_ptr<Fabric> fabric, ProxyReceiver& receiver, const ProxyOptions& options);
  ~Proxy();  // as close()
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  /// Hands over one put, whose bytes this thread has written, or acquired from those who did; streaming stores are
  /// fenced by then, for no release store orders them. Waits while the queue is full; false if it still is at the
  /// deadline. Throws kInvalidArgument on numbers that do not fit a command; the rest is found out by the proxy
  /// (on_bad_command).
  bool put(const Command& command, Clock::time_point deadline);
  /// Hands over a message; the payload is copied.
  void message(const Message& message);
  /// The operation that this rank is in (Fabric::set_epoch). Before the first put or message of it.
  void set_epoch(std::uint32_t epoch);
  std::uint32_t epoch() const { return epoch_.load(std::memory_order_relaxed); }
  /// The peer leaves, and waits for no more than was handed over before: later messages to it are dropped.
  void see_off(int peer);
  /// The peer is lost, the caller knows why: frees what waits for it.
  void give_up(int peer, const std::string& reason);
  /// A queue that kernels write, in pinned host memory; it lives until close(). From now on the proxy polls.
  void add_device_fifo(FifoMemory& memory);

  /// Puts of this channel and epoch whose source bytes may be reused, failed ones included. Acquires what the network
  /// read. 0 for an epoch that is 16 or more behind the newest of its channel.
  std::uint64_t completed(int channel, std::uint32_t epoch) const;
  /// Waits until all that was handed over before has left, or its peer has failed: messages are delivered (if they are
  /// confirmed), puts have ended (over TCP a put's bytes may still be in the socket; a message sent after it and
  /// delivered covers it). False at the deadline.
  bool flush(Clock::time_point deadline);

  std::uint64_t bytes_in_flight() const { return bytes_in_flight_.load(std::memory_order_relaxed); }
  FabricCounters counters() const;
  const FabricReport& report() const { return report_; }

  /// Stops the thread and closes the fabric, whatever is under way; never waits for a peer.
  void close();

 private:
  static constexpr std::uint32_t kDepth = 16;           // epochs with counts of their own
  static constexpr std::size_t kMaxHeldPerPeer = 4096;  // commands between queue and network

  // Puts of one (channel, epoch). Its counts are the engine's to write, so it lives until all have ended.
  struct Tally {
    std::uint32_t epoch = 0;
    int channel = 0;
    std::uint64_t puts = 0;
    std::uint64_t published = 0;
    bool is_busy = false;  // in busy_
    std::list<Tally>::iterator self;
    Completions completions;
    std::uint64_t ended() const {
      return completions.done.load(std::memory_order_relaxed) + completions.failed.load(std::memory_order_relaxed);
    }
  };
  struct Outgoing {
    std::uint32_t epoch;
    Blob payload;
    bool is_confirmed;
  };

  void run();
  bool use_network();
  bool take_requests(bool& found);
  bool take_commands();
  void follow_kernels(const FifoReader& reader);
  void hold(const Command& command);
  bool send_messages();
  bool send_puts();
  bool start(const Command& command);
  Tally& tally_of(int channel, std::uint32_t epoch);
  bool is_current(const Tally& tally) const { return current_[tally.epoch % kDepth][tally.channel] == &tally; }
  void publish_completions();
  bool has_nothing_left() const;
  void answer_flushes();
  void sleep(std::uint64_t seen);
  void request(std::function<void()> what);

  // The thread's own
  std::unique_ptr<Fabric> fabric_;
  ProxyReceiver& receiver_;
  const ProxyOptions options_;
  const FabricReport report_;
  std::deque<FifoReader> readers_;
  bool is_broken_ = false;                      // the network threw
  bool polls_ = false;                          // there is a queue whose writers cannot ring
  std::vector<std::deque<Command>> held_;       // by peer
  bool has_room_ = true;                        // in every list of held_
  std::vector<std::deque<Outgoing>> outgoing_;  // by peer
  std::vector<char> has_left_;                  // by peer: seen off
  std::list<Tally> tallies_;                    // those of current_, and others with puts under way
  std::vector<Tally*> busy_;                    // with puts that have not ended, or have not been published as ended
  std::array<std::array<Tally*, kNumChannels>, kDepth> current_{};  // [epoch][channel]
  int idle_rounds_ = 0;
  bool is_flushing_ = false;  // somebody waits in flush()

  // Shared
  std::unique_ptr<FifoMemory> memory_;
  FifoWriter writer_;
  Wake wake_;
  std::atomic<std::uint32_t> epoch_{0};
  std::atomic<std::uint64_t> bytes_in_flight_{0};
  std::array<std::array<std::atomic<std::uint64_t>, kNumChannels>, kDepth> completed_{};  // epoch << 32 | count
  mutable std::mutex mutex_;                                                              // guards what follows
  std::condition_variable flushed_;
  std::vector<std::function<void()>> requests_;  // run by the thread
  std::uint64_t flushes_wanted_ = 0, flushes_done_ = 0;
  FabricCounters counters_;
  bool stop_ = false;

  std::thread thread_;
};

}  // namespace deep_ep::net
