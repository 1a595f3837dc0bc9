// SPDX-License-Identifier: MIT
// Low-latency combine: every row goes back to its token's home, encoded if the caller wants it. Inside a node the slot
// of its selection gets only a number, and the home reads the row in its sender's window: where it lies, if the caller
// leaves it alone until all have read it, else where the sender has staged it. Without room there, and between nodes,
// the row itself goes into the slot. receive() adds a token's rows in the plan's order. Phases: send | receive, sum.
#include <algorithm>
#include <atomic>

#include "host/operations.h"
#include "host/row_sum.h"
#include "host/rows_of_token.h"
#include "host/weights_home.h"
#include "host/wire_rows.h"
#include "plan/message.h"

namespace deep_ep::host {

namespace {

// Slots of one ticket in an owner's window:
//   [ rows: max_tokens x topk | weights: max_tokens x topk x (f32 x topk) | numbers: i32 x max_tokens x topk ]
// Rows lie as far apart as the ticket has room for, whatever their size: so the slots of two ranks are apart even where
// their calls do not match, which receive() finds out when they have written.
struct Slots {
  std::byte* base = nullptr;
  std::size_t num_slots = 0;
  std::size_t weights_stride = 0;
  std::size_t row_stride = 0;

  Slots(const Context& context, const Epoch& epoch, const CombineCall& call, int owner)
      : base(context.low_latency(owner, epoch.ticket)),
        num_slots(static_cast<std::size_t>(call.in.handle->max_tokens_per_rank) * call.in.handle->num_topk),
        weights_stride(plan::combine_weights_stride(call.in.handle->num_topk)),
        row_stride(plan::combine_row_stride(context.layout().low_latency_ticket_bytes,
                                            call.in.handle->max_tokens_per_rank, call.in.handle->num_topk)) {}

  std::byte* row(std::size_t slot) const { return base + row_at(slot); }
  // All weights of the row in a slot: one for each selection.
  float* weights(std::size_t slot) const { return reinterpret_cast<float*>(base + weights_at(slot)); }
  // Of the selection's row among the rows that its sender lets homes read in its own window.
  std::int32_t& number(std::size_t slot) const {
    return reinterpret_cast<std::int32_t*>(base + weights_at(num_slots))[slot];
  }
  std::size_t row_at(std::size_t slot) const { return slot * row_stride; }
  std::size_t weights_at(std::size_t slot) const { return num_slots * row_stride + slot * weights_stride; }
};

// How far apart rows lie that homes read in their sender's window, and how much of a row is put over a network.
std::size_t row_stride(const CombineCall& call) {
  return plan::align_up(call.wire_bytes, plan::MessageLayout::kAlignment);
}

// Whether a rank reads the rows of its own tokens where the caller has them: it is done with them when receive()
// returns.
bool own_rows_stay(const CombineCall& call) {
  return call.in.at_once && call.in.x.given() && call.in.wire == WireFormat::kAsIs;
}

class Sender {
 public:
  Sender(Context& context, const CombineCall& call, const Epoch& epoch)
      : context_(context), call_(call), handle_(*call.in.handle), epoch_(epoch), active_(context.active_ranks()) {
    for (int home = 0; home < context.num_ranks; ++home) {
      slots_.emplace_back(context, epoch, call, home);
      rows_for_.push_back(count_rows(home));
    }
  }

  void send() {
    Announcement mine;
    mine.signature = call_.signature;
    let_homes_read(mine);
    context_.announce(epoch_, mine);
    context_.workers().for_range(handle_.num_arrivals, kTokensPerPiece, call_.num_workers,
                                 [&](std::int64_t begin, std::int64_t end) {
                                   const std::int32_t* first_arrival = handle_.first_arrival.as<const std::int32_t>();
                                   int home = 0;
                                   for (std::int64_t arrival = begin; arrival < end; ++arrival) {
                                     while (arrival >= first_arrival[home + 1]) ++home;
                                     if (!context_.excluded_by(home)) send_arrival(arrival, home);
                                   }
                                 });
    std::vector<std::uint64_t> puts(context_.num_ranks, 0);
    if (context_.link() != nullptr) put_far_rows(puts);
    for (int peer : active_) context_.publish_low_latency(peer, epoch_, 1, puts[peer]);
    context_.count([&](Statistics& statistics) {
      for (int home : active_)
        if (!context_.excluded_by(home)) statistics.peers[home].bytes_sent += bytes_for(home);
    });
  }

 private:
  // Says where in our window homes find their rows, if they may read them there.
  void let_homes_read(Announcement& mine) {
    if (!call_.in.x.given()) return;
    std::shared_ptr<void> block = in_place();
    in_place_ = block != nullptr;
    if (!in_place_) block = room_to_stage();
    if (block == nullptr) return;
    const TensorView& x = call_.in.x;
    mine.x_at = context_.arena().offset_of(in_place_ ? x.data : staged_);
    mine.rows = in_place_ ? static_cast<std::int64_t>(x.bytes() / call_.row_bytes) : rows_to_stage();
    context_.keep_for_readers(epoch_, std::move(block));
  }

  std::shared_ptr<void> in_place() const {
    const TensorView& x = call_.in.x;
    const bool may_stay = call_.in.zero_copy && call_.in.wire == WireFormat::kAsIs;
    return may_stay && context_.arena().contains(x.data, x.bytes()) ? context_.arena().share(x.data) : nullptr;
  }

  // Most likely that of the call before, so rows are written where caches have them, and read there: a ticket's slots
  // come round only with its number.
  std::shared_ptr<void> room_to_stage() {
    plan::Arena::Block block = context_.spare_block(static_cast<std::size_t>(rows_to_stage()) * row_stride(call_));
    if (block.owner != nullptr) staged_ = context_.window(context_.rank) + block.at;
    return std::move(block.owner);
  }

  // One row for each selection; where a rank's rows are joined already, one row in the slot of the highest selection.
  void send_arrival(std::int64_t arrival, int home) {
    const int topk = handle_.num_topk;
    const std::int32_t* row = handle_.arrival_row.as<const std::int32_t>() + arrival * topk;
    const std::size_t first = static_cast<std::size_t>(handle_.src_token.as<const std::int32_t>()[arrival]) * topk;
    const bool by_rank = handle_.layout == OutputLayout::kByRank;
    const Slots& slots = slots_[home];
    const float* weights = call_.in.topk_weights.as<const float>();
    for (int k = topk - 1; k >= 0; --k) {
      if (row[k] < 0) continue;
      if (call_.hidden > 0) send_row(home, first + k, row[k]);
      if (weights != nullptr && !by_rank) slots.weights(first + k)[k] = weights[row[k]];
      if (weights != nullptr && by_rank) std::copy_n(weights + arrival * topk, topk, slots.weights(first + k));
      if (by_rank) return;
    }
  }

  void send_row(int home, std::size_t slot, std::int32_t number) {
    const std::byte* row = call_.in.x.as<const std::byte>() + number * call_.row_bytes;
    if (stays(home)) {
      slots_[home].number(slot) = number;
    } else if (staged_ != nullptr && !context_.is_far(home)) {
      // Relaxed: it only numbers the rows; `arrived` publishes them.
      slots_[home].number(slot) = num_staged_.fetch_add(1, std::memory_order_relaxed);
      write_wire_row(call_, row_ops(), staged_ + slots_[home].number(slot) * row_stride(call_), row);
    } else {
      write_wire_row(call_, row_ops(), slots_[home].row(slot), row);
    }
  }

  // Whether that home reads x itself.
  bool stays(int home) const {
    return (in_place_ && !context_.is_far(home)) || (home == context_.rank && own_rows_stay(call_));
  }

  std::int64_t count_rows(int home) const {
    const std::int32_t* first_arrival = handle_.first_arrival.as<const std::int32_t>();
    const std::int64_t begin = first_arrival[home], end = first_arrival[home + 1];
    const std::int32_t* row = handle_.arrival_row.as<const std::int32_t>();
    if (handle_.layout == OutputLayout::kByRank) return end - begin;
    return std::count_if(row + begin * handle_.num_topk, row + end * handle_.num_topk, [](auto r) { return r >= 0; });
  }

  std::int64_t rows_to_stage() const {
    std::int64_t rows = 0;
    for (int home : active_)
      if (!stays(home) && !context_.is_far(home)) rows += rows_for_[home];
    return rows;
  }

  // What send_arrival() wrote for it.
  std::uint64_t bytes_for(int home) const {
    const std::size_t of_row = stays(home) ? sizeof(std::int32_t) : call_.hidden > 0 ? call_.wire_bytes : 0;
    const int weights = handle_.layout == OutputLayout::kByRank ? handle_.num_topk : 1;
    return static_cast<std::uint64_t>(rows_for_[home]) *
           (of_row + (call_.in.topk_weights.given() ? static_cast<std::size_t>(weights) * sizeof(float) : 0));
  }

  // Rows for far homes, which send_arrival() has put in place in the memory that stands for their slots.
  void put_far_rows(std::vector<std::uint64_t>& puts) const {
    const std::int32_t* first_arrival = handle_.first_arrival.as<const std::int32_t>();
    std::uint64_t all = 0;
    for (int home : active_) {
      if (!context_.is_far(home) || context_.excluded_by(home)) continue;
      for (std::int64_t arrival = first_arrival[home]; arrival < first_arrival[home + 1]; ++arrival)
        puts[home] += put_arrival(arrival, home);
      all += puts[home];
    }
    context_.link()->note_low_latency(epoch_.number, all);
  }

  std::uint64_t put_arrival(std::int64_t arrival, int home) const {
    const int topk = handle_.num_topk;
    const std::int32_t* row = handle_.arrival_row.as<const std::int32_t>() + arrival * topk;
    const std::size_t first = static_cast<std::size_t>(handle_.src_token.as<const std::int32_t>()[arrival]) * topk;
    const Slots& slots = slots_[home];
    const auto put = [&](std::size_t at, std::size_t bytes) {
      context_.link()->put_low_latency(home, epoch_.ticket, {epoch_.number, at, bytes, epoch_.deadline});
    };
    std::uint64_t puts = 0;
    for (int k = topk - 1; k >= 0; --k) {
      if (row[k] < 0) continue;
      if (call_.hidden > 0) put(slots.row_at(first + k), row_stride(call_)), ++puts;
      if (call_.in.topk_weights.given()) put(slots.weights_at(first + k), slots.weights_stride), ++puts;
      if (handle_.layout == OutputLayout::kByRank) break;
    }
    return puts;
  }

  Context& context_;
  const CombineCall& call_;
  const Handle& handle_;
  const Epoch& epoch_;
  const std::vector<int> active_;
  std::vector<Slots> slots_;            // by home
  std::vector<std::int64_t> rows_for_;  // likewise
  bool in_place_ = false;               // homes read x
  std::byte* staged_ = nullptr;         // where homes read rows otherwise; null: in the slots
  std::atomic<std::int32_t> num_staged_{0};
};

// What homes read in a rank's window, or of their own where it lies.
struct Rows {
  const std::byte* base = nullptr;  // null: nothing, its rows come to the slots
  std::uint32_t count = 0;

  // A rank that is masked in mid-write may leave a wrong number behind: then the row is wrong, but one of these.
  const std::byte* row(std::int32_t number, std::size_t stride) const {
    const auto wanted = static_cast<std::uint32_t>(number);
    return base + (wanted < count ? wanted : 0) * stride;
  }
};

class Receiver final : public Ticket<CombineOutput>::Receiver {
 public:
  Receiver(std::shared_ptr<Context> context, const CombineCall& call, const Epoch& epoch)
      : context_(std::move(context)), call_(call), epoch_(epoch), active_(context_->active_ranks()) {}

  ~Receiver() override {
    if (!finished_) context_->abandon(epoch_);
  }
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;

  CombineOutput receive() override {
    Epoch epoch = epoch_;
    epoch.deadline = Clock::now() + call_.timeout;  // the time between send and receive is the caller's
    std::erase_if(active_, [&](int peer) {
      return !context_->came(peer, call_.in.mask_silent, [&] {
        context_->await_announcement(epoch, peer, call_.signature);
        context_->await(Flag::kArrived, epoch, peer, 1);
      });
    });
    find_rows();
    CombineOutput out = sum();
    for (int peer : active_)
      if (theirs_[peer].base != nullptr) context_->require_kept(epoch, peer);
    finished_ = true;
    context_->finish(epoch);
    return out;
  }

 private:
  void find_rows() {
    theirs_.assign(context_->num_ranks, {});
    for (int peer : active_) {
      const Announcement& theirs = context_->announcement(context_->rank, epoch_.number, peer);
      if (theirs.x_at != 0 && !context_->is_far(peer))
        theirs_[peer] = {context_->window(peer) + theirs.x_at, static_cast<std::uint32_t>(theirs.rows)};
    }
    const TensorView& x = call_.in.x;
    if (own_rows_stay(call_))
      theirs_[context_->rank] = {x.as<const std::byte>(), static_cast<std::uint32_t>(x.bytes() / call_.row_bytes)};
  }

  CombineOutput sum() const {
    const Handle& handle = *call_.in.handle;
    CombineOutput out;
    if (call_.hidden > 0)
      out.x = call_.in.out.given() ? Tensor(call_.in.out, nullptr)
                                   : context_->output(call_.dtype, {handle.num_tokens, call_.hidden});
    if (call_.in.topk_weights.given())
      out.topk_weights = context_->output(DType::kFp32, {handle.num_tokens, handle.num_topk});
    const RowOps& ops = row_ops();
    const Slots slots(*context_, epoch_, call_, context_->rank);
    context_->workers().for_range(
        handle.num_tokens, kTokensPerPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
          RowSum rows(call_, context_->topology, ops);
          const WireReader wire(call_, ops);
          std::vector<std::int32_t> dst_rank(handle.num_topk);
          for (std::int64_t token = begin; token < end; ++token) {
            const std::size_t first = static_cast<std::size_t>(token) * handle.num_topk;
            routes_of(token, dst_rank.data());
            const auto row_of = [&](int k, int rank) {
              const Rows& there = theirs_[rank];
              const bool in_slot = there.base == nullptr;
              return wire.read(in_slot ? slots.row(first + k) : there.row(slots.number(first + k), row_stride(call_)),
                               k);
            };
            if (call_.hidden > 0)
              rows.sum(static_cast<int>(token), dst_rank.data(), row_of,
                       out.x.as<std::byte>() + token * static_cast<std::int64_t>(call_.row_bytes));
            const auto entry = [&](int row, int k) { return slots.weights(first + row)[k]; };
            if (call_.in.topk_weights.given())
              join_weights(call_.in, dst_rank.data(), entry, out.topk_weights.as<float>() + first);
          }
          ops.flush();
        });
    return out;
  }

  // The token's ranks, without those that are left out of this operation.
  void routes_of(std::int64_t token, std::int32_t* dst_rank) const {
    const int topk = call_.in.handle->num_topk;
    const std::int32_t* routed = call_.in.handle->dst_rank.as<const std::int32_t>() + token * topk;
    for (int k = 0; k < topk; ++k)
      dst_rank[k] = std::find(active_.begin(), active_.end(), routed[k]) != active_.end() ? routed[k] : -1;
  }

  const std::shared_ptr<Context> context_;
  const CombineCall call_;
  const Epoch epoch_;
  std::vector<int> active_;   // whose rows come
  std::vector<Rows> theirs_;  // [num_ranks]
  bool finished_ = false;
};

}  // namespace

Ticket<CombineOutput> low_latency_combine(const std::shared_ptr<Context>& context, const CombineCall& call) {
  const Epoch epoch = context->begin(call.operation, call.timeout);
  auto receiver = std::make_unique<Receiver>(context, call, epoch);
  Sender(*context, call, epoch).send();
  return Ticket<CombineOutput>(std::move(receiver));
}

}  // namespace deep_ep::host
