// SPDX-License-Identifier: MIT
// A caller's own all-gather as a group, for programs that already have MPI or torch.distributed.
#include <utility>

#include "bootstrap/rank_list.h"
#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"

namespace deep_ep {
namespace {

class Callback final : public Bootstrap {
 public:
  Callback(int rank, int num_ranks, AllGather all_gather)
      : rank_(rank), num_ranks_(num_ranks), all_gather_(std::move(all_gather)) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  // The callable keeps its own deadline; there is no way to interrupt it from here.
  std::vector<Blob> all_gather(std::span<const std::byte> mine, std::chrono::milliseconds) override {
    std::vector<Blob> blobs = all_gather_(Blob(mine.begin(), mine.end()));
    if (blobs.size() != static_cast<std::size_t>(num_ranks_)) {
      throw Error(ErrorCode::kInvalidArgument, "blobs returned by the caller's all_gather == num_ranks: " +
                                                   std::to_string(blobs.size()) + " vs " + std::to_string(num_ranks_));
    }
    return blobs;
  }

 private:
  const int rank_;
  const int num_ranks_;
  const AllGather all_gather_;
};

}  // namespace

std::shared_ptr<Bootstrap> callback_group(int rank, int num_ranks, AllGather all_gather) {
  bootstrap::require_rank(rank, num_ranks);
  if (!all_gather) throw Error(ErrorCode::kInvalidArgument, "all_gather: an empty function vs a callable one");
  return std::make_shared<Callback>(rank, num_ranks, std::move(all_gather));
}

}  // namespace deep_ep
