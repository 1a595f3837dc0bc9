// SPDX-License-Identifier: MIT
#include "host/forward_combine.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "host/rows_of_token.h"

namespace deep_ep::host {

namespace {

// Tokens of one turn: few enough that others are served soon.
constexpr std::int64_t kTokensPerTurn = 128;

plan::ReturnUnit unit_for(const CombineCall& call, bool joined) {
  const Handle& handle = *call.in.handle;
  return plan::ReturnUnit::place(call.row_bytes, handle.num_topk, call.in.topk_weights.given(),
                                 handle.layout == OutputLayout::kByRank, joined);
}

}  // namespace

ForwardedCombine::ForwardedCombine(Context& context, const CombineCall& call, const Epoch& epoch)
    : context_(context),
      link_(*context.link()),
      call_(call),
      handle_(*call.in.handle),
      epoch_(epoch),
      topk_(handle_.num_topk),
      by_rank_(handle_.layout == OutputLayout::kByRank),
      joined_(call.in.order.round_per_node && call.hidden > 0),
      active_(context.active_ranks()),
      request_(plan::RequestUnit::place(topk_, call.in.weights.given())),
      unit_(unit_for(call, joined_)),
      request_chunks_(plan::Chunking::of(request_.bytes, link_.slot_bytes())),
      row_chunks_(plan::Chunking::of(unit_.bytes, link_.slot_bytes())) {
  const plan::Topology& topology = context.topology;
  const std::vector<char> masked = context.masked_ranks();
  const std::int32_t* routed = handle_.dst_rank.as<const std::int32_t>();
  dst_rank_.assign(routed, routed + handle_.num_tokens * topk_);
  for (std::int32_t& rank : dst_rank_)
    if (rank >= 0 && masked[rank]) rank = -1;
  for (int node = 0; node < topology.num_nodes; ++node) {
    const int rail = plan::rail(topology, context.rank, node, masked);
    if (node == topology.node_of_rank[context.rank] || rail < 0) continue;
    Asked asked{.node = node, .rail = rail, .before = {0}, .rows_before = {0}};
    for (std::int64_t token = 0; token < handle_.num_tokens; ++token) {
      std::int32_t rows = 0;
      for (int k = 0; k < topk_; ++k) rows += carries(token, k, node);
      asked.before.push_back(asked.before.back() + (rows > 0));
      asked.rows_before.push_back(asked.rows_before.back() + (joined_ ? rows > 0 : rows));
    }
    asked_.push_back(std::move(asked));
  }
}

ForwardedCombine::~ForwardedCombine() {
  for (const Asked& asked : asked_)
    for (std::size_t chunk = static_cast<std::size_t>(asked.chunks_used); chunk < asked.chunks.size(); ++chunk)
      if (asked.chunks[chunk].source >= 0) link_.give_back({&asked.chunks[chunk], 1});
}

std::int64_t ForwardedCombine::units_to(int peer) const {
  for (const Asked& asked : asked_)
    if (asked.rail == peer) return asked.before.back();
  return Announcement::kNotOnRail;
}

// Whether selection k brings a row home from that node. A kByRank row stands at its rank's highest selection.
bool ForwardedCombine::carries(std::int64_t token, int k, int node) const {
  const std::int32_t* rank = dst_rank_.data() + token * topk_;
  if (rank[k] < 0 || context_.topology.node_of_rank[rank[k]] != node) return false;
  return !by_rank_ || std::find(rank + k + 1, rank + topk_, rank[k]) == rank + topk_;
}

void ForwardedCombine::run(const std::vector<CombineSource>& sources,
                           const std::function<void(std::int64_t begin, std::int64_t end)>& sum) {
  sources_ = &sources;
  // A token's rows are all here before it is added; a chunk more, for it may begin in the middle of one.
  require(request_chunks_.per_chunk > 0 && row_chunks_.per_chunk * (plan::kForwardSlots - 2) >= topk_,
          "forward_slot_bytes: {} rows of {} bytes must fit into {} slots of {}", topk_, unit_.bytes,
          plan::kForwardSlots - 2, link_.slot_bytes());
  for (Asked& asked : asked_)
    asked.chunks.resize(static_cast<std::size_t>(row_chunks_.num_chunks(asked.rows_before.back())));
  open_servings();
  while (!all_done()) {
    bool moved = take_landed();
    moved = send_requests() || moved;
    moved = serve() || moved;
    if (const std::int64_t end = tokens_ready(); end > tokens_summed_) {
      sum(tokens_summed_, end);
      tokens_summed_ = end;
      give_back_used();
      moved = true;
    }
    if (!moved)
      context_.await_any(
          epoch_, [this] { return can_move(); }, [this] { return keeps_us_waiting(); });
  }
}

// Our end as a home
// ---------------------------------------------------------------------------------------------------------------------

bool ForwardedCombine::send_requests() {
  bool sent = false;
  for (Asked& asked : asked_) {
    if (asked.requests_sent == asked.before.back()) continue;
    const int slot = link_.take_slot(asked.rail, plan::Stream::kRequests);
    if (slot < 0) continue;
    send_requests(asked, slot);
    sent = true;
  }
  return sent;
}

void ForwardedCombine::send_requests(Asked& asked, int slot) {
  const std::int64_t first = asked.requests_sent;
  const std::int64_t units = std::min<std::int64_t>(request_chunks_.per_chunk, asked.before.back() - first);
  std::byte* chunk = link_.chunk(asked.rail, slot);
  // The token of the first request: the last one before which there are no more than that many.
  std::int64_t token = std::upper_bound(asked.before.begin(), asked.before.end(), first) - asked.before.begin() - 1;
  for (std::int64_t number = first; number < first + units; ++token) {
    if (asked.before[token + 1] == asked.before[token]) continue;
    write_request(asked, token, chunk + request_chunks_.at(number));
    ++number;
  }
  link_.put_chunk(asked.rail, slot,
                  {.epoch = epoch_.number,
                   .stream = plan::Stream::kRequests,
                   .units = static_cast<std::uint32_t>(units),
                   .first_unit = static_cast<std::uint64_t>(first),
                   .bytes = request_chunks_.chunk_bytes(units)},
                  epoch_.deadline);
  asked.requests_sent += units;
}

void ForwardedCombine::write_request(const Asked& asked, std::int64_t token, std::byte* unit) const {
  auto* selections = reinterpret_cast<plan::Selection*>(unit);
  const std::int32_t* dst_row = handle_.dst_row.as<const std::int32_t>() + token * topk_;
  for (int k = 0; k < topk_; ++k) {
    selections[k] = {};
    if (carries(token, k, asked.node))
      selections[k] = {static_cast<std::int16_t>(context_.topology.member_of(dst_rank_[token * topk_ + k])), 0,
                       dst_row[k]};
  }
  if (call_.in.weights.given())
    std::memcpy(unit + request_.factors_at, call_.in.weights.as<const float>() + token * topk_, sizeof(float) * topk_);
}

// The end of the next turn: to where every node's rows are here.
std::int64_t ForwardedCombine::tokens_ready() const {
  std::int64_t end = std::min<std::int64_t>(handle_.num_tokens, tokens_summed_ + kTokensPerTurn);
  for (const Asked& asked : asked_) {
    std::int64_t chunks = asked.chunks_used;
    while (chunks < static_cast<std::int64_t>(asked.chunks.size()) && asked.chunks[chunks].source >= 0) ++chunks;
    const std::int64_t units = std::min<std::int64_t>(asked.rows_before.back(), chunks * row_chunks_.per_chunk);
    const auto past = std::upper_bound(asked.rows_before.begin(), asked.rows_before.begin() + end + 1,
                                       static_cast<std::int32_t>(units));
    end = past - asked.rows_before.begin() - 1;
  }
  return end;
}

void ForwardedCombine::give_back_used() {
  for (Asked& asked : asked_) {
    const std::int64_t units = asked.rows_before[tokens_summed_];
    const std::int64_t used = units == asked.rows_before.back() ? static_cast<std::int64_t>(asked.chunks.size())
                                                                : units / row_chunks_.per_chunk;
    link_.give_back(std::span(asked.chunks).subspan(asked.chunks_used, used - asked.chunks_used));
    asked.chunks_used = used;
  }
}

const ForwardedCombine::Asked& ForwardedCombine::asked_of(int rank) const {
  const int node = context_.topology.node_of_rank[rank];
  return *std::find_if(asked_.begin(), asked_.end(), [&](const Asked& asked) { return asked.node == node; });
}

const std::byte* ForwardedCombine::unit(const Asked& asked, std::int64_t number) const {
  return link_.bytes_of(asked.chunks[row_chunks_.chunk_of(number)]) + row_chunks_.at(number);
}

// Rows of a token come back in order of their selections.
std::int64_t ForwardedCombine::unit_of(const Asked& asked, std::int64_t token, int k) const {
  std::int64_t number = asked.rows_before[token];
  for (int before = 0; before < k && !joined_; ++before) number += carries(token, before, asked.node);
  return number;
}

const std::byte* ForwardedCombine::row(std::int64_t token, int k, int rank) const {
  const Asked& asked = asked_of(rank);
  return unit(asked, unit_of(asked, token, k));
}

const std::byte* ForwardedCombine::node_sum(std::int64_t token, int rank) const {
  if (!joined_ || !link_.reaches(rank)) return nullptr;
  const Asked& asked = asked_of(rank);
  return unit(asked, asked.rows_before[token]);
}

float ForwardedCombine::weight(std::int64_t token, int of, int k, int rank) const {
  const Asked& asked = asked_of(rank);
  const auto* weights = reinterpret_cast<const float*>(unit(asked, unit_of(asked, token, of)) + unit_.weights_at);
  return weights[(joined_ ? static_cast<std::size_t>(of) * unit_.weights_of_one : 0) +
                 (by_rank_ ? static_cast<std::size_t>(k) : 0)];
}

// Our end as the one who is asked
// ---------------------------------------------------------------------------------------------------------------------

void ForwardedCombine::open_servings() {
  for (int home : active_) {
    if (!link_.reaches(home)) continue;
    const Announcement& theirs = context_.announcement(context_.rank, epoch_.number, home);
    if (theirs.units <= 0) continue;
    Serving serving{.home = home, .requests = theirs.units, .call = call_};
    serving.joined = theirs.order.round_per_node && call_.hidden > 0;
    serving.call.in.order = theirs.order;
    serving.call.in.bias = {};
    serving.call.in.weights = {};
    serving.request = plan::RequestUnit::place(topk_, theirs.factors);
    serving.unit = unit_for(call_, serving.joined);
    serving.chunking = plan::Chunking::of(serving.unit.bytes, link_.slot_bytes());
    serving.selections.resize(static_cast<std::size_t>(theirs.units * topk_));
    if (theirs.factors) {
      serving.factors.resize(static_cast<std::size_t>(theirs.units * topk_));
      serving.call.in.weights =
          TensorView(static_cast<void*>(serving.factors.data()), DType::kFp32, {theirs.units, topk_});
    }
    servings_.push_back(std::move(serving));  // factors keep their memory
  }
}

bool ForwardedCombine::take_landed() {
  const std::vector<LandedChunk> chunks = link_.landed(epoch_.number);
  for (const LandedChunk& chunk : chunks) {
    switch (chunk.head.stream) {
      case plan::Stream::kRequests: take_requests(chunk); break;
      case plan::Stream::kRows: take_rows(chunk); break;
      case plan::Stream::kTokens: link_.give_back({&chunk, 1}); break;  // not of this operation
    }
  }
  return !chunks.empty();
}

void ForwardedCombine::take_rows(const LandedChunk& chunk) {
  Asked& asked = const_cast<Asked&>(asked_of(chunk.source));
  const auto number = static_cast<std::int64_t>(chunk.head.first_unit) / row_chunks_.per_chunk;
  require(number < static_cast<std::int64_t>(asked.chunks.size()) && asked.chunks[number].source < 0 &&
              chunk.head.units == row_chunks_.units_in(number, asked.rows_before.back()) &&
              chunk.head.bytes == row_chunks_.chunk_bytes(chunk.head.units),
          "rank {} sent {} rows from number {} on, {} are awaited in all", chunk.source, chunk.head.units,
          chunk.head.first_unit, asked.rows_before.back());
  asked.chunks[number] = chunk;
}

// Requests leave their slot at once: it is the only one that is kept for them, so they come in order.
void ForwardedCombine::take_requests(const LandedChunk& chunk) {
  const auto found =
      std::find_if(servings_.begin(), servings_.end(), [&](const Serving& s) { return s.home == chunk.source; });
  const std::int64_t units = chunk.head.units;
  require(found != servings_.end() && static_cast<std::int64_t>(chunk.head.first_unit) == found->requests_here &&
              units <= found->requests - found->requests_here &&
              chunk.head.bytes >= plan::kChunkHeadBytes + static_cast<std::size_t>(units) * found->request.bytes,
          "rank {} sent {} requests from number {} on, which nobody awaits", chunk.source, units,
          chunk.head.first_unit);
  const int first_rank = context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank]];
  const int past_rank = context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank] + 1];
  for (std::int64_t i = 0; i < units; ++i) {
    const std::byte* unit =
        link_.bytes_of(chunk) + plan::kChunkHeadBytes + static_cast<std::size_t>(i) * found->request.bytes;
    const std::int64_t request = found->requests_here++;
    plan::Selection* selections = found->selections.data() + request * topk_;
    std::memcpy(selections, unit, sizeof(plan::Selection) * topk_);
    if (!found->factors.empty())
      std::memcpy(found->factors.data() + request * topk_, unit + found->request.factors_at, sizeof(float) * topk_);
    for (int k = 0; k < topk_; ++k) {
      const int rank = first_rank + selections[k].member;
      if (selections[k].member < 0) continue;
      require(rank < past_rank && selections[k].row >= 0 && selections[k].row < (*sources_)[rank].rows,
              "rank {} asked for row {} of rank {}", chunk.source, selections[k].row, rank);
      if (found->joined) continue;
      found->row_request.push_back(static_cast<std::int32_t>(request));
      found->row_k.push_back(k);
    }
  }
  link_.give_back({&chunk, 1});
}

bool ForwardedCombine::serve() {
  bool sent = false;
  for (Serving& serving : servings_)
    while (serving.chunks_sent < serving.chunks_known()) {
      const int slot = link_.take_slot(serving.home, plan::Stream::kRows);
      if (slot < 0) break;
      send_rows(serving, slot);
      sent = true;
    }
  return sent;
}

void ForwardedCombine::send_rows(Serving& serving, int slot) {
  const std::int64_t first = serving.chunks_sent * serving.chunking.per_chunk;
  const std::int64_t units = serving.chunking.units_in(serving.chunks_sent, serving.units_known());
  std::byte* chunk = link_.chunk(serving.home, slot);
  const RowOps& ops = row_ops();
  context_.workers().for_range(units, kTokensPerPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
    RowSum rows(serving.call, context_.topology, ops);
    for (std::int64_t number = first + begin; number < first + end; ++number) {
      std::byte* unit = chunk + serving.chunking.at(number);
      serving.joined ? write_joined(serving, rows, number, unit) : write_row(serving, number, unit);
    }
    ops.flush();  // streamed rows come before the put
  });
  try {
    require_node_still_there();
  } catch (...) {
    link_.leave_slot(serving.home, slot);
    throw;
  }
  link_.put_chunk(serving.home, slot,
                  {.epoch = epoch_.number,
                   .stream = plan::Stream::kRows,
                   .units = static_cast<std::uint32_t>(units),
                   .first_unit = static_cast<std::uint64_t>(first),
                   .bytes = serving.chunking.chunk_bytes(units)},
                  epoch_.deadline);
  ++serving.chunks_sent;
}

void ForwardedCombine::write_row(const Serving& serving, std::int64_t number, std::byte* unit) const {
  const std::int64_t request = serving.row_request[number];
  const int k = serving.row_k[number];
  const plan::Selection& selection = serving.selections[request * topk_ + k];
  const int rank =
      context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank]] + selection.member;
  if (call_.hidden > 0)
    row_ops().copy(unit, (*sources_)[rank].x + static_cast<std::size_t>(selection.row) * call_.row_bytes,
                   call_.row_bytes);
  if (call_.in.topk_weights.given())
    write_weights(serving, request, k, reinterpret_cast<float*>(unit + serving.unit.weights_at));
}

void ForwardedCombine::write_joined(const Serving& serving, RowSum& rows, std::int64_t number, std::byte* unit) const {
  const plan::Selection* selections = serving.selections.data() + number * topk_;
  const int first_rank = context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank]];
  std::vector<std::int32_t> dst_rank(topk_);
  for (int k = 0; k < topk_; ++k) dst_rank[k] = selections[k].member < 0 ? -1 : first_rank + selections[k].member;
  rows.join(
      static_cast<int>(number), dst_rank.data(),
      [&](int k, int rank) {
        return (*sources_)[rank].x + static_cast<std::size_t>(selections[k].row) * call_.row_bytes;
      },
      unit);
  if (!call_.in.topk_weights.given()) return;
  auto* weights = reinterpret_cast<float*>(unit + serving.unit.weights_at);
  for (int k = 0; k < topk_; ++k)
    if (dst_rank[k] >= 0)
      write_weights(serving, number, k, weights + static_cast<std::size_t>(k) * serving.unit.weights_of_one);
}

// The weights that one row brings home.
void ForwardedCombine::write_weights(const Serving& serving, std::int64_t request, int k, float* weights) const {
  const plan::Selection& selection = serving.selections[request * topk_ + k];
  const int rank =
      context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank]] + selection.member;
  const std::size_t count = serving.unit.weights_of_one;
  std::copy_n((*sources_)[rank].weights + static_cast<std::size_t>(selection.row) * count, count, weights);
}

// A rank that gave this operation up may have changed its rows since: what we read of them must not be sent as if it
// were right.
void ForwardedCombine::require_node_still_there() const {
  for (int peer : active_) context_.require_there(epoch_, peer);
}

// Waiting
// ---------------------------------------------------------------------------------------------------------------------

bool ForwardedCombine::all_done() const {
  return tokens_summed_ == handle_.num_tokens &&
         std::all_of(servings_.begin(), servings_.end(), [](const Serving& serving) { return serving.done(); });
}

bool ForwardedCombine::can_move() const {
  if (link_.has_landed(epoch_.number)) return true;
  for (const Asked& asked : asked_)
    if (asked.requests_sent < asked.before.back() && link_.has_slot(asked.rail, plan::Stream::kRequests)) return true;
  for (const Serving& serving : servings_)
    if (serving.chunks_sent < serving.chunks_known() && link_.has_slot(serving.home, plan::Stream::kRows)) return true;
  return false;
}

int ForwardedCombine::keeps_us_waiting() const {
  for (const Asked& asked : asked_) {
    if (asked.requests_sent < asked.before.back()) return asked.rail;
    if (asked.chunks_used < static_cast<std::int64_t>(asked.chunks.size()) &&
        asked.chunks[asked.chunks_used].source < 0)
      return asked.rail;
  }
  for (const Serving& serving : servings_)
    if (!serving.done()) return serving.home;
  return context_.rank;
}

}  // namespace deep_ep::host
