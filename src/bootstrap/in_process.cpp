// SPDX-License-Identifier: MIT
// Ranks that are threads of one process meet at a shared object.
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>

#include "bootstrap/deadline.h"
#include "bootstrap/rank_list.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"

namespace deep_ep {
namespace {

using bootstrap::Deadline;
using Blob = Bootstrap::Blob;

// One all-gather. It is over when everybody has come or when one rank has given up, for then it can no longer be
// complete.
struct Round {
  enum class State { kOpen, kComplete, kFailed };

  explicit Round(int num_ranks) : blobs(num_ranks) {}

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (std::size_t r = 0; r < blobs.size(); ++r) {
      if (!blobs[r]) ranks.push_back(static_cast<int>(r));
    }
    return ranks;
  }

  std::vector<std::optional<Blob>> blobs;  // constant once the state is kComplete
  int num_arrived = 0;
  State state = State::kOpen;
  std::string failure;
  std::condition_variable over;
};

// Each rank keeps its round alive by a shared pointer, so a failing next round cannot touch the result of the last one.
class MeetingPoint {
 public:
  explicit MeetingPoint(int num_ranks) : num_ranks_(num_ranks), round_(std::make_shared<Round>(num_ranks)) {}

  // `call` counts this rank's calls from 1. A rank returns from a round only when that round is over, hence
  // call <= number_ always; call < number_ means that the others gave up this round before the rank came.
  std::shared_ptr<const Round> join(int rank, std::uint64_t call, std::span<const std::byte> mine,
                                    const Deadline& deadline) {
    std::unique_lock lock(mutex_);
    if (call < number_) {
      throw Error(ErrorCode::kTimeout, "rank " + std::to_string(rank) + " came to all_gather " + std::to_string(call) +
                                           " after the other ranks had given it up");
    }
    const std::shared_ptr<Round> round = round_;
    round->blobs[rank].emplace(mine.begin(), mine.end());
    if (++round->num_arrived == num_ranks_) end(*round, Round::State::kComplete);
    const auto is_over = [&] { return round->state != Round::State::kOpen; };
    if (!round->over.wait_until(lock, deadline.at(), is_over)) {
      round->failure = "rank " + std::to_string(rank) + " waited for " + bootstrap::list_ranks(round->missing()) +
                       " in all_gather " + std::to_string(call);
      end(*round, Round::State::kFailed);
    }
    if (round->state == Round::State::kFailed) throw Error(ErrorCode::kTimeout, round->failure);
    return round;
  }

 private:
  void end(Round& round, Round::State state) {
    std::shared_ptr<Round> next = std::make_shared<Round>(num_ranks_);
    round.state = state;
    round.over.notify_all();
    round_ = std::move(next);
    ++number_;
  }

  const int num_ranks_;
  std::mutex mutex_;  // guards all below, and each round while it is open
  std::shared_ptr<Round> round_;
  std::uint64_t number_ = 1;
};

class InProcess final : public Bootstrap {
 public:
  InProcess(int rank, int num_ranks, std::shared_ptr<MeetingPoint> point)
      : rank_(rank), num_ranks_(num_ranks), point_(std::move(point)) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  std::vector<Blob> all_gather(std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    const auto round = point_->join(rank_, ++num_calls_, mine, Deadline(timeout));
    std::vector<Blob> blobs;
    blobs.reserve(round->blobs.size());
    for (const auto& blob : round->blobs) blobs.push_back(*blob);
    return blobs;
  }

 private:
  const int rank_;
  const int num_ranks_;
  std::uint64_t num_calls_ = 0;
  const std::shared_ptr<MeetingPoint> point_;
};

}  // namespace

std::vector<std::shared_ptr<Bootstrap>> in_process_group(int num_ranks) {
  bootstrap::require_rank(0, num_ranks);
  const auto point = std::make_shared<MeetingPoint>(num_ranks);
  std::vector<std::shared_ptr<Bootstrap>> group;
  group.reserve(num_ranks);
  for (int r = 0; r < num_ranks; ++r) group.push_back(std::make_shared<InProcess>(r, num_ranks, point));
  return group;
}

}  // namespace deep_ep
