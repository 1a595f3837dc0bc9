// SPDX-License-Identifier: MIT
// How ranks meet. A Buffer needs one collective from its ranks, an all-gather of small blobs, and only while it opens.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace deep_ep {

/// A group of ranks that can exchange small blobs. One object per rank; not for use by two threads at once.
class Bootstrap {
 public:
  using Blob = std::vector<std::byte>;
  virtual ~Bootstrap() = default;

  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;

  /// Gives every rank's blob to every rank, in rank order; blobs may differ in size. Collective.
  /// Throws kTimeout naming the ranks that are missing when `timeout` passes, kSystem if the transport breaks.
  virtual std::vector<Blob> all_gather(std::span<const std::byte> mine, std::chrono::milliseconds timeout) = 0;
};

/// Ranks that are threads of one process: entry r is for rank r's thread. The entries share one meeting point, which
/// lives as long as any of them.
std::vector<std::shared_ptr<Bootstrap>> in_process_group(int num_ranks);

/// Where ranks of several processes meet.
struct TcpRendezvous {
  std::string address = "127.0.0.1";  // where rank 0 listens
  int port = 29400;
  int rank = 0;
  int num_ranks = 1;
  std::string job = "deep_ep";   // ranks with another job name are refused
  std::uint64_t generation = 0;  // raise it to open again after a failure: ranks of an older generation are refused
  std::chrono::milliseconds timeout{60000};
  /// Known to the ranks of this group only: each proves to rank 0, and rank 0 to each, that it knows it, without
  /// sending it (HMAC-SHA256; needs OpenSSL's libcrypto at run time). Empty: whoever reaches the port and knows job,
  /// generation and sizes may join. What ranks say after they have met is not encrypted.
  std::string secret;

  /// From MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, as torchrun and most launchers set them. Where torchrun's
  /// agent itself listens on MASTER_PORT (TORCHELASTIC_USE_AGENT_STORE=True) the next port is taken; EP_MASTER_PORT
  /// overrides both. The secret is EP_RENDEZVOUS_SECRET, or what stands in the file that EP_RENDEZVOUS_SECRET_FILE
  /// names, without a newline at its end. Absent variables mean a world of one rank; present and malformed ones throw
  /// kInvalidArgument.
  static TcpRendezvous from_environment();
};

/// Meets the other ranks over TCP; rank 0 listens, all ranks may start in any order. Collective.
/// Throws kTimeout naming the ranks that did not come, kInvalidArgument if two ranks claim one number or sizes
/// disagree.
std::shared_ptr<Bootstrap> tcp_group(const TcpRendezvous& where);

/// A caller's own all-gather: (blob of this rank) -> blobs of all ranks in rank order. The callable may throw; it is
/// called only from all_gather() and must keep its own deadline.
using AllGather = std::function<std::vector<Bootstrap::Blob>(const Bootstrap::Blob&)>;
std::shared_ptr<Bootstrap> callback_group(int rank, int num_ranks, AllGather all_gather);

}  // namespace deep_ep
