// SPDX-License-Identifier: MIT
// One rank of a cluster: MASTER_ADDR, RANK and WORLD_SIZE say which. tools/cluster_test.py starts one per rank, each in
// the network namespace of its node.
//
//   cluster_rank_main check NODES
//       exchanges in every form, low latency too, against the oracle; exit code 1 at a difference
//   cluster_rank_main loop NODES TIMEOUT_MS [low_latency]
//       says "ready" after the first exchange and goes on until a peer is lost; says "lost PEER: message" and ends with
//       exit code 3
//
// NODES is as in Config::ranks_per_node: "4,4". EP_TEST_BACKEND chooses the backend, EP_TEST_PROVIDER the network:
// "tcp" where it is not set.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <sstream>
#include <string>

#include "any_buffer.h"
#include "deep_ep/bootstrap.h"
#include "exchange.h"

using namespace deep_ep;
using namespace deep_ep::test;

namespace {

constexpr int kDifferent = 1, kRefused = 2, kLost = 3;

std::vector<int> nodes_of(const std::string& text) {
  std::vector<int> nodes;
  std::istringstream list(text);
  for (std::string size; std::getline(list, size, ',');) nodes.push_back(std::atoi(size.c_str()));
  return nodes;
}

Shape shape_of(const std::vector<int>& nodes) {
  Shape shape;
  shape.ranks_per_node = nodes;
  shape.ranks = 0;
  for (const int size : nodes) shape.ranks += size;
  const char* const provider = std::getenv("EP_TEST_PROVIDER");
  shape.network = provider != nullptr ? provider : "tcp";
  shape.experts = 3 * shape.ranks + 1;
  shape.topk = 6;
  shape.tokens = 64;
  shape.hidden = 512;
  shape.seed = 40;
  return shape;
}

/// A dispatch in this form and a combine in every order; the first difference, or "".
std::string check_exchange(AnyBuffer& buffer, const World& world) {
  const int rank = buffer.rank();
  const DispatchOutput sent = dispatch(buffer, world.input(rank), world.shape.low_latency);
  if (const std::string what = difference(world, rank, sent); !what.empty()) return "dispatch: " + what;
  const Homeward home = homeward(world, {});
  for (const SumOrder& order : all_orders()) {
    const auto expected = oracle::combine(world.exchange, world.expected, home.ranks, order);
    const CombineOutput got = combine(buffer, combine_input(home, rank, sent.handle, order), world.shape.low_latency);
    if (const std::string what = difference(expected[rank], got); !what.empty())
      return "combine, " + to_string(order) + ": " + what;
  }
  return "";
}

int open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<int>(std::distance(begin(all), end(all)));
}

/// High throughput and low latency in every layout.
std::vector<Shape> forms_of(Shape shape) {
  std::vector<Shape> forms;
  for (const bool low_latency : {false, true}) {
    shape.low_latency = low_latency;
    for (const OutputLayout layout : {OutputLayout::kByRank, OutputLayout::kByExpert, OutputLayout::kPadded}) {
      shape.layout = layout;
      forms.push_back(shape);
    }
  }
  return forms;
}

int check(const std::shared_ptr<Bootstrap>& group, const Shape& wanted) {
  int descriptors = 0;
  for (const Shape& shape : forms_of(wanted)) {
    const World world(shape);
    const auto buffer = AnyBuffer::open(group, world.config(), {});
    if (const std::string what = check_exchange(*buffer, world); !what.empty()) {
      std::printf("different: rank %d: %s, of %s\n", group->rank(), what.c_str(), shape.to_string().c_str());
      return kDifferent;
    }
    buffer->close();
    // libfabric keeps some for the process; what a buffer opened is gone.
    const int now = open_descriptors();
    if (descriptors == 0) descriptors = now;
    if (now != descriptors) {
      std::printf("different: rank %d: %d descriptors are open, %d after the first buffer\n", group->rank(), now,
                  descriptors);
      return kDifferent;
    }
  }
  std::puts("same");
  return 0;
}

int loop(const std::shared_ptr<Bootstrap>& group, const Shape& shape, int timeout_ms) {
  const World world(shape);
  Config config = world.config();
  config.timeout = std::chrono::milliseconds(timeout_ms);
  const auto buffer = AnyBuffer::open(group, config, {});
  try {
    for (bool is_first = true;; is_first = false) {
      if (!check_exchange(*buffer, world).empty()) return kDifferent;
      if (!is_first) continue;
      std::puts("ready");
      std::fflush(stdout);
    }
  } catch (const Error& error) {
    if (!error.wait()) throw;
    std::printf("lost %d: %s\n", error.wait()->peer, error.what());
    return kLost;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 3) {
      std::fputs("usage: cluster_rank_main check|loop NODES [TIMEOUT_MS [low_latency]]\n", stderr);
      return kRefused;
    }
    const auto group = tcp_group(TcpRendezvous::from_environment());
    Shape shape = shape_of(nodes_of(argv[2]));
    shape.low_latency = argc > 4 && std::strcmp(argv[4], "low_latency") == 0;
    return std::strcmp(argv[1], "loop") == 0 ? loop(group, shape, argc > 3 ? std::atoi(argv[3]) : 3000)
                                             : check(group, shape);
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
    return kRefused;
  }
}
