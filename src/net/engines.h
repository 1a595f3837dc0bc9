// SPDX-License-Identifier: MIT
// The engines behind net/fabric.h, and how one is chosen.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "net/fabric.h"
#include "net/interface.h"

namespace deep_ep::net {

struct EngineInput {
  int rank = 0;
  int num_ranks = 1;
  std::uint64_t job = 0;                 // random, the same on all ranks
  std::size_t most_immediate_bytes = 8;  // that are used where the provider carries more: for tests of narrow ones
  NetworkConfig settings;                // with the environment's; `provider` is one of available_providers()
};

/// What this rank could use under these settings, best first. Throws kUnsupported where a provider is named that is not
/// here, with the reason and what is.
std::vector<std::string> available_providers(const NetworkConfig& settings);

/// What a provider could go through here.
struct Offer {
  std::string provider;
  std::vector<Interface> interfaces;
};
/// Of every provider that is chosen without being named, best first. Throws kUnsupported where there is none, with the
/// reason.
std::vector<Offer> offers();

std::unique_ptr<Fabric> open_engine(const EngineInput& input);

}  // namespace deep_ep::net
