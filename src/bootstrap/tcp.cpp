// SPDX-License-Identifier: MIT
// A group over TCP: a star around rank 0, which collects the blobs and answers everyone with all of them.
//
// A round fails as a whole. Whoever's deadline passes first tells rank 0 (kGiveUp), and rank 0 tells everyone who is
// missing, so all raise the same error and the next all_gather starts in step: frames carry the number of their round,
// and those of a failed round are dropped where they arrive late. A rank that has left cannot come back: from then on
// each call fails.
#include <optional>
#include <utility>

#include "bootstrap/meeting.h"
#include "bootstrap/rank_list.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"

namespace deep_ep {
namespace {

using namespace bootstrap;
using Blob = Bootstrap::Blob;

void require_size(std::span<const std::byte> mine) {
  if (mine.size() > kMaxPayloadBytes) {
    throw Error(ErrorCode::kInvalidArgument,
                "blob bytes: " + std::to_string(mine.size()) + " vs at most " + std::to_string(kMaxPayloadBytes));
  }
}

class Rank0 final : public Bootstrap {
 public:
  explicit Rank0(std::vector<std::unique_ptr<Connection>> peers) : peers_(std::move(peers)) {
    for (const auto& peer : peers_) connections_.push_back(peer.get());
  }

  int rank() const override { return 0; }
  int num_ranks() const override { return static_cast<int>(peers_.size()); }

  std::vector<Blob> all_gather(std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    if (broken_) throw *broken_;
    require_size(mine);
    ++round_;
    const Deadline deadline(timeout);
    blobs_.assign(peers_.size(), std::nullopt);
    blobs_[0].emplace(mine.begin(), mine.end());
    exchange(connections_, nullptr, std::chrono::milliseconds(0));
    for (;;) {
      const std::optional<int> gave_up = hear_peers();
      const std::vector<int> missing = missing_ranks();
      if (gave_up && missing.empty()) fail(ErrorCode::kTimeout, came_too_late_for(*gave_up));
      if (missing.empty()) break;
      if (gave_up || deadline.passed()) fail(ErrorCode::kTimeout, waited_for(missing));
      exchange(connections_, nullptr, deadline.left());
    }
    return answer(deadline);
  }

 private:
  std::string waited_for(const std::vector<int>& ranks) const {
    return "rank 0 waited for " + list_ranks(ranks) + " in all_gather " + std::to_string(round_);
  }

  std::string came_too_late_for(int peer) const {
    return "rank " + std::to_string(peer) + " waited for rank 0 in all_gather " + std::to_string(round_);
  }

  std::vector<int> missing_ranks() const {
    std::vector<int> missing;
    for (int r = 1; r < num_ranks(); ++r) {
      if (!blobs_[r]) missing.push_back(r);
    }
    return missing;
  }

  // Takes all that has come for this round. Returns a rank whose own deadline for it has passed.
  std::optional<int> hear_peers() {
    std::optional<int> gave_up;
    for (int r = 1; r < num_ranks(); ++r) {
      Connection& peer = *peers_[r];
      // A frame of a later round stays: its sender gave this one up and is ahead of us.
      while (peer.peek() != nullptr && peer.peek()->round <= round_) {
        Frame frame = peer.take();
        const bool is_known = frame.kind == FrameKind::kBlob || frame.kind == FrameKind::kGiveUp;
        if (!is_known) break_down("rank " + std::to_string(r) + " sent a frame that has no place here");
        if (frame.round < round_) continue;
        if (frame.kind == FrameKind::kBlob) blobs_[r] = std::move(frame.payload);
        if (frame.kind == FrameKind::kGiveUp) gave_up = r;
      }
    }
    // Also a rank whose blob is here: it waited for the answer and is no more.
    report_gone();
    return gave_up;
  }

  void report_gone() {
    std::vector<int> gone;
    std::string reason;
    for (int r = 1; r < num_ranks(); ++r) {
      if (!peers_[r]->has_ended()) continue;
      gone.push_back(r);
      reason = peers_[r]->end_reason();
    }
    if (!gone.empty()) {
      break_down(list_ranks(gone) + " left the group: " + reason + ", all_gather " + std::to_string(round_));
    }
  }

  std::vector<Blob> answer(const Deadline& deadline) {
    std::vector<Blob> all;
    for (auto& blob : blobs_) all.push_back(std::move(*blob));
    if (const std::size_t total = gathered_bytes(all); total > kMaxPayloadBytes) {
      fail(ErrorCode::kInvalidArgument, "bytes of all blobs with their sizes: " + std::to_string(total) +
                                            " vs at most " + std::to_string(kMaxPayloadBytes));
    }
    const auto frame = std::make_shared<const Bytes>(encode_gathered(all, round_));
    for (int r = 1; r < num_ranks(); ++r) peers_[r]->send(frame);
    for (;;) {
      std::vector<int> waiting;
      for (int r = 1; r < num_ranks(); ++r) {
        // A rank that has its answer may leave, and one that died now gave its blob before: the next round will notice.
        if (peers_[r]->has_output()) waiting.push_back(r);
      }
      if (waiting.empty()) return all;
      if (deadline.passed()) fail(ErrorCode::kTimeout, waited_for(waiting) + " to take the answer");
      exchange(connections_, nullptr, deadline.left());
    }
  }

  [[noreturn]] void fail(ErrorCode code, const std::string& text) {
    const auto frame = std::make_shared<const Bytes>(encode(Failure{code, text}, round_));
    for (const auto& peer : peers_) {
      if (peer) peer->send(frame);
    }
    throw Error(code, text);
  }

  [[noreturn]] void break_down(const std::string& text) {
    broken_.emplace(ErrorCode::kSystem, text);
    fail(ErrorCode::kSystem, text);
  }

  std::vector<std::unique_ptr<Connection>> peers_;  // by rank; entry 0 is null
  std::vector<Connection*> connections_;            // the same, as exchange() takes them
  std::vector<std::optional<Blob>> blobs_;          // of this round
  std::uint64_t round_ = 0;
  std::optional<Error> broken_;
};

class OtherRank final : public Bootstrap {
 public:
  OtherRank(int rank, int num_ranks, std::unique_ptr<Connection> rank_0)
      : rank_(rank), num_ranks_(num_ranks), rank_0_(std::move(rank_0)) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  std::vector<Blob> all_gather(std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    if (broken_) throw *broken_;
    require_size(mine);
    ++round_;
    Deadline deadline(timeout);
    bool has_given_up = false;
    rank_0_->receive();  // a verdict on this round may be here already, if we are late
    if (auto all = hear_rank_0()) return *std::move(all);
    rank_0_->send(encode(Frame{FrameKind::kBlob, round_, Blob(mine.begin(), mine.end())}));
    for (;;) {
      if (auto all = hear_rank_0()) return *std::move(all);
      if (deadline.passed()) {
        if (has_given_up) throw Error(ErrorCode::kTimeout, waited());
        rank_0_->send(encode(FrameKind::kGiveUp, round_));
        has_given_up = true;
        deadline = Deadline(grace(timeout));
      }
      Connection* const one[] = {rank_0_.get()};
      exchange(one, nullptr, deadline.left());
    }
  }

 private:
  std::string waited() const {
    return "rank " + std::to_string(rank_) + " waited for rank 0 in all_gather " + std::to_string(round_);
  }

  // The answer of this round, if it is here; throws rank 0's verdict if that is here.
  std::optional<std::vector<Blob>> hear_rank_0() {
    while (rank_0_->peek() != nullptr) {
      const Frame frame = rank_0_->take();
      if (frame.kind == FrameKind::kFailed) {
        hear_verdict(frame);
      } else if (frame.kind != FrameKind::kGathered || frame.round > round_) {
        break_down("rank 0 sent a frame that has no place here");
      } else if (frame.round == round_) {
        auto all = decode_gathered(frame.payload, num_ranks_);
        if (!all) break_down("rank 0 sent an answer whose sizes do not add up");
        return all;
      }
    }
    if (rank_0_->has_ended()) {
      break_down("rank 0 left the group: " + rank_0_->end_reason() + ", all_gather " + std::to_string(round_));
    }
    return std::nullopt;
  }

  void hear_verdict(const Frame& frame) {
    const auto failure = decode_failure(frame.payload);
    if (!failure) break_down("rank 0 sent a verdict that makes no sense");
    // A group that a rank has left stays broken, whichever round it was noticed in.
    if (failure->code == ErrorCode::kSystem) break_down(failure->text);
    if (frame.round == round_) throw Error(failure->code, failure->text);
  }

  [[noreturn]] void break_down(const std::string& text) {
    broken_.emplace(ErrorCode::kSystem, text);
    throw *broken_;
  }

  const int rank_;
  const int num_ranks_;
  const std::unique_ptr<Connection> rank_0_;
  std::uint64_t round_ = 0;
  std::optional<Error> broken_;
};

void require_valid(const TcpRendezvous& where) {
  require_rank(where.rank, where.num_ranks);
  if (where.port < 1 || where.port > 65535) {
    throw Error(ErrorCode::kInvalidArgument, "port: " + std::to_string(where.port) + " vs 1 to 65535");
  }
  if (where.address.empty()) throw Error(ErrorCode::kInvalidArgument, "address: '' vs a name or a numeric address");
  if (where.job.size() > kMaxJobBytes) {
    throw Error(ErrorCode::kInvalidArgument,
                "job bytes: " + std::to_string(where.job.size()) + " vs at most " + std::to_string(kMaxJobBytes));
  }
}

}  // namespace

std::shared_ptr<Bootstrap> tcp_group(const TcpRendezvous& where) {
  require_valid(where);
  if (where.num_ranks == 1) return in_process_group(1).front();  // nobody to meet: no sockets
  if (where.rank == 0) return std::make_shared<Rank0>(receive_ranks(where));
  return std::make_shared<OtherRank>(where.rank, where.num_ranks, join_rank_0(where));
}

}  // namespace deep_ep
