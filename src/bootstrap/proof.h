// SPDX-License-Identifier: MIT
// How the two sides of a meeting prove that they know the group's secret without saying it: each answers the other's
// random number with an HMAC-SHA256. OpenSSL computes it; its libcrypto is opened when a secret is first used, so the
// library is built and runs without it where there are no secrets.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace deep_ep::bootstrap {

inline constexpr std::size_t kProofBytes = 32;
using Nonce = std::array<std::byte, kProofBytes>;
using Proof = std::array<std::byte, kProofBytes>;

/// From the system's generator. Throws kSystem where it has none.
Nonce random_nonce();

/// Throws kUnsupported where this machine has no libcrypto.
Proof hmac_sha256(const std::string& key, std::span<const std::byte> message);

/// What one side answers. The greeting holds the joining rank's random number and all that it claims, so a proof is
/// good for that one claim on that one connection; the two sides' proofs differ, so neither can be sent back.
enum class ProofOf { kJoiningRank, kRank0 };
Proof prove(ProofOf side, const std::string& secret, std::span<const std::byte> greeting, const Nonce& challenge);

/// Takes the same time wherever they differ.
bool is_same(const Proof& expected, std::span<const std::byte> claimed);

}  // namespace deep_ep::bootstrap
