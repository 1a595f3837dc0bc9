// SPDX-License-Identifier: MIT
// How ranks meet when a buffer opens, whatever the backend: first each says where its window is and how it is
// configured, then whether it could open the others' windows.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "deep_ep/bootstrap.h"
#include "deep_ep/config.h"
#include "deep_ep/error.h"

namespace deep_ep {

/// Every rank's `address` bytes, in rank order. Collective. Throws kInvalidArgument on every rank, before anybody opens
/// anything, naming the first line in which two configurations differ.
std::vector<Bootstrap::Blob> introduce(Bootstrap& group, std::span<const std::byte> address, const Config& config);

/// The same for a backend's own type of address.
template <typename WindowAddress>
std::vector<WindowAddress> exchange_addresses(Bootstrap& group, const WindowAddress& own, const Config& config) {
  static_assert(std::is_trivially_copyable_v<WindowAddress>);
  const auto blobs = introduce(group, std::as_bytes(std::span(&own, 1)), config);
  std::vector<WindowAddress> addresses(blobs.size());
  for (std::size_t peer = 0; peer < blobs.size(); ++peer) std::memcpy(&addresses[peer], blobs[peer].data(), sizeof own);
  return addresses;
}

/// The second meeting: a rank's failure is everybody's. `ours` is what kept this rank from opening the others' windows,
/// if anything did. The first rank's failure, with its code and naming the rank; nothing where all could. Collective.
std::optional<Error> first_failure(Bootstrap& group, const std::optional<Error>& ours,
                                   std::chrono::milliseconds timeout);

}  // namespace deep_ep
