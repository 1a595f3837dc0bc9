// SPDX-License-Identifier: MIT
// Low-latency combine: every row goes back to its token's home, encoded if the caller wants it. Inside a node its
// slot there (plan/home_slots.h) gets only a number, and the home reads the row in its sender's window: where it lies,
// if the caller leaves it alone until all have read it, else where the sender has staged it. Without room there, and
// between nodes, the row itself goes into the slot. receive() adds a token's rows in the plan's order. Phases: send |
// receive, sum.
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

// How far apart the rows of one rank lie, in its window and in a home's slots.
std::size_t row_stride(const CombineCall& call) {
  return plan::align_up(call.wire_bytes, plan::MessageLayout::kAlignment);
}

// Slots of one ticket in a home's window:
//   [ rows: max_tokens x topk | weights: max_tokens x topk x (f32 x topk) | numbers: i32 x max_tokens x topk ]
// Where the rows of a rank begin follows from the handle and from how far apart the ticket has room for them, whatever
// their size: so those of two ranks are apart even where their calls do not match, which receive() finds out when they
// have written. From there on they lie side by side.
struct Slots {
  std::byte* base = nullptr;
  std::size_t num_slots = 0;
  std::size_t weights_stride = 0;
  std::size_t room = 0;  // for a row
  std::size_t stride = 0;

  Slots(const Context& context, const Epoch& epoch, const CombineCall& call, int home)
      : base(context.low_latency(home, epoch.ticket)),
        num_slots(static_cast<std::size_t>(call.in.handle->max_tokens_per_rank) * call.in.handle->num_topk),
        weights_stride(plan::combine_weights_stride(call.in.handle->num_topk)),
        room(plan::combine_row_stride(context.layout().low_latency_ticket_bytes, call.in.handle->max_tokens_per_rank,
                                      call.in.handle->num_topk)),
        stride(row_stride(call)) {}

  // `first`: of the slots that the rank has whose row it is.
  std::byte* row(std::int32_t slot, std::int32_t first) const { return base + row_at(slot, first); }
  // All weights of the row in a slot: one for each selection.
  float* weights(std::int32_t slot) const { return reinterpret_cast<float*>(base + weights_at(slot)); }
  // Of the selection's row among the rows that its sender lets homes read in its own window.
  std::int32_t& number(std::int32_t slot) const {
    return reinterpret_cast<std::int32_t*>(base + weights_at(num_slots))[slot];
  }
  std::size_t row_at(std::int32_t slot, std::int32_t first) const {
    return static_cast<std::size_t>(first) * room + static_cast<std::size_t>(slot - first) * stride;
  }
  std::size_t weights_at(std::size_t slot) const { return num_slots * room + slot * weights_stride; }
};

// Rows for one home, one behind the other. A far one gets them by one put.
struct Piece {
  int home = -1;
  std::int64_t begin = 0, end = 0;       // arrivals
  std::int32_t slot = 0, past_slot = 0;  // theirs at home
  int turn = 0;                          // the how-manieth of its home
  int puts = 0;                          // that it took
};

// Large enough that a put costs little beside its bytes, small enough that these are still in a core's cache then.
constexpr std::size_t kPutBytes = 128 << 10;

// Whether a rank reads the rows of its own tokens where the caller has them: it is done with them when receive()
// returns.
bool own_rows_stay(const CombineCall& call) {
  return call.in.at_once && call.in.x.given() && call.in.wire == WireFormat::kAsIs;
}

class Sender {
 public:
  Sender(Context& context, const CombineCall& call, const Epoch& epoch)
      : context_(context),
        call_(call),
        handle_(*call.in.handle),
        epoch_(epoch),
        active_(context.active_ranks()),
        rows_for_(context.num_ranks) {
    for (int home = 0; home < context.num_ranks; ++home) slots_.emplace_back(context, epoch, call, home);
  }

  void send() {
    std::vector<Piece> pieces = cut();
    for (const Piece& piece : pieces) rows_for_[piece.home] += piece.past_slot - piece.slot;
    Announcement mine;
    mine.signature = call_.signature;
    let_homes_read(mine);
    context_.announce(epoch_, mine);
    context_.workers().for_range(static_cast<std::int64_t>(pieces.size()), 1, call_.num_workers,
                                 [&](std::int64_t begin, std::int64_t end) {
                                   for (std::int64_t i = begin; i < end; ++i) send_piece(pieces[i]);
                                 });
    std::vector<std::uint64_t> puts(context_.num_ranks, 0);
    std::uint64_t all = 0;
    for (const Piece& piece : pieces) puts[piece.home] += piece.puts, all += piece.puts;
    if (context_.link() != nullptr) context_.link()->note_low_latency(epoch_.number, all);
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

  // One row for each selection; where a rank's rows are joined already, one for each arrival.
  std::int32_t rows_of(std::int64_t arrival) const {
    if (handle_.layout == OutputLayout::kByRank) return 1;
    const std::int32_t* row = handle_.arrival_row.as<const std::int32_t>() + arrival * handle_.num_topk;
    return static_cast<std::int32_t>(std::count_if(row, row + handle_.num_topk, [](auto r) { return r >= 0; }));
  }

  // All homes in turns, so that none waits until another's rows are complete; far ones first, whose rows take longer.
  std::vector<Piece> cut() const {
    std::vector<Piece> pieces;
    for (int home : active_)
      if (!context_.excluded_by(home)) cut(home, pieces);
    std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) {
      const bool a_near = !context_.is_far(a.home), b_near = !context_.is_far(b.home);
      return a_near != b_near ? b_near : a.turn < b.turn;
    });
    return pieces;
  }

  void cut(int home, std::vector<Piece>& pieces) const {
    const std::int32_t* first_arrival = handle_.first_arrival.as<const std::int32_t>();
    const std::int64_t past = first_arrival[home + 1];
    Piece piece{home, first_arrival[home], first_arrival[home], first_slot(home), first_slot(home)};
    while (piece.end < past) {
      piece.past_slot += rows_of(piece.end++);
      const auto bytes = static_cast<std::size_t>(piece.past_slot - piece.slot) * row_stride(call_);
      const bool full = context_.is_far(home) ? bytes >= kPutBytes : piece.end - piece.begin >= kTokensPerPiece;
      if (!full && piece.end < past) continue;
      pieces.push_back(piece);
      piece.begin = piece.end;
      piece.slot = piece.past_slot;
      ++piece.turn;
    }
  }

  std::int32_t first_slot(int home) const { return handle_.first_slot_there.as<const std::int32_t>()[home]; }

  void send_piece(Piece& piece) {
    if (context_.excluded_by(piece.home)) return;
    std::int32_t slot = piece.slot;
    for (std::int64_t arrival = piece.begin; arrival < piece.end; ++arrival) send_arrival(arrival, piece.home, slot);
    if (context_.is_far(piece.home)) put(piece);
  }

  // Takes a slot for each row.
  void send_arrival(std::int64_t arrival, int home, std::int32_t& slot) {
    const int topk = handle_.num_topk;
    const std::int32_t* row = handle_.arrival_row.as<const std::int32_t>() + arrival * topk;
    const bool by_rank = handle_.layout == OutputLayout::kByRank;
    const Slots& slots = slots_[home];
    const float* weights = call_.in.topk_weights.as<const float>();
    for (int k = 0; k < topk; ++k) {
      if (row[k] < 0) continue;
      if (call_.hidden > 0) send_row(home, slot, row[k]);
      if (weights != nullptr && !by_rank) slots.weights(slot)[k] = weights[row[k]];
      if (weights != nullptr && by_rank) std::copy_n(weights + arrival * topk, topk, slots.weights(slot));
      ++slot;
      if (by_rank) return;
    }
  }

  void send_row(int home, std::int32_t slot, std::int32_t number) {
    const std::byte* row = call_.in.x.as<const std::byte>() + number * call_.row_bytes;
    if (stays(home)) {
      slots_[home].number(slot) = number;
    } else if (staged_ != nullptr && !context_.is_far(home)) {
      // Relaxed: it only numbers the rows; `arrived` publishes them.
      slots_[home].number(slot) = num_staged_.fetch_add(1, std::memory_order_relaxed);
      write_wire_row(call_, row_ops(), staged_ + slots_[home].number(slot) * row_stride(call_), row);
    } else {
      write_wire_row(call_, row_ops(), slots_[home].row(slot, first_slot(home)), row);
    }
  }

  // Whether that home reads x itself.
  bool stays(int home) const {
    return (in_place_ && !context_.is_far(home)) || (home == context_.rank && own_rows_stay(call_));
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

  // send_arrival() has put it together in the memory that stands for the home's slots.
  void put(Piece& piece) const {
    const Slots& slots = slots_[piece.home];
    const auto rows = static_cast<std::size_t>(piece.past_slot - piece.slot);
    const auto put = [&](std::size_t at, std::size_t bytes) {
      context_.link()->put_low_latency(piece.home, epoch_.ticket, {epoch_.number, at, bytes, epoch_.deadline});
      ++piece.puts;
    };
    if (call_.hidden > 0) put(slots.row_at(piece.slot, first_slot(piece.home)), rows * slots.stride);
    if (call_.in.topk_weights.given()) put(slots.weights_at(piece.slot), rows * slots.weights_stride);
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
            const std::int32_t* slot = handle.home_slot.as<const std::int32_t>() + first;
            routes_of(token, dst_rank.data());
            const auto row_of = [&](int k, int rank) {
              const Rows& there = theirs_[rank];
              const bool in_slot = there.base == nullptr;
              const std::int32_t first_slot = handle.first_slot_here.as<const std::int32_t>()[rank];
              return wire.read(
                  in_slot ? slots.row(slot[k], first_slot) : there.row(slots.number(slot[k]), row_stride(call_)), k);
            };
            if (call_.hidden > 0)
              rows.sum(static_cast<int>(token), dst_rank.data(), row_of,
                       out.x.as<std::byte>() + token * static_cast<std::int64_t>(call_.row_bytes));
            const auto entry = [&](int row, int k) { return slots.weights(slot[row])[k]; };
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
