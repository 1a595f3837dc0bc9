// SPDX-License-Identifier: MIT
// The other ranks' side of the meeting: find rank 0, greet it, wait until all are there.
#include <algorithm>
#include <optional>
#include <thread>

#include "bootstrap/meeting.h"
#include "deep_ep/error.h"

namespace deep_ep::bootstrap {
namespace {

using namespace std::chrono_literals;

// Rank 0 may start minutes later: ask often at first, then less often.
constexpr std::chrono::milliseconds kFirstPause = 10ms;
constexpr std::chrono::milliseconds kLongestPause = 250ms;
// One of several addresses may lead nowhere without saying so.
constexpr std::chrono::milliseconds kConnectTimeout = 5s;

// What became of one connection: rank 0's welcome, or the reason to try again.
struct Outcome {
  std::unique_ptr<Connection> welcomed;
  std::string try_again;
};

class Joining {
 public:
  explicit Joining(const TcpRendezvous& where)
      : where_(where), deadline_(where.timeout), self_("rank " + std::to_string(where.rank)) {}

  std::unique_ptr<Connection> run() {
    std::chrono::milliseconds pause = kFirstPause;
    std::string obstacle = "no attempt was made";
    do {
      // Resolved anew each time: the name of a host that is being started may be known only later.
      for (const Address& address : resolve(where_.address, where_.port, deadline_, obstacle)) {
        Opened opened = connect_to(address, Deadline(deadline_.left(kConnectTimeout)));
        if (!opened.socket.is_open()) {
          obstacle = opened.failure();
          continue;
        }
        Outcome outcome = greet(std::move(opened.socket));
        if (outcome.welcomed) return std::move(outcome.welcomed);
        obstacle = std::move(outcome.try_again);
      }
      std::this_thread::sleep_for(deadline_.left(pause));
      pause = std::min(2 * pause, kLongestPause);
    } while (!deadline_.passed());
    throw Error(ErrorCode::kTimeout, self_ + " waited for rank 0 at " + join_address(where_.address, where_.port) +
                                         "; last attempt: " + obstacle);
  }

 private:
  Outcome greet(Socket socket) const {
    auto connection = std::make_unique<Connection>(std::move(socket), kMaxPayloadBytes);
    const Bytes greeting = encode(Hello{where_.generation, where_.rank, where_.num_ranks, where_.job, random_nonce()});
    connection->send(greeting);
    const std::span claims = std::span(greeting).subspan(kHeaderBytes);
    std::optional<Nonce> challenge;
    Deadline patience = deadline_;
    bool has_given_up = false;
    for (;;) {
      if (connection->peek() != nullptr && connection->peek()->kind == FrameKind::kChallenge && !challenge) {
        challenge = take_challenge(*connection);
        const Proof proof = prove(ProofOf::kJoiningRank, where_.secret, claims, *challenge);
        connection->send(encode(Frame{FrameKind::kProof, 0, {proof.begin(), proof.end()}}));
        continue;
      }
      if (connection->peek() != nullptr) return answer(std::move(connection), claims, challenge);
      if (connection->has_ended()) return {nullptr, "rank 0 did not answer: " + connection->end_reason()};
      if (patience.passed()) {
        if (has_given_up) return {nullptr, "it accepted the connection and did not answer"};
        connection->send(encode(FrameKind::kGiveUp, 0));
        has_given_up = true;
        patience = Deadline(grace(where_.timeout));
      }
      Connection* const one[] = {connection.get()};
      exchange(one, nullptr, patience.left());
    }
  }

  Nonce take_challenge(Connection& connection) const {
    const Frame frame = connection.take();
    if (where_.secret.empty())
      throw Error(ErrorCode::kInvalidArgument, "secret: rank 0 asks for one, " + self_ + " has none");
    Nonce challenge{};
    if (frame.payload.size() == challenge.size())
      std::copy(frame.payload.begin(), frame.payload.end(), challenge.begin());
    return challenge;
  }

  // A rank 0 that does not know the secret is none of ours.
  void check_welcome(const Frame& frame, std::span<const std::byte> claims,
                     const std::optional<Nonce>& challenge) const {
    if (where_.secret.empty()) return;
    const bool holds = challenge && is_same(prove(ProofOf::kRank0, where_.secret, claims, *challenge), frame.payload);
    if (!holds) throw Error(ErrorCode::kInvalidArgument, "secret: rank 0 does not know it, or has none");
  }

  Outcome answer(std::unique_ptr<Connection> connection, std::span<const std::byte> claims,
                 const std::optional<Nonce>& challenge) const {
    const Frame frame = connection->take();
    if (frame.kind == FrameKind::kWelcome) {
      check_welcome(frame, claims, challenge);
      return {std::move(connection), ""};
    }
    if (frame.kind == FrameKind::kComeAgain) return {nullptr, decode_text(frame.payload)};
    const auto failure = frame.kind == FrameKind::kFailed ? decode_failure(frame.payload) : std::nullopt;
    if (!failure) return {nullptr, "rank 0 gave an answer that makes no sense"};
    if (failure->code == ErrorCode::kInvalidArgument) {
      throw Error(failure->code, failure->text + " (" + self_ + " asked to join)");
    }
    throw Error(failure->code, failure->text);
  }

  const TcpRendezvous& where_;
  const Deadline deadline_;
  const std::string self_;
};

}  // namespace

std::chrono::milliseconds grace(std::chrono::milliseconds timeout) {
  return std::clamp<std::chrono::milliseconds>(timeout / 2, 50ms, 500ms);
}

std::unique_ptr<Connection> join_rank_0(const TcpRendezvous& where) { return Joining(where).run(); }

}  // namespace deep_ep::bootstrap
