// SPDX-License-Identifier: MIT
// How the ranks of a TCP group find each other: rank 0 receives, the others come. Each returns open connections.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "bootstrap/connection.h"
#include "deep_ep/bootstrap.h"

namespace deep_ep::bootstrap {

/// How long a rank whose deadline has passed waits for rank 0 to say who is missing. Short against the timeout itself.
std::chrono::milliseconds grace(std::chrono::milliseconds timeout);

/// Rank 0: listens until all ranks are there. Entry r is the connection to rank r; entry 0 is null.
std::vector<std::unique_ptr<Connection>> receive_ranks(const TcpRendezvous& where);

/// The other ranks: the connection to rank 0, once all ranks are there.
std::unique_ptr<Connection> join_rank_0(const TcpRendezvous& where);

}  // namespace deep_ep::bootstrap
