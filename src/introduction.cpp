// SPDX-License-Identifier: MIT
#include "introduction.h"

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>

#include "check.h"

namespace deep_ep {

namespace {

using Bytes = Bootstrap::Blob;

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void append(Bytes& blob, std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  blob.insert(blob.end(), bytes.begin(), bytes.end());
}

struct Rank {
  int number;
  std::string config;
};

// Names the first line in which two printed configurations differ.
void require_same_config(const Rank& ours, const Rank& theirs) {
  std::istringstream a(ours.config), b(theirs.config);
  for (std::string line_a, line_b; std::getline(a, line_a) && std::getline(b, line_b);)
    require(line_a == line_b, "config differs: rank {} has {}, rank {} has {}", ours.number, line_a, theirs.number,
            line_b);
}

}  // namespace

std::vector<Bytes> introduce(Bootstrap& group, std::span<const std::byte> address, const Config& config) {
  const Rank ours{group.rank(), config.to_string()};
  Bytes blob(address.begin(), address.end());
  append(blob, ours.config);
  auto all = group.all_gather(blob, config.open_timeout);
  for (int peer = 0; peer < static_cast<int>(all.size()); ++peer) {
    require(all[peer].size() >= address.size(),
            "rank {} sent {} bytes of introduction, {} are needed: do all ranks open the same backend?", peer,
            all[peer].size(), address.size());
    require_same_config(ours, {peer, std::string(text_of(std::span(all[peer]).subspan(address.size())))});
    all[peer].resize(address.size());
  }
  return all;
}

std::optional<Error> first_failure(Bootstrap& group, const std::optional<Error>& ours,
                                   std::chrono::milliseconds timeout) {
  Bytes blob;  // the code, then what follows the code's name in the message; empty: all is well
  if (ours) {
    blob.push_back(static_cast<std::byte>(ours->code()));
    const std::string_view prefix = name(ours->code()), message = ours->what();
    append(blob, message.substr(std::min(message.size(), prefix.size() + 2)));
  }
  const auto all = group.all_gather(blob, timeout);
  for (int peer = 0; peer < static_cast<int>(all.size()); ++peer)
    if (!all[peer].empty())
      return Error(static_cast<ErrorCode>(all[peer][0]), fmt::format("rank {} could not open the buffer: {}", peer,
                                                                     text_of(std::span(all[peer]).subspan(1))));
  return {};
}

}  // namespace deep_ep
