// SPDX-License-Identifier: MIT
// High-throughput combine: rows stay where the experts' rank put them, in its window, or are staged there piece by
// piece; each token's home reads and adds them in the plan's order. Phases: publish, then for each piece stage and sum,
// part. docs/protocol.md lists the flags.
#include "host/forward_combine.h"
#include "host/operations.h"
#include "host/row_sum.h"
#include "host/staging_ring.h"
#include "host/weights_home.h"

#include <algorithm>
#include <iterator>
#include <optional>

#include "check.h"

namespace deep_ep::host {

namespace {

std::vector<int> without(std::vector<int> ranks, int rank) {
  std::erase(ranks, rank);
  return ranks;
}

class Combine {
 public:
  Combine(Context& context, const CombineCall& call)
      : context_(context),
        call_(call),
        handle_(*call.in.handle),
        epoch_(context.begin(call.operation, call.timeout)),
        active_(context.active_ranks()),
        others_(without(active_, context.rank)),
        ring_(StagingRing::of(call, context.num_ranks)),
        sources_(context.num_ranks),
        next_arrival_(context.num_ranks) {
    if (context.link() != nullptr) forwarded_.emplace(context, call, epoch_);
  }

  CombineOutput run() {
    const FinishAtExit finish(context_, epoch_);
    try {
      publish();
      for (int peer : active_) await_source(peer);
      CombineOutput out = sum();
      part();
      return out;
    } catch (...) {
      // A peer may still be reading what we published.
      for (auto& block : staged_) context_.quarantine(epoch_, std::move(block));
      throw;
    }
  }

 private:
  // Makes our rows readable by their homes: in place where they lie in our arena, else staged there once.
  void publish() {
    Announcement mine;
    mine.signature = call_.signature;
    try {
      if (call_.in.x.given()) mine.x_at = readable_rows();
      if (call_.in.topk_weights.given()) mine.weights_at = readable(call_.in.topk_weights);
    } catch (const Error& error) {
      context_.announce(epoch_, refusal(error.what()), Context::kRefused);
      throw;
    }
    mine.rows = handle_.num_rows;
    mine.tokens = handle_.num_tokens;
    mine.in_pieces = in_pieces_;
    mine.order = call_.in.order;
    mine.factors = call_.in.weights.given();
    for (int peer : active_) {
      if (forwarded_) mine.units = forwarded_->units_to(peer);
      context_.announce_to(peer, epoch_, mine);
    }
  }

  static Announcement refusal(const std::string& why) {
    Announcement announcement;
    why.copy(announcement.refusal.data(), announcement.refusal.size() - 1);
    return announcement;
  }

  std::uint64_t readable_rows() {
    const std::size_t bytes = call_.in.x.bytes();
    in_pieces_ = !forwarded_ && ring_.worthwhile() && ring_.bytes() < bytes &&
                 !context_.arena().contains(call_.in.x.data, bytes);
    if (!in_pieces_) return readable(call_.in.x);
    context_.count([&](Statistics& statistics) { statistics.staged_bytes += bytes; });
    const plan::Arena::Block block = take(ring_.bytes());
    staging_ = context_.window(context_.rank) + block.at;
    return block.at;
  }

  plan::Arena::Block take(std::size_t bytes) {
    plan::Arena::Block block = context_.arena().allocate(bytes, true);
    require(block.owner != nullptr,
            "arena_bytes: rank {} needs {} bytes of arena to stage combine's input, {} are free there", context_.rank,
            bytes, context_.arena().largest_free());
    staged_.push_back(block.owner);
    return block;
  }

  std::uint64_t readable(const TensorView& tensor) {
    const std::size_t bytes = tensor.bytes();
    const plan::Arena& arena = context_.arena();
    if (arena.contains(tensor.data, bytes)) return arena.offset_of(tensor.data);
    const plan::Arena::Block block = take(bytes);
    std::byte* staged = context_.window(context_.rank) + block.at;
    const RowOps& ops = row_ops();
    constexpr std::int64_t kPiece = 256 << 10;
    context_.workers().for_range(
        static_cast<std::int64_t>(bytes), kPiece, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
          ops.copy(staged + begin, tensor.as<const std::byte>() + begin, static_cast<std::size_t>(end - begin));
          ops.flush();
        });
    context_.count([&](Statistics& statistics) { statistics.staged_bytes += bytes; });
    return block.at;
  }

  void await_source(int peer) {
    context_.await_announcement(epoch_, peer, call_.signature);
    const Announcement& theirs = context_.announcement(context_.rank, epoch_.number, peer);
    sources_[peer].present = true;
    if (context_.is_far(peer)) return;
    const bool ours = peer == context_.rank;  // then what we stage is for others
    sources_[peer].x = ours ? call_.in.x.as<const std::byte>() : context_.window(peer) + theirs.x_at;
    sources_[peer].weights = reinterpret_cast<const float*>(context_.window(peer) + theirs.weights_at);
    sources_[peer].rows = theirs.rows;
    sources_[peer].in_pieces = theirs.in_pieces && !ours;
    any_in_pieces_ = any_in_pieces_ || theirs.in_pieces;
    most_tokens_ = std::max(most_tokens_, theirs.tokens);
  }

  CombineOutput sum() {
    CombineOutput out;
    const std::int64_t tokens = handle_.num_tokens;
    if (call_.hidden > 0)
      out.x =
          call_.in.out.given() ? Tensor(call_.in.out, nullptr) : context_.output(call_.dtype, {tokens, call_.hidden});
    if (call_.in.topk_weights.given()) out.topk_weights = context_.output(DType::kFp32, {tokens, handle_.num_topk});
    const auto sum = [&](std::int64_t begin, std::int64_t end) { sum_tokens(out, begin, end); };
    if (forwarded_) {
      forwarded_->run(sources_, sum);
    } else if (any_in_pieces_) {
      sum_in_pieces(sum);
    } else {
      sum(0, tokens);
    }
    return out;
  }

  // Every rank stages a piece and adds the one before it, which all have staged by then, most likely.
  template <typename Sum>
  void sum_in_pieces(const Sum& sum) {
    const std::int64_t pieces = (most_tokens_ + ring_.tokens - 1) / ring_.tokens;
    for (std::int64_t piece = 0; piece <= pieces; ++piece) {
      if (piece < pieces && in_pieces_) stage(piece);
      if (piece > 0) sum_piece(piece - 1, sum);
    }
  }

  void stage(std::int64_t piece) {
    if (piece >= StagingRing::kPieces)  // the homes have read what lay there before
      for (int home : others_)
        context_.await_count(Flag::kFinished, epoch_, home,
                             static_cast<std::uint32_t>(piece - StagingRing::kPieces + 1));
    const auto count = static_cast<std::int64_t>(others_.size());
    context_.workers().for_range(count, 1, call_.num_workers, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) stage_rows(piece, others_[i]);
    });
    for (int home : others_) context_.publish(home, Flag::kArrived, epoch_, static_cast<std::uint32_t>(piece + 1));
  }

  // Through the caches: the home reads them soon.
  void stage_rows(std::int64_t piece, int home) {
    const std::int32_t* src_token = handle_.src_token.as<const std::int32_t>();
    const std::int32_t past = handle_.first_arrival.as<const std::int32_t>()[home + 1];
    std::int32_t& arrival = next_arrival_[home];
    if (piece == 0) arrival = handle_.first_arrival.as<const std::int32_t>()[home];
    std::size_t number = 0;
    const auto stage = [&](std::int64_t row) {
      std::memcpy(staging_ + ring_.place(piece, home, number++),
                  call_.in.x.as<const std::byte>() + row * static_cast<std::int64_t>(call_.row_bytes), call_.row_bytes);
    };
    for (; arrival < past && src_token[arrival] < (piece + 1) * ring_.tokens; ++arrival) {
      if (by_rank()) {
        stage(arrival);
        continue;
      }
      const std::int32_t* rows = handle_.arrival_row.as<const std::int32_t>() + arrival * handle_.num_topk;
      for (int k = 0; k < handle_.num_topk; ++k)
        if (rows[k] >= 0) stage(rows[k]);
    }
  }

  template <typename Sum>
  void sum_piece(std::int64_t piece, const Sum& sum) {
    for (int peer : active_)
      if (sources_[peer].in_pieces)
        context_.await_count(Flag::kArrived, epoch_, peer, static_cast<std::uint32_t>(piece + 1));
    const std::int64_t first = std::min(piece * ring_.tokens, handle_.num_tokens);
    const std::int64_t past = std::min(first + ring_.tokens, handle_.num_tokens);
    number_rows(piece, first, past);
    sum(first, past);
    for (int peer : active_)
      if (sources_[peer].in_pieces)
        context_.publish(peer, Flag::kFinished, epoch_, static_cast<std::uint32_t>(piece + 1));
  }

  // Where the piece's rows lie at each source that stages them: counted as it counts.
  void number_rows(std::int64_t piece, std::int64_t first, std::int64_t past) {
    const int topk = handle_.num_topk;
    std::vector<std::size_t> next(context_.num_ranks, 0);
    place_in_ring_.assign(static_cast<std::size_t>(past - first) * topk, 0);
    first_in_piece_ = first;
    const std::int32_t* dst_rank = handle_.dst_rank.as<const std::int32_t>() + first * topk;
    for (std::size_t i = 0; i < place_in_ring_.size(); ++i) {
      if (dst_rank[i] < 0) continue;
      const std::size_t of_token = i - i % topk;
      const auto* before = std::find(dst_rank + of_token, dst_rank + i, dst_rank[i]);
      const bool known = by_rank() && before != dst_rank + i;
      place_in_ring_[i] =
          known ? place_in_ring_[before - dst_rank] : ring_.place(piece, context_.rank, next[dst_rank[i]]++);
    }
  }

  bool by_rank() const { return handle_.layout == OutputLayout::kByRank; }

  void sum_tokens(const CombineOutput& out, std::int64_t first, std::int64_t past) const {
    const RowOps& ops = row_ops();
    context_.workers().for_range(past - first, kTokensPerPiece, call_.num_workers,
                                 [&](std::int64_t begin, std::int64_t end) {
                                   RowSum rows(call_, context_.topology, ops);
                                   std::vector<std::int32_t> dst_rank(handle_.num_topk);
                                   for (std::int64_t token = first + begin; token < first + end; ++token) {
                                     routes_of(token, dst_rank.data());
                                     if (call_.hidden > 0) sum_token(rows, token, dst_rank.data(), out.x);
                                     if (call_.in.topk_weights.given())
                                       bring_weights_home(token, dst_rank.data(), out.topk_weights);
                                   }
                                   ops.flush();
                                 });
  }

  // The token's ranks, without those that are left out of this operation.
  void routes_of(std::int64_t token, std::int32_t* dst_rank) const {
    const std::int32_t* routed = handle_.dst_rank.as<const std::int32_t>() + token * handle_.num_topk;
    for (int k = 0; k < handle_.num_topk; ++k)
      dst_rank[k] = routed[k] >= 0 && sources_[routed[k]].present ? routed[k] : -1;
  }

  void sum_token(RowSum& rows, std::int64_t token, const std::int32_t* dst_rank, const Tensor& out) const {
    const std::int32_t* dst_row = handle_.dst_row.as<const std::int32_t>() + token * handle_.num_topk;
    const auto row_of = [&](int k, int rank) {
      if (context_.is_far(rank)) return forwarded_->row(token, k, rank);
      if (sources_[rank].in_pieces)
        return sources_[rank].x + place_in_ring_[(token - first_in_piece_) * handle_.num_topk + k];
      return sources_[rank].x + static_cast<std::size_t>(dst_row[k]) * call_.row_bytes;
    };
    const auto node_sum = [&](int rank) { return forwarded_ ? forwarded_->node_sum(token, rank) : nullptr; };
    rows.sum(static_cast<int>(token), dst_rank, row_of, node_sum,
             out.as<std::byte>() + token * static_cast<std::int64_t>(call_.row_bytes));
  }

  void bring_weights_home(std::int64_t token, const std::int32_t* dst_rank, const Tensor& out) const {
    const int topk = handle_.num_topk;
    const std::int32_t* dst_row = handle_.dst_row.as<const std::int32_t>() + token * topk;
    const auto entry = [&](int row, int k) {
      if (context_.is_far(dst_rank[row])) return forwarded_->weight(token, row, k, dst_rank[row]);
      return sources_[dst_rank[row]].weights[by_rank() ? std::int64_t{dst_row[row]} * topk + k : dst_row[row]];
    };
    join_weights(call_.in, dst_rank, entry, out.as<float>() + token * topk);
  }

  // Nobody leaves while another still reads its rows.
  void part() {
    // A rank that has left already gave up on us; what we read of it since may be something else.
    std::vector<int> near;
    std::copy_if(active_.begin(), active_.end(), std::back_inserter(near), [&](int p) { return !context_.is_far(p); });
    for (int peer : near) context_.require_there(epoch_, peer);
    for (int peer : near) context_.publish(peer, Flag::kFinished, epoch_, kAllRead);
    for (int peer : near) context_.await_count(Flag::kFinished, epoch_, peer, kAllRead);
  }

  static constexpr std::int64_t kTokensPerPiece = 32;
  static constexpr std::uint32_t kAllRead = ~std::uint32_t{0};  // as a value of `finished`

  Context& context_;
  const CombineCall& call_;
  const Handle& handle_;
  const Epoch epoch_;
  const std::vector<int> active_;
  const std::vector<int> others_;  // without us
  const StagingRing ring_;
  std::vector<CombineSource> sources_;
  std::optional<ForwardedCombine> forwarded_;  // where there are ranks that share no memory with us
  std::vector<std::shared_ptr<void>> staged_;

  bool in_pieces_ = false;  // our rows are staged piece by piece
  std::byte* staging_ = nullptr;
  std::vector<std::int32_t> next_arrival_;  // [num_ranks] not staged yet, by home
  bool any_in_pieces_ = false;
  std::int64_t most_tokens_ = 0;            // of any home
  std::vector<std::size_t> place_in_ring_;  // of the rows of the piece that is added, by token and selection
  std::int64_t first_in_piece_ = 0;
};

}  // namespace

CombineOutput combine(Context& context, const CombineCall& call) { return Combine(context, call).run(); }

}  // namespace deep_ep::host
