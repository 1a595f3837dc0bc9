// SPDX-License-Identifier: MIT
// High-throughput dispatch: counts go first, the receiver answers where each source's rows begin, and sources write
// rows at their final place. Phases: announce, reply, send, receive. docs/protocol.md lists the flags.
#include "host/delivery.h"
#include "host/forward_dispatch.h"
#include "host/operations.h"
#include "host/rows_of_token.h"
#include "plan/routing.h"
#include "plan/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "check.h"

namespace deep_ep::host {

namespace {

class Dispatch {
 public:
  Dispatch(Context& context, const DispatchCall& call)
      : context_(context),
        call_(call),
        cached_(call.in.handle != nullptr),
        num_slots_(call.placement->num_slots(context.rank)),
        epoch_(context.begin(call.operation, call.timeout)),
        active_(context.active_ranks()),
        destinations_(context.num_ranks) {
    if (context.link() != nullptr) forwarded_.emplace(context, call, epoch_);
  }

  DispatchOutput run() {
    const FinishAtExit finish(context_, epoch_);
    announce();
    make_row_plan();
    try {
      reply();
      await_replies();
      send();
      receive();
    } catch (...) {
      // Peers may already write, or still be writing, into the block that we offered.
      if (block_.owner) context_.quarantine(epoch_, std::move(block_.owner));
      throw;
    }
    return output();
  }

 private:
  // Tells every rank how many tokens and rows it will get, and what kind of call this is.
  void announce() {
    if (!cached_) {
      const plan::PlacementView placement = view_of(*call_.placement, context_.topology);
      routes_ = plan::make_routes(call_.in.topk_idx, placement, context_.num_ranks, call_.placement->max_slots(),
                                  context_.rank);
      plan::leave_out(routes_, context_.masked_ranks());
    }
    if (forwarded_)
      forwarded_->route(cached_ ? call_.in.handle->dst_rank.as<const std::int32_t>() : routes_.rank.data());
    Announcement mine;
    mine.signature = call_.signature;
    for (int peer : active_) {
      std::size_t bytes = sizeof mine;
      if (forwarded_) mine.units = forwarded_->units_to(peer);
      context_.announcement(peer, epoch_.number, context_.rank) = mine;
      if (!cached_) {
        bytes = plan::WindowLayout::kAnnouncementHead +
                sizeof(std::int32_t) * (routes_.tokens_to.size() + call_.placement->num_slots(peer));
        std::copy(routes_.tokens_to.begin(), routes_.tokens_to.end(),
                  context_.announced_tokens(peer, epoch_.number, context_.rank));
        std::copy_n(routes_.rows_to_rank(peer), call_.placement->num_slots(peer),
                    context_.announced_rows(peer, epoch_.number, context_.rank));
      }
      context_.publish(peer, Flag::kAnnounced, epoch_, 0, bytes);
    }
  }

  // Where every row that comes will lie, from all sources' counts.
  void make_row_plan() {
    // All announcements before any reply: a call that some rank refused or made differently ends here, on every rank
    // alike.
    for (int peer : active_) context_.await_announcement(epoch_, peer, call_.signature);
    if (cached_) return;
    plan::RowCounts counts;
    counts.layout = call_.layout;
    counts.num_ranks = context_.num_ranks;
    counts.num_slots = num_slots_;
    counts.expert_alignment = call_.expert_alignment;
    counts.max_tokens_per_rank = call_.max_tokens_per_rank;
    counts.tokens_from.assign(context_.num_ranks, 0);
    counts.rows_from.assign(static_cast<std::size_t>(context_.num_ranks) * num_slots_, 0);
    tokens_between_ = Tensor::allocate(DType::kI32, {context_.num_ranks, context_.num_ranks});
    std::fill_n(tokens_between_.as<std::int32_t>(), tokens_between_.numel(), 0);
    for (int src : active_) {
      const std::int32_t* tokens = context_.announced_tokens(context_.rank, epoch_.number, src);
      const std::int32_t* rows = context_.announced_rows(context_.rank, epoch_.number, src);
      counts.tokens_from[src] = tokens[context_.rank];
      std::copy_n(rows, num_slots_, counts.rows_from.begin() + static_cast<std::ptrdiff_t>(src) * num_slots_);
      std::copy_n(tokens, context_.num_ranks,
                  tokens_between_.as<std::int32_t>() + static_cast<std::ptrdiff_t>(src) * context_.num_ranks);
    }
    rows_ = plan::make_row_plan(counts);
  }

  // Makes room and says where each source's rows begin, or that there is no room.
  void reply() {
    Reply answer;
    answer.rows = cached_ ? call_.in.handle->num_rows : rows_.num_rows;
    answer.arrivals = cached_ ? call_.in.handle->num_arrivals : rows_.num_arrivals;
    if (!cached_ && call_.in.max_rows > 0) {
      if (rows_.num_rows > call_.in.max_rows)
        refuse(answer, Reply::kMoreThanMaxRows, rows_.num_rows, call_.in.max_rows);
      answer.rows = answer.arrivals = call_.in.max_rows;
    }
    if (!cached_ && call_.layout == OutputLayout::kPadded) {
      // Duplicate ids can give a slot more rows than it has room for.
      const std::int64_t room = std::int64_t{context_.num_ranks} * call_.max_tokens_per_rank;
      for (const std::int32_t rows : rows_.slot_rows)
        if (rows > room) refuse(answer, Reply::kSlotTooSmall, rows, room);
    }
    at_ = plan::OutputBlock::place(call_.shape, call_.layout, answer.rows, answer.arrivals);
    if (answer.verdict == Reply::kAccepted) {
      block_ = context_.arena().allocate(at_.total_bytes, false);
      if (!block_.owner) block_ = context_.arena().allocate(at_.total_bytes, true);
      if (!block_.owner) refuse(answer, Reply::kArenaTooSmall, at_.total_bytes, context_.arena().largest_free());
      answer.block_at = block_.at;
    }
    num_rows_ = answer.rows;
    num_arrivals_ = answer.arrivals;
    const std::size_t bytes = plan::WindowLayout::kReplyHead + sizeof(std::int32_t) * (cached_ ? 0 : num_slots_);
    for (int src : active_) {
      if (!cached_) {
        answer.first_arrival = rows_.first_arrival[src];
        std::copy_n(rows_.first_row.begin() + static_cast<std::ptrdiff_t>(src) * num_slots_, num_slots_,
                    context_.reply_first_rows(src, epoch_.number, context_.rank));
      }
      context_.reply(src, epoch_.number, context_.rank) = answer;
      context_.publish(src, Flag::kReplied, epoch_, 0, bytes);
    }
  }

  template <typename Needed, typename There>
  static void refuse(Reply& answer, Reply::Verdict verdict, Needed needed, There there) {
    answer.verdict = verdict;
    answer.needed = static_cast<std::uint64_t>(needed);
    answer.there = static_cast<std::uint64_t>(there);
  }

  // All replies before any row: where one rank has no room, every rank learns it and no byte moves.
  void await_replies() {
    for (int dst : active_) {
      context_.await(Flag::kReplied, epoch_, dst, 1);
      const Reply& answer = context_.reply(context_.rank, epoch_.number, dst);
      require(answer.verdict != Reply::kMoreThanMaxRows,
              "max_rows: rank {} would receive {} rows, max_rows there is {}", dst, answer.needed, answer.there);
      require(answer.verdict != Reply::kSlotTooSmall,
              "kPadded: a slot of rank {} would get {} rows, it has room for {}", dst, answer.needed, answer.there);
      require(answer.verdict != Reply::kArenaTooSmall,
              "arena_bytes: rank {} needs {} bytes of arena for this dispatch, {} are free there", dst, answer.needed,
              answer.there);
      if (context_.is_far(dst)) continue;
      destinations_[dst] = {context_.window(dst) + answer.block_at,
                            plan::OutputBlock::place(call_.shape, call_.layout, answer.rows, answer.arrivals),
                            static_cast<std::uint32_t>(answer.rows), static_cast<std::uint32_t>(answer.arrivals)};
    }
    if (!cached_) settle_routes();
  }

  // Relative rows become rows: the receivers' first ones are known now.
  void settle_routes() {
    const bool by_rank = call_.layout == OutputLayout::kByRank;
    std::vector<std::int32_t> first_arrival(context_.num_ranks);
    std::vector<const std::int32_t*> first_rows(context_.num_ranks);
    for (int dst : active_) {
      first_arrival[dst] = static_cast<std::int32_t>(context_.reply(context_.rank, epoch_.number, dst).first_arrival);
      first_rows[dst] = context_.reply_first_rows(context_.rank, epoch_.number, dst);
    }
    for (std::size_t i = 0; i < routes_.rank.size(); ++i) {
      const std::int32_t dst = routes_.rank[i];
      if (dst < 0) continue;
      routes_.arrival[i] += first_arrival[dst];
      routes_.row[i] = by_rank ? routes_.arrival[i] : routes_.row[i] + first_rows[dst][routes_.slot[i]];
    }
  }

  void send() {
    const Handle* handle = call_.in.handle.get();
    dst_rank_ = cached_ ? handle->dst_rank.as<const std::int32_t>() : routes_.rank.data();
    dst_row_ = cached_ ? handle->dst_row.as<const std::int32_t>() : routes_.row.data();
    dst_arrival_ = cached_ ? handle->dst_arrival.as<const std::int32_t>() : routes_.arrival.data();
    const Delivery delivery(call_, destinations_, row_ops());
    const auto send = [&](std::int64_t begin, std::int64_t end) { send_tokens(delivery, begin, end); };
    if (forwarded_) {
      forwarded_->run(delivery, destinations_, send);
    } else {
      send(0, call_.num_tokens);
    }
    const std::vector<std::uint64_t> bytes_to = count_bytes();
    for (int dst : active_)  // far ranks hear of our rows from those who pass them on
      if (!context_.is_far(dst)) context_.publish(dst, Flag::kArrived, epoch_, 1);
    context_.count([&](Statistics& statistics) {
      for (int dst : active_) statistics.peers[dst].bytes_sent += bytes_to[dst];
    });
  }

  void send_tokens(const Delivery& delivery, std::int64_t first, std::int64_t past) {
    const RowOps& ops = row_ops();
    context_.workers().for_range(
        past - first, kTokensPerPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
          TokenReader reader(call_, ops);
          for (std::int64_t token = first + begin; token < first + end; ++token)
            send_token(reader, delivery, static_cast<int>(token));
          ops.flush();  // streamed rows come before the flag that publish() stores after the loop
        });
  }

  // A row is read, and quantised, once, however many ranks and nodes it goes to.
  void send_token(TokenReader& reader, const Delivery& delivery, int token) const {
    const std::size_t first = static_cast<std::size_t>(token) * call_.num_topk;
    const std::int32_t* rank = dst_rank_ + first;
    if (std::all_of(rank, rank + call_.num_topk, [](std::int32_t dst) { return dst < 0; })) return;
    TokenInTransit on_its_way = reader.read(token);
    on_its_way.rank = rank;
    on_its_way.slot = cached_ ? nullptr : routes_.slot.data() + first;
    on_its_way.row_there = dst_row_ + first;
    on_its_way.arrival = dst_arrival_ + first;
    delivery.deliver(on_its_way);
    if (forwarded_) forwarded_->write(on_its_way);
  }

  // What every rank got of us.
  std::vector<std::uint64_t> count_bytes() const {
    std::vector<std::uint64_t> bytes_to(context_.num_ranks), arrivals(context_.num_ranks),
        selections(context_.num_ranks);
    std::vector<int> last_token(context_.num_ranks, -1);  // that went there
    for (int token = 0; token < call_.num_tokens; ++token) {
      const std::int32_t* rank = dst_rank_ + static_cast<std::size_t>(token) * call_.num_topk;
      for (int k = 0; k < call_.num_topk; ++k) {
        if (rank[k] < 0) continue;
        ++selections[rank[k]];
        arrivals[rank[k]] += last_token[rank[k]] != token;
        last_token[rank[k]] = token;
      }
    }
    const std::vector<std::uint64_t>& rows = call_.layout == OutputLayout::kByRank ? arrivals : selections;
    for (int dst = 0; dst < context_.num_ranks; ++dst)
      bytes_to[dst] = arrivals[dst] * call_.shape.bytes_of_arrival(call_.layout) +
                      rows[dst] * call_.shape.bytes_of_row(call_.layout);
    return bytes_to;
  }

  void receive() {
    clear_unwritten_rows();
    for (int src : active_) context_.await(Flag::kArrived, epoch_, src, 1);
  }

  // Rows that no source writes: padding between experts is zero, ids behind a bounded output's rows say "nobody".
  void clear_unwritten_rows() {
    std::byte* block = context_.window(context_.rank) + block_.at;
    if (call_.layout == OutputLayout::kByExpert) {
      const Handle* handle = call_.in.handle.get();
      const std::int32_t* real = cached_ ? handle->slot_rows.as<const std::int32_t>() : rows_.slot_rows.data();
      const std::int32_t* first =
          cached_ ? handle->slot_first_row.as<const std::int32_t>() : rows_.slot_first_row.data();
      for (int slot = 0; slot < num_slots_; ++slot)
        for (std::int64_t row = first[slot] + real[slot]; row < first[slot + 1]; ++row)
          clear_row(call_.shape, at_, block, row);
    }
    if (!cached_ && num_arrivals_ > rows_.num_arrivals) {
      const std::size_t bytes = static_cast<std::size_t>(call_.num_topk) * call_.shape.topk_idx_bytes;
      std::memset(block + at_.topk_idx_at + bytes * rows_.num_arrivals, 0xff,
                  bytes * (num_arrivals_ - rows_.num_arrivals));
    }
  }

  DispatchOutput output() {
    std::byte* base = context_.window(context_.rank) + block_.at;
    std::shared_ptr<void> owner = std::move(block_.owner);
    if (block_.landing) {  // the arena is at its budget: the next exchange needs this room
      Tensor copy = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(at_.total_bytes)});
      std::memcpy(copy.data, base, at_.total_bytes);
      base = copy.as<std::byte>();
      owner = copy.owner;
      context_.count([&](Statistics& statistics) { statistics.copied_out_bytes += at_.total_bytes; });
    }
    const OutputTensors tensors{call_, at_, num_rows_, num_arrivals_, num_slots_, context_.num_ranks};
    DispatchOutput out = tensors.make(base, owner);
    out.handle = cached_ ? call_.in.handle : make_handle(base);
    const std::int32_t* rows = out.handle->slot_rows.as<const std::int32_t>();
    context_.count([&](Statistics& statistics) { add_rows(statistics, rows, num_slots_); });
    return out;
  }

  std::shared_ptr<const Handle> make_handle(const std::byte* base) {
    auto handle = std::make_shared<Handle>(handle_for(call_, context_.num_ranks));
    handle->num_rows = num_rows_;
    handle->num_arrivals = num_arrivals_;
    const auto selections = {std::int64_t{call_.num_tokens}, std::int64_t{call_.num_topk}};
    handle->dst_rank = tensor_of(std::move(routes_.rank), selections);
    handle->dst_row = tensor_of(std::move(routes_.row), selections);
    handle->dst_arrival = tensor_of(std::move(routes_.arrival), selections);
    handle->first_arrival = tensor_of(std::move(rows_.first_arrival), {context_.num_ranks + 1});
    handle->slot_rows = tensor_of(std::move(rows_.slot_rows), {num_slots_});
    handle->slot_first_row = tensor_of(std::move(rows_.slot_first_row), {num_slots_ + 1});
    handle->tokens_between = tokens_between_;
    // Small, but kept as long as the handle: copied, so that a kept handle does not hold the rows' block.
    const auto* src_token = reinterpret_cast<const std::int32_t*>(base + at_.src_token_at);
    handle->src_token = tensor_of(std::vector<std::int32_t>(src_token, src_token + num_arrivals_), {num_arrivals_});
    if (call_.layout != OutputLayout::kByRank) {
      const auto* rows = reinterpret_cast<const std::int32_t*>(base + at_.arrival_row_at);
      handle->arrival_row = tensor_of(std::vector<std::int32_t>(rows, rows + num_arrivals_ * call_.num_topk),
                                      {num_arrivals_, call_.num_topk});
    }
    return handle;
  }

  Context& context_;
  const DispatchCall& call_;
  const bool cached_;
  const int num_slots_;
  const Epoch epoch_;
  const std::vector<int> active_;
  std::optional<ForwardedDispatch> forwarded_;  // where there are ranks that share no memory with us

  plan::Routes routes_;
  plan::RowPlan rows_;
  Tensor tokens_between_;
  plan::OutputBlock at_;
  plan::Arena::Block block_;
  std::int64_t num_rows_ = 0, num_arrivals_ = 0;
  std::vector<Destination> destinations_;
  const std::int32_t* dst_rank_ = nullptr;
  const std::int32_t* dst_row_ = nullptr;
  const std::int32_t* dst_arrival_ = nullptr;
};

}  // namespace

DispatchOutput dispatch(Context& context, const DispatchCall& call) { return Dispatch(context, call).run(); }

}  // namespace deep_ep::host
