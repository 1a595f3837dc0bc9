// SPDX-License-Identifier: MIT
// Low-latency dispatch: every (token, rank) pair is one message in a fixed slot, written without asking. Its head lies
// in the destination's window; its body, the row and what belongs to it, is written once by its source, in the source's
// own window, and each rank of the node reads it there; but rows go straight to their places where these are known
// already. A rank of another node gets whole messages. receive() counts what came and places it. Phases: send |
// receive, place.
#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <utility>

#include "check.h"
#include "host/operations.h"
#include "host/rows_of_token.h"
#include "host/straight_rows.h"
#include "plan/home_slots.h"
#include "plan/message.h"
#include "plan/routing.h"
#include "plan/rows.h"

namespace deep_ep::host {

namespace {

// What receive() needs once the caller's tensors are gone.
struct Sent {
  std::shared_ptr<Context> context;
  DispatchCall call;
  Epoch epoch;
  std::vector<int> active;
  plan::MessageLayout message;
  std::vector<std::int32_t> dst_rank;
  plan::HomeSlots home;  // of our tokens' rows

  // The messages of one source to one owner, as this rank, which is one of the two, writes or reads them: heads in the
  // owner's slots, side by side where no bodies follow them there, and bodies.
  struct Messages {
    std::byte* heads = nullptr;  // in order of arrival
    std::size_t head_stride = 0;
    std::byte* bodies = nullptr;  // in the source's slots for itself, by token; null: they follow their heads
    std::size_t body_stride = 0;

    std::byte* head(std::int64_t number) const { return heads + head_stride * static_cast<std::size_t>(number); }
    // Of the message with that head.
    std::byte* body(std::byte* head, int token) const {
      return bodies != nullptr ? bodies + body_stride * static_cast<std::size_t>(token) : head;
    }
  };

  Messages messages(int owner, int source) const {
    if (context->is_far(owner) || context->is_far(source)) return {slots(owner, source), message.bytes};
    const bool alone = owner != source;
    return {slots(owner, source), alone ? message.row_at : message.bytes, slots(source, source), message.bytes};
  }

  std::byte* slots(int owner, int source) const {
    // Whatever the size of a message, so that sources write apart even where their calls do not match.
    const std::size_t stride =
        plan::dispatch_source_stride(context->layout().low_latency_ticket_bytes, context->num_ranks);
    return context->low_latency(owner, epoch.ticket) + stride * source;
  }
};

class Sender {
 public:
  Sender(const Sent& sent, const plan::Routes& routes)
      : sent_(sent), routes_(routes), straight_(*sent.context, sent.call, sent.epoch) {
    for (int dst = 0; dst < sent.context->num_ranks; ++dst) to_.push_back(sent.messages(dst, sent.context->rank));
  }

  /// `x_at`: where our output will lie in our window, if rows may go straight there; else 0.
  void send(std::uint64_t x_at) {
    const DispatchCall& call = sent_.call;
    Context& context = *sent_.context;
    announce(x_at);
    if (x_at != 0) context.let_others_come(time_to_copy(), [this] { return straight_.known(); });
    const TokenReader reader(call, row_ops());
    context.workers().for_range(call.num_tokens, kTokensPerPiece, call.num_workers,
                                [&](std::int64_t begin, std::int64_t end) {
                                  std::vector<std::byte*> places;
                                  for (std::int64_t token = begin; token < end; ++token) {
                                    places.clear();
                                    if (x_at != 0 && straight_.known()) find_places(static_cast<int>(token), places);
                                    send_token(reader, static_cast<int>(token), places);
                                  }
                                  row_ops().flush();  // streamed rows come before the flags below
                                });
    std::uint64_t puts = 0;
    for (int dst : sent_.active) {
      const auto messages = static_cast<std::uint32_t>(routes_.tokens_to[dst]);
      const bool crosses = context.is_far(dst) && messages > 0;
      if (crosses) put(dst, messages * sent_.message.bytes);
      puts += crosses;
      context.publish_low_latency(dst, sent_.epoch, messages, crosses);
    }
    if (context.link() != nullptr) context.link()->note_low_latency(sent_.epoch.number, puts);
    context.count([&](Statistics& statistics) {
      for (int dst : sent_.active) statistics.peers[dst].bytes_sent += routes_.tokens_to[dst] * sent_.message.bytes;
    });
  }

 private:
  void announce(std::uint64_t x_at) const {
    const Context& context = *sent_.context;
    const DispatchCall& call = sent_.call;
    Announcement mine;
    mine.signature = call.signature;
    mine.x_at = x_at;
    for (int peer : sent_.active) {
      mine.first_slot_there = sent_.home.first[peer];
      if (x_at != 0)
        std::copy_n(routes_.rows_to_rank(peer), call.placement->num_slots(peer),
                    context.announced_rows(peer, sent_.epoch.number, context.rank));
      sent_.context->announce_to(peer, sent_.epoch, mine);
    }
  }

  // Roughly what it costs if our rows cannot go straight. For so long it pays to see whether they can.
  std::chrono::microseconds time_to_copy() const {
    constexpr std::int64_t kBytesPerMicrosecond = 20000;
    const std::int64_t rows = std::int64_t{sent_.call.num_tokens} * sent_.call.num_topk;
    return std::chrono::microseconds(rows * static_cast<std::int64_t>(sent_.call.shape.row_bytes) /
                                     kBytesPerMicrosecond);
  }

  // Messages to one rank lie one behind the other: a far one gets all of them at once.
  void put(int dst, std::size_t bytes) const {
    const Context& context = *sent_.context;
    const auto at = sent_.slots(dst, context.rank) - context.low_latency(dst, sent_.epoch.ticket);
    context.link()->put_low_latency(dst, sent_.epoch.ticket,
                                    {sent_.epoch.number, static_cast<std::size_t>(at), bytes, sent_.epoch.deadline});
  }

  // Where a token's rows lie at its experts.
  void find_places(int token, std::vector<std::byte*>& places) const {
    const std::size_t first = static_cast<std::size_t>(token) * sent_.call.num_topk;
    for (std::size_t i = first; i < first + static_cast<std::size_t>(sent_.call.num_topk); ++i)
      if (sent_.dst_rank[i] >= 0) places.push_back(straight_.place(sent_.dst_rank[i], routes_.slot[i], routes_.row[i]));
  }

  // Bodies are written through the caches, unlike most rows at their places: they are read soon, and more than once.
  void send_token(const TokenReader& reader, int token, const std::vector<std::byte*>& places) const {
    const Context& context = *sent_.context;
    const plan::MessageLayout& at = sent_.message;
    const int topk = sent_.call.num_topk;
    const std::size_t first = static_cast<std::size_t>(token) * topk;
    const std::int32_t* rank = sent_.dst_rank.data() + first;
    const Sent::Messages& ours = to_[context.rank];
    std::byte* body = ours.bodies + ours.body_stride * static_cast<std::size_t>(token);
    if (std::all_of(rank, rank + topk, [](std::int32_t dst) { return dst < 0; })) return;
    reader.write(token, body, at, places);
    for (int k = 0; k < topk; ++k) {
      if (rank[k] < 0 || std::find(rank, rank + k, rank[k]) != rank + k) continue;
      std::byte* head = to_[rank[k]].head(routes_.arrival[first + k]);
      write_head(token, rank[k], head, !places.empty());
      if (context.is_far(rank[k])) std::memcpy(head + at.row_at, body + at.row_at, at.bytes - at.row_at);
    }
  }

  void write_head(int token, int dst, std::byte* head, bool placed) const {
    const DispatchCall& call = sent_.call;
    const plan::MessageLayout& at = sent_.message;
    const std::size_t first = static_cast<std::size_t>(token) * call.num_topk;
    *reinterpret_cast<std::int32_t*>(head + at.src_token_at) = token;
    *reinterpret_cast<std::int32_t*>(head + at.placed_at) = placed;
    auto* slots = reinterpret_cast<std::int32_t*>(head + at.slots_at);
    for (int k = 0; k < call.num_topk; ++k) slots[k] = sent_.dst_rank[first + k] == dst ? routes_.slot[first + k] : -1;
    if (!call.shape.topk_weights) return;
    auto* weights = reinterpret_cast<float*>(head + at.weights_at);
    const float* given = call.in.topk_weights.as<const float>() + first;
    for (int k = 0; k < call.num_topk; ++k) weights[k] = slots[k] >= 0 || !call.in.mask_topk_weights ? given[k] : 0.0f;
  }

  const Sent& sent_;
  const plan::Routes& routes_;
  StraightRows straight_;
  std::vector<Sent::Messages> to_;  // by rank
};

// Memory for an output. The arena's pages are warm; ordinary memory serves as well where it is full.
struct Room {
  std::byte* at = nullptr;
  std::shared_ptr<void> owner;
};

Room room_for(Context& context, std::size_t bytes) {
  plan::Arena::Block block = context.arena().allocate(bytes, false);
  if (block.owner) return {context.window(context.rank) + block.at, std::move(block.owner)};
  const Tensor memory = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(bytes)});
  return {memory.as<std::byte>(), memory.owner};
}

// Counts the messages of all sources, then puts each part of each message at its place.
class Placer {
 public:
  /// `room` may be there already, where its size does not depend on what comes, and with it the handle's promised
  /// tensors.
  Placer(const Sent& sent, const std::vector<std::int32_t>& messages_from, Room room, std::shared_ptr<Handle> handle)
      : sent_(sent),
        call_(sent.call),
        context_(*sent.context),
        num_slots_(call_.placement->num_slots(context_.rank)),
        room_(std::move(room)),
        handle_(std::move(handle)),
        row_token_(handle_->row_token.as<std::int32_t>()) {
    counts_.layout = call_.layout;
    counts_.num_ranks = context_.num_ranks;
    counts_.num_slots = num_slots_;
    counts_.expert_alignment = call_.expert_alignment;
    counts_.max_tokens_per_rank = call_.max_tokens_per_rank;
    counts_.tokens_from = messages_from;
  }

  DispatchOutput place() {
    count_rows();
    number_rows();
    at_ = plan::OutputBlock::place(call_.shape, call_.layout, rows_.num_rows, rows_.num_arrivals);
    if (room_.at == nullptr) room_ = room_for(context_, at_.total_bytes);
    std::byte* block = room_.at;
    clear_padding(block);
    const bool by_column = call_.shape.num_scales > 0 && call_.shape.scales_column_major;
    if (by_column) scales_of_row_.assign(static_cast<std::size_t>(rows_.num_rows), nullptr);
    place_arrivals(block);
    const RowOps& ops = row_ops();
    context_.workers().for_range(static_cast<std::int64_t>(here_.size()), kTokensPerPiece, call_.num_workers,
                                 [&](std::int64_t begin, std::int64_t end) {
                                   for (std::int64_t i = begin; i < end; ++i) place_selection(i, block, ops);
                                   ops.flush();
                                 });
    if (by_column) place_scale_columns(block);
    const OutputTensors tensors{call_, at_, rows_.num_rows, rows_.num_arrivals, num_slots_, context_.num_ranks};
    DispatchOutput out = tensors.make(block, room_.owner);
    context_.count([&](Statistics& statistics) { add_rows(statistics, rows_.slot_rows.data(), num_slots_); });
    out.handle = finish_handle();
    return out;
  }

 private:
  // Reads each head once: most come from other cores. What is ours among its selections is gathered without a branch,
  // which would be as hard to foresee as the routing.
  void count_rows() {
    const std::size_t topk = static_cast<std::size_t>(call_.num_topk);
    std::size_t arrivals = 0, ours = 0;
    for (const std::int32_t tokens : counts_.tokens_from) arrivals += static_cast<std::size_t>(tokens);
    arrivals_.resize(arrivals);
    src_token_.resize(arrivals);
    slots_.resize(arrivals * topk);
    here_.resize(arrivals * topk + 1);  // one more: the last may be written in vain
    counts_.rows_from.assign(static_cast<std::size_t>(context_.num_ranks) * num_slots_, 0);
    std::size_t arrival = 0;
    for (int src = 0; src < context_.num_ranks; ++src) {
      const std::size_t first = ours;
      const Sent::Messages messages = sent_.messages(context_.rank, src);
      for (int i = 0; i < counts_.tokens_from[src]; ++i, ++arrival) {
        std::byte* head = messages.head(i);
        src_token_[arrival] = *reinterpret_cast<const std::int32_t*>(head + sent_.message.src_token_at);
        arrivals_[arrival] = {head, messages.body(head, src_token_[arrival])};
        const auto* slots = reinterpret_cast<const std::int32_t*>(head + sent_.message.slots_at);
        for (std::size_t k = 0; k < topk; ++k) {
          const std::int32_t slot = slots[k];
          slots_[arrival * topk + k] = slot;
          here_[ours] = static_cast<std::int32_t>(arrival * topk + k);
          ours += slot >= 0;
        }
      }
      std::int32_t* rows_of_slot = counts_.rows_from.data() + static_cast<std::size_t>(src) * num_slots_;
      for (std::size_t i = first; i < ours; ++i) ++rows_of_slot[slots_[here_[i]]];
      here_until_.push_back(ours);
    }
    here_.resize(ours);
    rows_ = plan::make_row_plan(counts_);
    const std::int64_t room = std::int64_t{context_.num_ranks} * call_.max_tokens_per_rank;
    for (int slot = 0; slot < num_slots_ && call_.layout == OutputLayout::kPadded; ++slot)
      require(rows_.slot_rows[slot] <= room, "kPadded: slot {} of rank {} would get {} rows, it has room for {}", slot,
              context_.rank, rows_.slot_rows[slot], room);
  }

  // The row of each selection, in order (source rank, source token, selection) inside its slot.
  void number_rows() {
    std::vector<std::int32_t> next = rows_.first_row;
    const bool by_rank = call_.layout == OutputLayout::kByRank;
    arrival_row_.assign(slots_.size(), -1);
    std::size_t i = 0;
    for (int src = 0; src < context_.num_ranks; ++src) {
      std::int32_t* next_of_slot = by_rank ? nullptr : next.data() + static_cast<std::size_t>(src) * num_slots_;
      for (; i < here_until_[src]; ++i)
        arrival_row_[here_[i]] = by_rank ? here_[i] / call_.num_topk : next_of_slot[slots_[here_[i]]]++;
    }
  }

  void clear_padding(std::byte* block) const {
    if (call_.layout != OutputLayout::kByExpert) return;
    for (int slot = 0; slot < num_slots_; ++slot)
      for (std::int64_t row = rows_.slot_first_row[slot] + rows_.slot_rows[slot]; row < rows_.slot_first_row[slot + 1];
           ++row)
        clear_row(call_.shape, at_, block, row);
  }

  // What there is of each arrival: ids as the caller wants them, weights where they are not a row's, side tensors.
  void place_arrivals(std::byte* block) const {
    if (call_.shape.topk_idx_bytes == 8) {
      std::copy(slots_.begin(), slots_.end(), reinterpret_cast<std::int64_t*>(block + at_.topk_idx_at));
    } else {
      std::copy(slots_.begin(), slots_.end(), reinterpret_cast<std::int32_t*>(block + at_.topk_idx_at));
    }
    const std::size_t topk = static_cast<std::size_t>(call_.num_topk);
    const bool weights = call_.shape.topk_weights && call_.layout == OutputLayout::kByRank;
    if (!weights && call_.shape.num_side == 0) return;
    const auto place = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t arrival = begin; arrival < end; ++arrival) {
        const auto& [head, body] = arrivals_[arrival];
        if (weights)
          std::copy_n(reinterpret_cast<const float*>(head + sent_.message.weights_at), topk,
                      reinterpret_cast<float*>(block + at_.topk_weights_at) + arrival * topk);
        for (int i = 0; i < call_.shape.num_side; ++i)
          std::memcpy(block + at_.side_at[i] + arrival * call_.shape.side_bytes[i], body + sent_.message.side_at[i],
                      call_.shape.side_bytes[i]);
      }
    };
    context_.workers().for_range(rows_.num_arrivals, kTokensPerPiece, call_.num_workers, place);
  }

  // What there is of each selection here: its row, the row's scales and weight.
  void place_selection(std::int64_t i, std::byte* block, const RowOps& ops) {
    const int topk = call_.num_topk;
    const std::int32_t selection = here_[i], arrival = selection / topk;
    const bool by_rank = call_.layout == OutputLayout::kByRank;
    if (by_rank && i > 0 && here_[i - 1] / topk == arrival) return;  // a row for all of them
    const plan::MessageLayout& from = sent_.message;
    const auto& [head, body] = arrivals_[arrival];
    const std::int32_t row = arrival_row_[selection];
    if (row_token_ != nullptr) row_token_[row] = src_token_[arrival];
    if (*reinterpret_cast<const std::int32_t*>(head + from.placed_at) == 0)
      ops.copy(block + at_.x_at + row * call_.shape.row_bytes, body + from.row_at, call_.shape.row_bytes);
    const auto* scales = reinterpret_cast<const std::int32_t*>(body + from.scales_at);
    if (!scales_of_row_.empty()) {
      scales_of_row_[row] = scales;
    } else {
      std::copy_n(scales, call_.shape.num_scales,
                  reinterpret_cast<std::int32_t*>(block + at_.scales_at) + at_.first_scale(row));
    }
    if (call_.shape.topk_weights && !by_rank)
      reinterpret_cast<float*>(block + at_.topk_weights_at)[row] =
          reinterpret_cast<const float*>(head + from.weights_at)[selection % topk];
  }

  // Column-major: the scales of one row lie a column apart, each in a line of its own and most of these in the same few
  // sets of a cache. So lines are filled one after the other, each with one scale of as many rows.
  void place_scale_columns(std::byte* block) const {
    constexpr std::int64_t kRows = TurnRows::kRows;
    auto* out = reinterpret_cast<std::int32_t*>(block + at_.scales_at);
    const RowOps& ops = row_ops();
    const auto place_line = [&](std::int64_t group, std::int64_t first, std::int64_t past) {
      TurnRows rows;
      const std::int64_t row = group * at_.scale_group_rows + first;
      bool any = false;
      for (std::int64_t r = 0; r < past - first; ++r) any |= (rows.rows[r] = scales_of_row_[row + r]) != nullptr;
      if (!any) return;
      rows.n = call_.shape.num_scales;
      rows.dst = out + at_.first_scale(row);
      rows.stride = at_.scale_column_stride;
      ops.turn(rows);
    };
    const std::int64_t lines_of_group = (at_.scale_group_rows + kRows - 1) / kRows;
    const std::int64_t groups = rows_.num_rows / at_.scale_group_rows;
    context_.workers().for_range(
        groups * lines_of_group, kTokensPerPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t line = begin; line < end; ++line) {
            const std::int64_t first = line % lines_of_group * kRows;
            place_line(line / lines_of_group, first, std::min(first + kRows, at_.scale_group_rows));
          }
          ops.flush();
        });
  }

  std::shared_ptr<const Handle> finish_handle() {
    Handle& handle = *handle_;
    handle.num_rows = rows_.num_rows;
    handle.num_arrivals = rows_.num_arrivals;
    handle.dst_rank = tensor_of(sent_.dst_rank, {call_.num_tokens, call_.num_topk});
    handle.home_slot = tensor_of(sent_.home.of, {call_.num_tokens, call_.num_topk});
    handle.first_slot_here = tensor_of(sent_.home.first, {context_.num_ranks + 1});
    std::vector<std::int32_t> between(static_cast<std::size_t>(context_.num_ranks) * context_.num_ranks, 0);
    for (int src = 0; src < context_.num_ranks; ++src)
      between[static_cast<std::size_t>(src) * context_.num_ranks + context_.rank] = counts_.tokens_from[src];
    handle.src_token = tensor_of(std::move(src_token_), {rows_.num_arrivals});
    handle.tokens_between = tensor_of(std::move(between), {context_.num_ranks, context_.num_ranks});
    handle.arrival_row = tensor_of(std::move(arrival_row_), {rows_.num_arrivals, call_.num_topk});
    handle.first_arrival = tensor_of(std::move(rows_.first_arrival), {context_.num_ranks + 1});
    note_source_ranges();
    std::copy(rows_.slot_rows.begin(), rows_.slot_rows.end(), handle.slot_rows.as<std::int32_t>());
    handle.slot_first_row = tensor_of(std::move(rows_.slot_first_row), {num_slots_ + 1});
    return handle_;
  }

  void note_source_ranges() const {
    auto* range = handle_->source_range.as<std::int64_t>();
    if (range == nullptr) return;
    for (int slot = 0; slot < num_slots_; ++slot)
      for (int src = 0; src < context_.num_ranks; ++src) {
        const std::size_t i = static_cast<std::size_t>(src) * num_slots_ + slot;
        const std::int64_t first = rows_.first_row[i] - rows_.slot_first_row[slot];
        *range++ = first << 32 | counts_.rows_from[i];
      }
  }

  const Sent& sent_;
  const DispatchCall& call_;
  Context& context_;
  const int num_slots_;
  plan::RowCounts counts_;
  plan::RowPlan rows_;
  struct Arrival {
    const std::byte* head = nullptr;
    const std::byte* body = nullptr;
  };
  std::vector<Arrival> arrivals_;
  std::vector<std::int32_t> src_token_;            // of each arrival
  std::vector<std::int32_t> slots_, arrival_row_;  // of each arrival's selections; -1: not here
  std::vector<std::int32_t> here_;                 // which of these are here, in order
  std::vector<std::size_t> here_until_;            // of each source: how many come from it and those before
  // Where column-major scales came to, by row; null for rows that nothing came for. Empty: they are placed row by row.
  std::vector<const std::int32_t*> scales_of_row_;
  plan::OutputBlock at_;
  Room room_;
  const std::shared_ptr<Handle> handle_;
  std::int32_t* const row_token_;  // null: not kPadded
};

class Receiver final : public Ticket<DispatchOutput>::Receiver {
 public:
  explicit Receiver(Sent sent)
      : sent_(std::move(sent)), handle_(std::make_shared<Handle>(handle_for(sent_.call, sent_.context->num_ranks))) {
    const int slots = sent_.call.placement->num_slots(sent_.context->rank);
    handle_->slot_rows = Tensor::allocate(DType::kI32, {slots});
    handle_->first_slot_there = Tensor::allocate(DType::kI32, {sent_.context->num_ranks});
    if (sent_.call.layout == OutputLayout::kPadded) promise(slots);
  }

  ~Receiver() override {
    if (finished_) return;
    if (offered_ != 0) sent_.context->quarantine(sent_.epoch, std::move(room_.owner));
    sent_.context->abandon(sent_.epoch);
  }
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;

  /// Once, first.
  void send(const plan::Routes& routes) { Sender(sent_, routes).send(offered_); }

  DispatchOutput receive() override {
    Context& context = *sent_.context;
    Epoch epoch = sent_.epoch;
    epoch.deadline = Clock::now() + sent_.call.timeout;  // the time between send and receive is the caller's
    std::vector<std::int32_t> messages_from(context.num_ranks, 0);
    for (int src : sent_.active) {
      context.came(src, sent_.call.in.mask_silent, [&] {
        context.await_announcement(epoch, src, sent_.call.signature);
        messages_from[src] = static_cast<std::int32_t>(context.await(Flag::kArrived, epoch, src, 1));
        handle_->first_slot_there.as<std::int32_t>()[src] =
            context.announcement(context.rank, epoch.number, src).first_slot_there;
      });
    }
    DispatchOutput out = Placer(sent_, messages_from, room_, handle_).place();
    for (int src : sent_.active)
      if (messages_from[src] > 0) context.require_kept(epoch, src);
    finished_ = true;
    context.finish(epoch);
    return out;
  }

  const DispatchOutput* promised() const override { return room_.at != nullptr ? &promised_ : nullptr; }

 private:
  // x and scales come first in a block, so they lie where they do however many arrivals there will be.
  void promise(int slots) {
    const DispatchCall& call = sent_.call;
    Context& context = *sent_.context;
    const std::int64_t most = std::int64_t{context.num_ranks} * call.max_tokens_per_rank;
    const auto at = plan::OutputBlock::place(call.shape, call.layout, slots * most, most);
    room_ = room_for(context, at.total_bytes);
    if (StraightRows::possible(context, call) && context.arena().contains(room_.at, at.total_bytes))
      offered_ = context.arena().offset_of(room_.at + at.x_at);
    promised_ = OutputTensors{call, at, slots * most, 0, slots, context.num_ranks}.make(room_.at, room_.owner);
    handle_->row_token = Tensor::allocate(DType::kI32, {slots, most});
    handle_->source_range = Tensor::allocate(DType::kI64, {slots, context.num_ranks});
    promised_.handle = handle_;
  }

  const Sent sent_;
  const std::shared_ptr<Handle> handle_;  // what is promised of it, until all of it is there
  Room room_;
  std::uint64_t offered_ = 0;  // where peers may write rows in our window; 0: nowhere
  DispatchOutput promised_;
  bool finished_ = false;
};

}  // namespace

Ticket<DispatchOutput> low_latency_dispatch(const std::shared_ptr<Context>& context, const DispatchCall& call) {
  Sent sent{context,
            call,
            context->begin(call.operation, call.timeout),
            context->active_ranks(),
            plan::MessageLayout::place(call.shape),
            {},
            {}};
  plan::Routes routes = plan::make_routes(call.in.topk_idx, view_of(*call.placement, context->topology),
                                          context->num_ranks, call.placement->max_slots(), context->rank);
  plan::leave_out(routes, context->masked_ranks());
  sent.dst_rank = routes.rank;
  sent.home = plan::make_home_slots(
      {routes.rank.data(), call.num_tokens, call.num_topk, context->num_ranks, call.layout == OutputLayout::kByRank});
  auto receiver = std::make_unique<Receiver>(std::move(sent));
  receiver->send(routes);
  return Ticket<DispatchOutput>(std::move(receiver));
}

}  // namespace deep_ep::host
