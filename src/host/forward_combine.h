// SPDX-License-Identifier: MIT
// The way home between nodes. A token's home asks the rank of each far node that lies on its rail for the token's rows
// there; that rank reads them in its node and sends them: one by one, so that the home adds in the same order as inside
// one node, or joined to the node's sum where the order rounds sums per node. Every rank is a home, and serves others.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "host/context.h"
#include "host/row_sum.h"
#include "plan/forwarding.h"

namespace deep_ep::host {

/// Rows and weights of one rank of our node, as they lie in its window.
struct CombineSource {
  const std::byte* x = nullptr;
  const float* weights = nullptr;
  std::int64_t rows = 0;
  bool in_pieces = false;  // staged piece by piece: host/staging_ring.h
  bool present = false;    // takes part; far ranks too, whose rows are not here
};

class ForwardedCombine {
 public:
  ForwardedCombine(Context& context, const CombineCall& call, const Epoch& epoch);
  ~ForwardedCombine();  // however the call ends, no slot is lost
  ForwardedCombine(const ForwardedCombine&) = delete;
  ForwardedCombine& operator=(const ForwardedCombine&) = delete;

  /// What an announcement to that rank says of the requests that will come.
  std::int64_t units_to(int peer) const;
  /// Asks, serves, and has `sum` add our tokens, a range at a time as their rows come. After all announcements.
  void run(const std::vector<CombineSource>& sources,
           const std::function<void(std::int64_t begin, std::int64_t end)>& sum);

  // While `sum` runs
  // -------------------------------------------------------------------------------------------------------------------
  /// The row that came back for selection k of a token, from a far rank.
  const std::byte* row(std::int64_t token, int k, int rank) const;
  /// The sum of that rank's node; null where rows come one by one, and for ranks of our node.
  const std::byte* node_sum(std::int64_t token, int rank) const;
  /// Weight k of the row of selection `of`, from a far rank.
  float weight(std::int64_t token, int of, int k, int rank) const;

 private:
  // What we asked of one node, and what has come of it.
  struct Asked {
    int node = -1;
    int rail = -1;
    std::vector<std::int32_t> before;       // [num_tokens + 1]: requests before each token
    std::vector<std::int32_t> rows_before;  // [num_tokens + 1]: units that come back before each token's
    std::int64_t requests_sent = 0;
    std::vector<LandedChunk> chunks{};  // that came; source -1: not yet
    std::int64_t chunks_used = 0;
  };
  // What a home asked of us.
  struct Serving {
    int home = -1;
    std::int64_t requests = 0;  // that will come in all
    bool joined = false;
    CombineCall call{};  // as the home makes it, as far as adding goes
    plan::RequestUnit request{};
    plan::ReturnUnit unit{};
    plan::Chunking chunking{};
    std::vector<plan::Selection> selections{};         // [requests here][num_topk]
    std::vector<float> factors{};                      // likewise, where rows are weighed
    std::vector<std::int32_t> row_request{}, row_k{};  // of each unit that goes back
    std::int64_t requests_here = 0;
    std::int64_t chunks_sent = 0;
    bool has_all() const { return requests_here == requests; }
    std::int64_t units_known() const { return joined ? requests_here : static_cast<std::int64_t>(row_request.size()); }
    std::int64_t chunks_known() const {
      return has_all() ? chunking.num_chunks(units_known()) : units_known() / chunking.per_chunk;
    }
    bool done() const { return has_all() && chunks_sent == chunks_known(); }
  };

  bool carries(std::int64_t token, int k, int node) const;
  const Asked& asked_of(int rank) const;
  const std::byte* unit(const Asked& asked, std::int64_t number) const;
  std::int64_t unit_of(const Asked& asked, std::int64_t token, int k) const;

  void open_servings();
  bool send_requests();
  void send_requests(Asked& asked, int slot);
  void write_request(const Asked& asked, std::int64_t token, std::byte* unit) const;
  bool take_landed();
  void take_requests(const LandedChunk& chunk);
  void take_rows(const LandedChunk& chunk);
  bool serve();
  void send_rows(Serving& serving, int slot);
  void write_row(const Serving& serving, std::int64_t number, std::byte* unit) const;
  void write_joined(const Serving& serving, RowSum& rows, std::int64_t number, std::byte* unit) const;
  void write_weights(const Serving& serving, std::int64_t request, int k, float* weights) const;
  std::int64_t tokens_ready() const;
  void give_back_used();
  bool all_done() const;
  bool can_move() const;
  int keeps_us_waiting() const;
  void require_node_still_there() const;

  Context& context_;
  Link& link_;
  const CombineCall& call_;
  const Handle& handle_;
  const Epoch& epoch_;
  const int topk_;
  const bool by_rank_, joined_;
  const std::vector<int> active_;
  const plan::RequestUnit request_;
  const plan::ReturnUnit unit_;
  const plan::Chunking request_chunks_, row_chunks_;
  std::vector<std::int32_t> dst_rank_;  // [num_tokens * num_topk] without ranks that are left out
  std::vector<Asked> asked_;
  std::vector<Serving> servings_;
  std::int64_t tokens_summed_ = 0;
  const std::vector<CombineSource>* sources_ = nullptr;
};

}  // namespace deep_ep::host
