// SPDX-License-Identifier: MIT
#include "host/forward_dispatch.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "check.h"
#include "host/rows_of_token.h"

namespace deep_ep::host {

namespace {

// Tokens of one turn: few enough that chunks leave early and slots of others are emptied soon.
constexpr std::int64_t kTokensPerTurn = 64;
// Slots that are given back by one message, where as many have come: each message costs both ends a system call and
// often a change of threads. Fewer than half of them, so that the source can fill others meanwhile.
constexpr std::size_t kSlotsPerCredit = 3;

}  // namespace

ForwardedDispatch::ForwardedDispatch(Context& context, const DispatchCall& call, const Epoch& epoch)
    : context_(context),
      link_(*context.link()),
      call_(call),
      epoch_(epoch),
      unit_(plan::TokenUnit::place(call.shape, call.layout)),
      chunking_(plan::Chunking::of(unit_.bytes, link_.slot_bytes())),
      active_(context.active_ranks()),
      missing_(context.num_ranks, -1) {}

ForwardedDispatch::~ForwardedDispatch() {
  for (const Outgoing& to : outgoing_)
    for (std::size_t chunk = static_cast<std::size_t>(to.chunks_sent); chunk < to.slots.size(); ++chunk)
      link_.leave_slot(to.rail, to.slots[chunk]);
}

void ForwardedDispatch::route(const std::int32_t* dst_rank) {
  const plan::Topology& topology = context_.topology;
  const std::vector<char> masked = context_.masked_ranks();
  for (int node = 0; node < topology.num_nodes; ++node) {
    const int rail = plan::rail(topology, context_.rank, node, masked);
    if (node == topology.node_of_rank[context_.rank] || rail < 0) continue;
    Outgoing to{node, rail, {0}, {}, 0};
    for (int token = 0; token < call_.num_tokens; ++token) {
      const std::int32_t* rank = dst_rank + static_cast<std::ptrdiff_t>(token) * call_.num_topk;
      const bool goes = std::any_of(rank, rank + call_.num_topk, [&](std::int32_t dst) {
        return dst >= 0 && topology.node_of_rank[dst] == node && !masked[dst];
      });
      to.before.push_back(to.before.back() + goes);
    }
    outgoing_.push_back(std::move(to));
  }
}

std::int64_t ForwardedDispatch::units_to(int peer) const {
  for (const Outgoing& to : outgoing_)
    if (to.rail == peer) return to.units();
  return Announcement::kNotOnRail;
}

// Our end as a source
// ---------------------------------------------------------------------------------------------------------------------

void ForwardedDispatch::write(const TokenInTransit& token) const {
  const int topk = call_.num_topk;
  for (const Outgoing& to : outgoing_) {
    const std::int64_t number = to.before[token.token];
    if (to.before[token.token + 1] == number) continue;
    std::byte* unit = link_.chunk(to.rail, to.slots[chunking_.chunk_of(number)]) + chunking_.at(number);
    row_ops().copy(unit, token.row, call_.shape.row_bytes);
    auto* scales = reinterpret_cast<std::int32_t*>(unit + unit_.scales_at);
    for (int i = 0; i < call_.shape.num_scales; ++i) scales[i] = token.scales[i * token.scale_stride];
    if (call_.shape.topk_weights) std::memcpy(unit + unit_.weights_at, token.weights, sizeof(float) * topk);
    auto* selections = reinterpret_cast<plan::Selection*>(unit + unit_.selections_at);
    auto* arrivals = reinterpret_cast<std::int32_t*>(unit + unit_.arrivals_at);
    for (int k = 0; k < topk; ++k) {
      const std::int32_t dst = token.rank[k];
      const bool there = dst >= 0 && context_.topology.node_of_rank[dst] == to.node;
      selections[k] = {};
      if (there)
        selections[k] = {static_cast<std::int16_t>(context_.topology.member_of(dst)),
                         static_cast<std::uint16_t>(token.slot != nullptr ? token.slot[k] : 0), token.row_there[k]};
      if (call_.layout != OutputLayout::kByRank) arrivals[k] = there ? token.arrival[k] : -1;
    }
    std::memcpy(unit + unit_.token_at, &token.token, sizeof token.token);
    for (int i = 0; i < call_.shape.num_side; ++i)
      std::memcpy(unit + unit_.side_at[i], token.side[i], call_.shape.side_bytes[i]);
  }
}

void ForwardedDispatch::run(const Delivery& delivery, const std::vector<Destination>& destinations,
                            const std::function<void(std::int64_t begin, std::int64_t end)>& send) {
  delivery_ = &delivery;
  destinations_ = &destinations;
  // The same on all ranks, whose calls are alike by now.
  require(chunking_.per_chunk > 0, "forward_slot_bytes: a row, with what travels beside it, is {} bytes, a slot has {}",
          unit_.bytes, link_.slot_bytes() - plan::kChunkHeadBytes);
  for (int source : active_) {
    if (!link_.reaches(source)) continue;
    missing_[source] = context_.announcement(context_.rank, epoch_.number, source).units;
    if (missing_[source] == 0) finish_source(source);
  }
  for (;;) {
    const std::int64_t end = reachable(tokens_sent_);
    bool moved = end > tokens_sent_;
    if (moved) {
      send(tokens_sent_, end);
      if (end == call_.num_tokens) count_early_puts();
      send_chunks(end);
      tokens_sent_ = end;
    }
    moved = pass_on() || moved;
    const bool all_passed_on = std::all_of(missing_.begin(), missing_.end(), [](std::int64_t n) { return n <= 0; });
    if (tokens_sent_ == call_.num_tokens && all_passed_on) return;
    if (!moved)
      context_.await_any(
          epoch_, [this] { return can_move(); }, [this] { return keeps_us_waiting(); });
  }
}

// The last row is packed, and its chunk not yet handed over: what has left by now left while we packed.
void ForwardedDispatch::count_early_puts() const {
  const std::uint64_t early = link_.chunks_left(epoch_.number);
  context_.count([&](Statistics& statistics) { statistics.puts_while_packing += early; });
}

// How far the next turn may go: to where every node's chunks have slots.
std::int64_t ForwardedDispatch::reachable(std::int64_t begin) {
  std::int64_t end = std::min<std::int64_t>(call_.num_tokens, begin + kTokensPerTurn);
  for (Outgoing& to : outgoing_) end = furthest(to, end);
  return end;
}

std::int64_t ForwardedDispatch::furthest(Outgoing& to, std::int64_t limit) {
  const std::int64_t wanted = chunking_.num_chunks(to.before[limit]);
  while (static_cast<std::int64_t>(to.slots.size()) < wanted) {
    const int slot = link_.take_slot(to.rail, plan::Stream::kTokens);
    if (slot < 0) break;
    to.slots.push_back(slot);
  }
  const auto room = static_cast<std::int32_t>(
      std::min<std::int64_t>(to.before[limit], static_cast<std::int64_t>(to.slots.size()) * chunking_.per_chunk));
  const auto first_without = std::upper_bound(to.before.begin(), to.before.begin() + limit + 1, room);
  return first_without - to.before.begin() - 1;
}

void ForwardedDispatch::send_chunks(std::int64_t tokens_done) {
  const bool all = tokens_done == call_.num_tokens;
  for (Outgoing& to : outgoing_) {
    const std::int64_t units = to.before[tokens_done];
    const std::int64_t ready = all ? chunking_.num_chunks(units) : units / chunking_.per_chunk;
    for (; to.chunks_sent < ready; ++to.chunks_sent) {
      const std::int64_t in_chunk = chunking_.units_in(to.chunks_sent, to.units());
      link_.put_chunk(to.rail, to.slots[to.chunks_sent],
                      {.epoch = epoch_.number,
                       .stream = plan::Stream::kTokens,
                       .units = static_cast<std::uint32_t>(in_chunk),
                       .first_unit = static_cast<std::uint64_t>(to.chunks_sent * chunking_.per_chunk),
                       .bytes = chunking_.chunk_bytes(in_chunk)},
                      epoch_.deadline);
    }
  }
}

// Our end as the one who passes on
// ---------------------------------------------------------------------------------------------------------------------

bool ForwardedDispatch::pass_on() {
  const std::vector<LandedChunk> chunks = link_.landed(epoch_.number);
  for (std::size_t first = 0; first < chunks.size(); first += kSlotsPerCredit) {
    const auto some = std::span(chunks).subspan(first, std::min(kSlotsPerCredit, chunks.size() - first));
    for (const LandedChunk& chunk : some) pass_on(chunk);
    link_.give_back(some);
  }
  return !chunks.empty();
}

void ForwardedDispatch::pass_on(const LandedChunk& chunk) {
  const std::int64_t units = chunk.head.units;
  require(chunk.head.stream == plan::Stream::kTokens && units <= missing_[chunk.source] &&
              chunk.head.bytes == chunking_.chunk_bytes(units),
          "rank {} sent a chunk of {} units, {} bytes; {} units of {} bytes are missing", chunk.source, units,
          chunk.head.bytes, missing_[chunk.source], unit_.bytes);
  context_.workers().for_range(units, kTokensPerPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
    pass_on_units(chunk, begin, end);
    row_ops().flush();  // streamed rows come before the flag that finish_source() stores
  });
  missing_[chunk.source] -= units;
  if (missing_[chunk.source] == 0) finish_source(chunk.source);
}

void ForwardedDispatch::pass_on_units(const LandedChunk& chunk, std::int64_t begin, std::int64_t end) const {
  const int topk = call_.num_topk;
  const bool by_rank = call_.layout == OutputLayout::kByRank;
  const int first_rank = context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank]];
  const int past_rank = context_.topology.first_rank_of_node[context_.topology.node_of_rank[context_.rank] + 1];
  std::vector<std::int32_t> rank(topk), slot(topk), row(topk);
  for (std::int64_t number = begin; number < end; ++number) {
    const std::byte* unit = link_.bytes_of(chunk) + chunking_.at(number);
    const auto* selections = reinterpret_cast<const plan::Selection*>(unit + unit_.selections_at);
    const auto* arrivals = reinterpret_cast<const std::int32_t*>(unit + unit_.arrivals_at);
    for (int k = 0; k < topk; ++k) {
      const int dst = first_rank + selections[k].member;
      // A row that the receiver's block does not have is nobody's: what came is checked before it is used.
      const bool sound = selections[k].member >= 0 && dst < past_rank &&
                         static_cast<std::uint32_t>(selections[k].row) < (*destinations_)[dst].num_rows &&
                         (by_rank || static_cast<std::uint32_t>(arrivals[k]) < (*destinations_)[dst].num_arrivals);
      rank[k] = sound ? dst : -1;
      slot[k] = selections[k].slot;
      row[k] = selections[k].row;
    }
    TokenInTransit token;
    std::memcpy(&token.token, unit + unit_.token_at, sizeof token.token);
    token.row = unit;
    token.scales = reinterpret_cast<const std::int32_t*>(unit + unit_.scales_at);
    token.weights = reinterpret_cast<const float*>(unit + unit_.weights_at);
    for (int i = 0; i < call_.shape.num_side; ++i) token.side[i] = unit + unit_.side_at[i];
    token.rank = rank.data();
    token.slot = slot.data();
    token.row_there = row.data();
    token.arrival = by_rank ? row.data() : arrivals;
    delivery_->deliver(token);
  }
}

void ForwardedDispatch::finish_source(int source) {
  for (int peer : active_)
    if (!link_.reaches(peer)) context_.publish_arrived_for(source, peer, epoch_);
}

// Waiting
// ---------------------------------------------------------------------------------------------------------------------

bool ForwardedDispatch::can_move() const {
  if (link_.has_landed(epoch_.number)) return true;
  if (tokens_sent_ == call_.num_tokens) return false;
  return std::all_of(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& to) {
    const std::int64_t wanted = chunking_.num_chunks(to.before[tokens_sent_ + 1]);
    return static_cast<std::int64_t>(to.slots.size()) >= wanted || link_.has_slot(to.rail, plan::Stream::kTokens);
  });
}

int ForwardedDispatch::keeps_us_waiting() const {
  for (const Outgoing& to : outgoing_)
    if (tokens_sent_ < call_.num_tokens &&
        static_cast<std::int64_t>(to.slots.size()) < chunking_.num_chunks(to.before[tokens_sent_ + 1]) &&
        !link_.has_slot(to.rail, plan::Stream::kTokens))
      return to.rail;
  for (int source : active_)
    if (missing_[source] > 0) return source;
  return context_.rank;
}

}  // namespace deep_ep::host
