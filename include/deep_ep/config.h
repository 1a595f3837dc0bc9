// SPDX-License-Identifier: MIT
// What ranks agree on before they exchange anything: topology, capacities, budgets, and where each expert lives.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace deep_ep {

/// Which ranks host which expert. Experts may be spread unevenly and hosted by several ranks (replicas). Immutable,
/// shared freely between calls and threads; all ranks must use equal placements in one call (checked by fingerprint).
class Placement {
 public:
  /// One copy of an expert: the rank that hosts it, and its position among that rank's experts.
  struct Replica {
    std::int32_t rank = -1;
    std::int32_t slot = -1;
  };

  /// Which replica a token takes. Both are pure functions of (expert, source rank, source token): no state, no
  /// randomness.
  enum class Policy : std::uint8_t {
    kSpread,      // replica number (source rank + source token) modulo the number of replicas
    kLocalFirst,  // the source rank's own replica, else those of its node spread as above, else all spread as above
  };

  /// Experts in order, `num_experts / num_ranks` each; the first `num_experts % num_ranks` ranks host one more.
  static std::shared_ptr<const Placement> even(int num_experts, int num_ranks);

  /// hosted[rank] lists the experts of that rank, slot by slot. Every expert 0 .. num_experts-1 must be hosted
  /// somewhere; one rank may host an expert once at most. Throws kInvalidArgument naming the first expert or rank that
  /// breaks this.
  static std::shared_ptr<const Placement> from_lists(const std::vector<std::vector<int>>& hosted, int num_experts,
                                                     Policy policy = Policy::kSpread);

  int num_experts() const { return static_cast<int>(first_replica_.size()) - 1; }
  int num_ranks() const { return static_cast<int>(hosted_.size()); }
  int num_slots(int rank) const { return static_cast<int>(hosted_[rank].size()); }
  int max_slots() const { return max_slots_; }
  int expert_at(int rank, int slot) const { return hosted_[rank][slot]; }
  Policy policy() const { return policy_; }
  std::span<const Replica> replicas(int expert) const {
    return {replicas_.data() + first_replica_[expert],
            static_cast<std::size_t>(first_replica_[expert + 1] - first_replica_[expert])};
  }
  /// Equal for equal placements, on every machine.
  std::uint64_t fingerprint() const { return fingerprint_; }
  /// [num_experts + 1]: where each expert's replicas begin in all_replicas().
  std::span<const std::int32_t> first_replica() const { return first_replica_; }
  std::span<const Replica> all_replicas() const { return replicas_; }

 private:
  Placement() = default;
  std::vector<std::vector<int>> hosted_;     // [rank][slot] -> expert
  std::vector<std::int32_t> first_replica_;  // [expert + 1] -> index into replicas_
  std::vector<Replica> replicas_;            // by expert, then rank
  Policy policy_ = Policy::kSpread;
  int max_slots_ = 0;
  std::uint64_t fingerprint_ = 0;
};

/// The largest low-latency call a buffer must serve. Its slots are fixed memory, so they are sized up front; a call of
/// other proportions is served too where its slots fit into as many bytes.
struct LowLatencyCapacity {
  int max_tokens_per_rank = 0;  // 0: no low-latency calls on this buffer
  std::size_t row_bytes = 0;    // of one token on the wire, the larger of dispatch and combine: hidden * 2 for BF16
  int num_topk = 8;
  std::size_t side_bytes = 1024;  // scales and side tensors of one token, together
};

/// Bytes of one part of a rank's window, and why they are there.
struct MemoryRegion {
  std::string name;
  std::size_t bytes = 0;
  std::string why;
};

/// Every byte that a buffer will ever map, per rank, before anything is allocated.
struct MemoryPlan {
  std::vector<MemoryRegion> regions;
  std::size_t total_bytes = 0;  // the sum of the regions: of the window, and of what lies beside it for other nodes
  /// A table for people.
  std::string to_string() const;
};

/// The network between nodes. A field that is left at its default takes the environment variable beside it, where that
/// is set (present and malformed is an error). Ranks agree on `provider`; the rest is each rank's own. What the chosen
/// provider does not apply is listed in the network's report as "not applied: <provider>".
struct NetworkConfig {
  /// EP_NETWORK_PROVIDER. A libfabric provider by name ("tcp;ofi_rxm", "shm", "verbs", "efa", "cxi"), "loopback"
  /// (in memory, ranks as threads of one process, for tests), "auto": the best one that every rank has. Empty: none
  /// where all ranks run on one machine, whose logical nodes then share memory like one node; else as "auto".
  std::string provider;
  /// EP_NETWORK_INTERFACE. Name of the network interface or NIC ("eth0", "mlx5_0"), or an IP address of it; empty: the
  /// one nearest by PCIe to this rank's GPU, or what the provider lists first.
  std::string interface;
  /// PCI address ("0000:1b:00.0") of the device that the interface should be near to; empty: of this rank's GPU, if the
  /// buffer is on one.
  std::string near_pci_device;
  /// EP_OVERRIDE_RDMA_SL, else NVSHMEM_IB_SL. InfiniBand service level 0 .. 15; -1: not set.
  int service_level = -1;
  /// EP_NETWORK_TRAFFIC_CLASS, else NVSHMEM_IB_TRAFFIC_CLASS. 0 .. 255 (RoCE: DSCP * 4); -1: not set.
  int traffic_class = -1;
  /// NVSHMEM_ENABLE_ADAPTIVE_ROUTING. 1: low-latency calls prefer the service level that the subnet manager routes
  /// adaptively; 0: they do not; -1: not set. Either is correct: nothing here relies on the order of writes.
  int adaptive_routing = -1;
  /// Bytes of writes that one rank may have under way; 0: EP_NETWORK_MB_IN_FLIGHT, else 32 MiB.
  std::size_t bytes_in_flight = 0;
  /// The same with what the environment adds.
  NetworkConfig with_environment() const;
  /// One line per field.
  std::string to_string() const;
};

/// What all ranks of a buffer agree on; compared when it opens.
struct Config {
  int max_experts = 1024;           // largest number of experts (with replicas: of hosted copies) in any call
  std::vector<int> ranks_per_node;  // logical nodes: empty = one node; {4} = nodes of four; {4, 3} = exactly these two
  LowLatencyCapacity low_latency;
  /// Budget for packed outputs (what dispatch returns), buffers of Buffer::allocate and combine input that must be
  /// staged; pages are taken from the system only as they are first used. 0: an eighth of this machine's memory per
  /// rank, 16 GiB at most.
  /// The last quarter is kept for landing: results that do not fit before it are copied out to ordinary memory.
  std::size_t arena_bytes = 0;
  int num_tickets = 4;  // sets of low-latency slots: a ticket may stay open while this many - 1 more operations are
                        // called
  std::chrono::milliseconds timeout{30000};       // deadline of every wait for a peer, unless a call brings its own
  std::chrono::milliseconds open_timeout{60000};  // until all ranks have opened the buffer
  NetworkConfig network;                          // used only where ranks_per_node says that there are several nodes
  /// Between nodes: what a high-throughput call sends at once to the rank that passes it on inside its node. A row of
  /// any call, with what travels beside it, must fit, and all rows of one token of a combine into six. Each rank keeps
  /// eight such slots for each rank of other nodes, and as many to send from; pages are taken from the system as they
  /// are first used.
  std::size_t forward_slot_bytes = std::size_t{128} << 10;

  /// The regions of each rank's window in a group of so many. Throws kInvalidArgument where a field makes no sense.
  MemoryPlan plan(int num_ranks) const;
  /// One line per field that ranks agree on, for logs and error messages; `network` prints itself.
  std::string to_string() const;
};

/// Which memory a buffer moves, and with what.
enum class BackendKind : std::uint8_t {
  kHost,  // ordinary memory, by threads
  kCuda,  // tensors are device pointers of one GPU; by kernels. Only where the library was built with CUDA
};

/// What one rank may choose for itself. The backend is the same on all ranks.
struct Options {
  int num_workers = 0;  // threads for one operation, the caller's included; 0: cores / ranks of this machine, less one
                        // for a network. kCuda: SMs of a kernel; 0: chosen for each call
  bool pin_workers = false;  // bind worker threads to cores, and the network's where there are cores for all
  BackendKind backend = BackendKind::kHost;
  int cuda_device = -1;  // kCuda: the GPU of this rank; -1: the calling thread's current one
};

/// One high-throughput exchange, for sizing an arena.
struct ExchangeShape {
  std::int64_t rows = 0;      // that one rank receives, padding included
  std::int64_t tokens = 0;    // distinct (source rank, token) pairs among them; 0: as many as rows
  std::size_t row_bytes = 0;  // of x
  int num_scales = 0;         // per row
  int num_topk = 8;
  bool topk_weights = true;
  bool topk_idx_64 = true;     // ids as int64
  std::size_t side_bytes = 0;  // per token, all side tensors together
};

/// Arena bytes that the output of one such dispatch takes.
std::size_t arena_bytes_for(const ExchangeShape& shape);

/// The other way round: how many rows of this shape an arena of so many bytes holds at once.
std::int64_t arena_rows(std::size_t arena_bytes, const ExchangeShape& shape);

}  // namespace deep_ep
