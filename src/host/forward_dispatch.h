// SPDX-License-Identifier: MIT
// The second way of delivering rows: a token crosses once to each node that wants it, to the rank on its source's rail,
// which passes it on to the ranks of that node. Both ends are here: every rank is a source, and passes on for others.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "host/context.h"
#include "host/delivery.h"
#include "plan/forwarding.h"

namespace deep_ep::host {

class ForwardedDispatch {
 public:
  ForwardedDispatch(Context& context, const DispatchCall& call, const Epoch& epoch);
  ~ForwardedDispatch();  // however the call ends, no slot is lost
  ForwardedDispatch(const ForwardedDispatch&) = delete;
  ForwardedDispatch& operator=(const ForwardedDispatch&) = delete;

  /// Decides what crosses, from every selection's rank: [num_tokens, num_topk], -1: none.
  void route(const std::int32_t* dst_rank);
  /// What an announcement to that rank says of it.
  std::int64_t units_to(int peer) const;
  /// Writes a token into the chunk of each far node that it goes to. Any worker, each token once.
  void write(const TokenInTransit& token) const;
  /// Has `send` deliver and write() all tokens, a range at a time as slots at the peers allow, and passes on what comes
  /// meanwhile; tells our node of each far source whose rows are all there. After all announcements and replies.
  void run(const Delivery& delivery, const std::vector<Destination>& destinations,
           const std::function<void(std::int64_t begin, std::int64_t end)>& send);

 private:
  // Our tokens to one node.
  struct Outgoing {
    int node = -1;
    int rail = -1;
    std::vector<std::int32_t> before;  // [num_tokens + 1]: how many of the tokens before each go there
    std::vector<int> slots;            // of each chunk begun
    std::int64_t chunks_sent = 0;
    std::int64_t units() const { return before.back(); }
  };

  std::int64_t reachable(std::int64_t begin);
  std::int64_t furthest(Outgoing& to, std::int64_t limit);
  void send_chunks(std::int64_t tokens_done);
  void count_early_puts() const;
  bool pass_on();
  void pass_on(const LandedChunk& chunk);
  void pass_on_units(const LandedChunk& chunk, std::int64_t begin, std::int64_t end) const;
  void finish_source(int source);
  bool can_move() const;
  int keeps_us_waiting() const;

  Context& context_;
  Link& link_;
  const DispatchCall& call_;
  const Epoch& epoch_;
  const plan::TokenUnit unit_;
  const plan::Chunking chunking_;
  const std::vector<int> active_;
  std::vector<Outgoing> outgoing_;
  std::vector<std::int64_t> missing_;  // [num_ranks] units that each far source has yet to bring; -1: not through us
  std::int64_t tokens_sent_ = 0;
  const Delivery* delivery_ = nullptr;
  const std::vector<Destination>* destinations_ = nullptr;
};

}  // namespace deep_ep::host
