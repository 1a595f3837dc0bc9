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
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
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

/// What this process has open: links of /proc/self/fd, connections apart from the rest.
struct OpenDescriptors {
  std::vector<std::string> connections, others;

  static OpenDescriptors now() {
    OpenDescriptors open;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      int listens = 0;
      socklen_t bytes = sizeof listens;
      const bool is_socket =
          getsockopt(std::stoi(entry.path().filename()), SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0;
      (is_socket && listens == 0 ? open.connections : open.others)
          .push_back(std::filesystem::read_symlink(entry.path()));
    }
    return open;
  }
};

std::string list(const std::vector<std::string>& all) {
  std::string text;
  for (const std::string& one : all) text += (text.empty() ? "" : ", ") + one;
  return text;
}

/// Compares what is open with what was open after the first of `buffers` that have been closed since; says what is
/// more, or "". libfabric's tcp (1.17) loses a connection that it has accepted, and whose request it has not read when
/// its endpoint closes: ranks connect to each other at once, and on a bad link the second connection of a pair may come
/// as late as that. So some may be left over, but not one for each buffer.
std::string left_open(const OpenDescriptors& first, int buffers) {
  const OpenDescriptors now = OpenDescriptors::now();
  if (now.others.size() != first.others.size())
    return "open: " + list(now.others) + "; after the first buffer: " + list(first.others);
  if (now.connections.size() >= first.connections.size() + static_cast<std::size_t>(buffers) - 1)
    return std::to_string(now.connections.size()) + " connections are open after " + std::to_string(buffers) +
           " buffers, " + std::to_string(first.connections.size()) + " after the first";
  return "";
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
  const std::vector<Shape> forms = forms_of(wanted);
  std::optional<OpenDescriptors> after_first;
  for (const Shape& shape : forms) {
    const World world(shape);
    const auto buffer = AnyBuffer::open(group, world.config(), {});
    if (const std::string what = check_exchange(*buffer, world); !what.empty()) {
      std::printf("different: rank %d: %s, of %s\n", group->rank(), what.c_str(), shape.to_string().c_str());
      return kDifferent;
    }
    buffer->close();
    // libfabric keeps some for the process; what a buffer opened is gone.
    if (!after_first) after_first = OpenDescriptors::now();
  }
  if (const std::string what = left_open(*after_first, static_cast<int>(forms.size())); !what.empty()) {
    std::printf("different: rank %d: %s\n", group->rank(), what.c_str());
    return kDifferent;
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
