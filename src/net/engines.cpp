// SPDX-License-Identifier: MIT
#include "net/engines.h"

#include "deep_ep/error.h"
#include "net/loopback.h"

namespace deep_ep::net {

std::vector<std::string> available_providers(const NetworkConfig& settings) {
  if (settings.provider == "loopback") return {settings.provider};
  throw Error(ErrorCode::kUnsupported, "network.provider: '" + settings.provider +
                                           "' is not in this build, which has: loopback (ranks as threads)");
}

std::unique_ptr<Fabric> open_engine(const EngineInput& input) {
  return LoopbackNetwork::of_job(input.job, input.num_ranks)->open(input.rank);
}

}  // namespace deep_ep::net
