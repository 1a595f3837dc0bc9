// SPDX-License-Identifier: MIT
// Where ranks meet, as launchers say it by environment variables.
#include "environment.h"

#include <fstream>
#include <iterator>

#include "deep_ep/bootstrap.h"
#include "deep_ep/error.h"

namespace deep_ep {
namespace {

constexpr int kHighestPort = 65535;
constexpr int kMostRanks = 1 << 20;

// torchrun writes Python's True or False; other launchers that imitate it write 1 or true.
bool agent_listens_on_master_port() {
  const auto value = environment("TORCHELASTIC_USE_AGENT_STORE");
  return value == "True" || value == "true" || value == "1";
}

int port_from_environment(int fallback) {
  // Read both, so that a malformed MASTER_PORT is reported even where it is overridden.
  const int master_port = environment_int("MASTER_PORT", 0, 1, kHighestPort);
  const int own_port = environment_int("EP_MASTER_PORT", 0, 1, kHighestPort);
  if (own_port != 0) return own_port;
  if (master_port == 0) return fallback;
  if (!agent_listens_on_master_port()) return master_port;
  if (master_port == kHighestPort) {
    throw Error(ErrorCode::kInvalidArgument, "environment variable MASTER_PORT: torchrun's agent listens on " +
                                                 std::to_string(master_port) + " and the next port is beyond " +
                                                 std::to_string(kHighestPort) + "; set EP_MASTER_PORT");
  }
  return master_port + 1;
}

std::string secret_from_environment() {
  const auto secret = environment("EP_RENDEZVOUS_SECRET");
  const auto path = environment("EP_RENDEZVOUS_SECRET_FILE");
  if (secret && path)
    throw Error(ErrorCode::kInvalidArgument,
                "environment variables EP_RENDEZVOUS_SECRET and EP_RENDEZVOUS_SECRET_FILE: both are set");
  if (!path) return secret.value_or("");
  std::ifstream file(*path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!text.empty() && text.back() == '\n') text.pop_back();
  // An empty secret would let everybody in, which is not what the variable asks for.
  if (!file || text.empty())
    throw Error(ErrorCode::kInvalidArgument,
                "environment variable EP_RENDEZVOUS_SECRET_FILE: '" + *path + "' cannot be read, or is empty");
  return text;
}

}  // namespace

TcpRendezvous TcpRendezvous::from_environment() {
  TcpRendezvous where;
  if (const auto address = environment("MASTER_ADDR")) {
    if (address->empty()) {
      throw Error(ErrorCode::kInvalidArgument, "environment variable MASTER_ADDR: '' is not an address");
    }
    where.address = *address;
  }
  where.port = port_from_environment(where.port);
  where.secret = secret_from_environment();
  where.num_ranks = environment_int("WORLD_SIZE", 1, 1, kMostRanks);
  where.rank = environment_int("RANK", 0, 0, kMostRanks - 1);
  if (where.rank >= where.num_ranks) {
    throw Error(ErrorCode::kInvalidArgument, "environment variables RANK < WORLD_SIZE: " + std::to_string(where.rank) +
                                                 " vs " + std::to_string(where.num_ranks) +
                                                 (environment("WORLD_SIZE") ? "" : " (WORLD_SIZE is not set)"));
  }
  return where;
}

}  // namespace deep_ep
