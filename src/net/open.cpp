// SPDX-License-Identifier: MIT
// How the endpoints of a group find each other: over the group's all-gather, in three rounds. A rank that fails in one
// of them says so in the next, and all ranks raise its error.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>

#include "check.h"
#include "net/engines.h"
#include "net/fabric.h"

namespace deep_ep::net {

namespace {

/// Something that every rank must do before the next step. One gather: each rank's result, or the first failure.
class Round {
 public:
  Round(Bootstrap& group, std::chrono::milliseconds timeout) : group_(group), timeout_(timeout) {}

  /// Calls work() and exchanges what it returns. Throws what it threw, here and on all other ranks.
  std::vector<Blob> gather(const std::function<Blob()>& work) {
    Blob mine;
    try {
      mine = work();
      mine.push_back(std::byte{0});
    } catch (const Error& error) {
      const std::string what = error.what();
      const auto* text = reinterpret_cast<const std::byte*>(what.data());
      mine.assign(text, text + what.size());
      mine.push_back(static_cast<std::byte>(error.code()));
    }
    auto all = group_.all_gather(mine, timeout_);
    for (int rank = 0; rank < group_.num_ranks(); ++rank) {
      require(!all[rank].empty(), "open_fabric: rank {} sent nothing", rank);
      const auto code = static_cast<int>(all[rank].back());
      all[rank].pop_back();
      if (code != 0) throw Error(static_cast<ErrorCode>(code), fmt::format("rank {}: {}", rank, text_of(all[rank])));
    }
    return all;
  }

  static std::string text_of(const Blob& blob) { return {reinterpret_cast<const char*>(blob.data()), blob.size()}; }
  static Blob blob_of(const std::string& text) {
    const auto* first = reinterpret_cast<const std::byte*>(text.data());
    return {first, first + text.size()};
  }

 private:
  Bootstrap& group_;
  std::chrono::milliseconds timeout_;
};

std::uint64_t random_number() {
  std::random_device source;
  return std::uint64_t{source()} << 32 | source();
}

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

// The first of rank 0's providers, best first, that every rank has.
std::string common_provider(const std::vector<std::vector<std::string>>& offers) {
  for (const std::string& provider : offers[0]) {
    const bool everywhere = std::all_of(offers.begin(), offers.end(), [&](const std::vector<std::string>& offer) {
      return std::find(offer.begin(), offer.end(), provider) != offer.end();
    });
    if (everywhere) return provider;
  }
  std::string text;
  for (std::size_t rank = 0; rank < offers.size(); ++rank)
    text += fmt::format("{}rank {} has [{}]", rank == 0 ? "" : ", ", rank, fmt::join(offers[rank], ", "));
  throw Error(ErrorCode::kUnsupported, "network.provider: none that all ranks have: " + text);
}

}  // namespace

std::unique_ptr<Fabric> open_fabric(Bootstrap& group, const NetworkConfig& config, std::chrono::milliseconds timeout) {
  Round round(group, timeout);
  NetworkConfig settings = config;
  std::uint64_t job = random_number();

  // 1. Who has which engine, and the job's number, which is rank 0's.
  const auto offers = round.gather([&] {
    Blob blob(sizeof job);
    std::memcpy(blob.data(), &job, sizeof job);
    const Blob names = Round::blob_of(fmt::format("{}", fmt::join(available_providers(settings), "\n")));
    blob.insert(blob.end(), names.begin(), names.end());
    return blob;
  });
  std::vector<std::vector<std::string>> names;
  for (const Blob& offer : offers) {
    require(offer.size() >= sizeof job, "open_fabric: a rank sent {} bytes", offer.size());
    names.push_back(split_lines(Round::text_of({offer.begin() + sizeof job, offer.end()})));
  }
  std::memcpy(&job, offers[0].data(), sizeof job);
  settings.provider = common_provider(names);

  // 2. Addresses.
  std::unique_ptr<Fabric> fabric;
  const auto addresses = round.gather([&] {
    fabric = open_engine({.rank = group.rank(), .num_ranks = group.num_ranks(), .job = job, .settings = settings});
    return fabric->address();
  });

  // 3. Everybody knows everybody: from now on messages may come.
  (void)round.gather([&] {
    fabric->connect(addresses);
    return Blob();
  });
  return fabric;
}

}  // namespace deep_ep::net
