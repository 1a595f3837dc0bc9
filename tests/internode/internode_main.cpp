// SPDX-License-Identifier: MIT
// One rank of exchanges between nodes, each compared with the oracle: for tests that start ranks as processes, on one
// machine or on several. Ranks meet as torchrun's do (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); the network is that
// of EP_NETWORK_PROVIDER.
//   internode_main --ranks-per-node 4,4 [--seconds 2] [--timeout-ms 10000] [--die-after N] [--hidden 1024]
// Ends with 0 where every result was right, 3 where a rank timed out (its message is printed), 1 otherwise.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "exchange.h"

namespace deep_ep::test {
namespace {

struct Arguments {
  std::vector<int> ranks_per_node;
  double seconds = 1;
  int timeout_ms = 10000;
  int die_after = -1;  // exchanges, then this rank kills itself
  int hidden = 1024;
};

std::vector<int> numbers(const std::string& text) {
  std::vector<int> all;
  std::istringstream in(text);
  for (std::string one; std::getline(in, one, ',');) all.push_back(std::stoi(one));
  return all;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--ranks-per-node") {
      arguments.ranks_per_node = numbers(value);
    } else if (name == "--seconds") {
      arguments.seconds = std::stod(value);
    } else if (name == "--timeout-ms") {
      arguments.timeout_ms = std::stoi(value);
    } else if (name == "--die-after") {
      arguments.die_after = std::stoi(value);
    } else if (name == "--hidden") {
      arguments.hidden = std::stoi(value);
    } else {
      throw std::runtime_error("unknown argument " + name);
    }
  }
  return arguments;
}

struct Case {
  explicit Case(const Shape& shape) : world(shape) {}
  World world;
  std::vector<SumOrder> orders = {SumOrder::by_rank(), SumOrder::by_rank_and_node(), SumOrder::by_topk()};
  Homeward home = homeward(world, {.hidden = world.shape.hidden, .topk_weights = true});
  std::vector<std::vector<oracle::Combined>> sums = [this] {
    std::vector<std::vector<oracle::Combined>> all;
    for (const SumOrder& order : orders)
      all.push_back(oracle::combine(world.exchange, world.expected, home.ranks, order));
    return all;
  }();
};

std::vector<Case> cases_of(const Arguments& arguments, int ranks) {
  std::vector<Case> all;
  for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded}) {
    Shape s;
    s.ranks = ranks;
    s.ranks_per_node = arguments.ranks_per_node;
    s.layout = layout;
    s.hidden = arguments.hidden;
    s.experts = 4 * ranks;
    s.topk = 6;
    s.tokens = 64;
    if (layout == OutputLayout::kByRank) s.fp8 = Fp8Options{};
    all.emplace_back(s);
  }
  return all;
}

void require_right(const std::string& difference) {
  if (!difference.empty()) throw std::runtime_error(difference);
}

void exchange(Buffer& buffer, const Case& c) {
  const int rank = buffer.rank();
  const auto sent = buffer.dispatch(c.world.input(rank));
  require_right(difference(c.world, rank, sent));
  for (std::size_t i = 0; i < c.orders.size(); ++i)
    require_right(difference(c.sums[i][rank], buffer.combine(combine_input(c.home, rank, sent.handle, c.orders[i]))));
}

int run(const Arguments& arguments) {
  const TcpRendezvous where = TcpRendezvous::from_environment();
  const auto cases = cases_of(arguments, where.num_ranks);
  Config config = cases[0].world.config();
  config.timeout = std::chrono::milliseconds(arguments.timeout_ms);
  const auto buffer = Buffer::open(tcp_group(where), config);
  // A number of rounds that follows from the arguments: all ranks make the same calls.
  int done = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto rounds = static_cast<int>(arguments.seconds * 20);
  for (; done < rounds || done == 0; ++done) {
    if (done == arguments.die_after) ::raise(SIGKILL);
    for (const Case& c : cases) exchange(*buffer, c);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("rank %d: %d rounds of %zu exchanges right in %.1f s\n", where.rank, done, cases.size(), took.count());
  return 0;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  const char* rank = std::getenv("RANK");
  try {
    return deep_ep::test::run(deep_ep::test::parse(argc, argv));
  } catch (const deep_ep::Error& error) {
    std::printf("rank %s: %s\n", rank, error.what());
    return error.code() == deep_ep::ErrorCode::kTimeout ? 3 : 1;
  } catch (const std::exception& error) {
    std::printf("rank %s: %s\n", rank, error.what());
    return 1;
  }
}
