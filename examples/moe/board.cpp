// SPDX-License-Identifier: MIT
// Anonymous shared memory with one record per rank.
#include "board.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>

namespace moe {

const char* describe(Stage stage) {
  switch (stage) {
    case Stage::kMeet: return "ranks meet and open their buffers";
    case Stage::kRoute: return "embed tokens and choose experts";
    case Stage::kDispatch: return "dispatch, BF16";
    case Stage::kExperts: return "experts";
    case Stage::kCombine: return "combine";
    case Stage::kCheck: return "compute the layer again without communication";
    case Stage::kDispatchFp8: return "dispatch, FP8";
    case Stage::kExpertsFp8: return "experts";
    case Stage::kCombineFp8: return "combine";
    case Stage::kCompare: return "compare with BF16";
  }
  return "";
}

void RankRecord::set_failure(std::string_view why) {
  const std::size_t length = std::min(why.size(), failure.size() - 1);
  std::copy_n(why.begin(), length, failure.begin());
  failure[length] = '\0';
}

Board::Board(int ranks) : num_ranks_(ranks) {
  void* memory = mmap(nullptr, sizeof(RankRecord) * ranks, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  records_ = static_cast<RankRecord*>(memory);
  std::uninitialized_default_construct_n(records_, ranks);
}

Board::~Board() { munmap(records_, sizeof(RankRecord) * num_ranks_); }

}  // namespace moe
