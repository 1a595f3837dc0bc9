// SPDX-License-Identifier: MIT
// Rank 0's side of the meeting: admits the ranks of this job and generation, turns strangers away.
#include <algorithm>
#include <cerrno>
#include <optional>
#include <thread>

#include "bootstrap/meeting.h"
#include "bootstrap/rank_list.h"
#include "deep_ep/error.h"

namespace deep_ep::bootstrap {
namespace {

using namespace std::chrono_literals;

// A stranger that says nothing holds a descriptor no longer than this, and no more than so many do at once.
constexpr auto kHelloTimeout = 5s;
constexpr std::size_t kMaxSilent = 256;
// How long rank 0 tries again when its port is taken: a client of another program may hold it for a moment as its own
// ephemeral port, and an earlier rank 0 may be about to close.
constexpr auto kBindPatience = 2s;
constexpr auto kBindPause = 50ms;

struct Guest {
  std::unique_ptr<Connection> connection;
  std::string from;
  Deadline hello_by{kHelloTimeout};
  // Once it has greeted us and we have a secret
  Bytes greeting{};
  Nonce challenge{};
};

class Reception {
 public:
  Reception(const TcpRendezvous& where, Socket listener)
      : where_(where), deadline_(where.timeout), listener_(std::move(listener)), ranks_(where.num_ranks) {}

  std::vector<std::unique_ptr<Connection>> run() {
    for (;;) {
      take_connections();
      hear_guests();
      watch_ranks();
      const std::vector<int> missing = missing_ranks();
      if (missing.empty()) return welcome_all();
      if (deadline_.passed()) fail({ErrorCode::kTimeout, waiting_for(missing)});
      // Guests have deadlines of their own, hence the upper bound.
      exchange(connections(), &listener_, deadline_.left(guests_.empty() ? 1h : 100ms));
    }
  }

 private:
  std::vector<Connection*> connections() const {
    std::vector<Connection*> all;
    for (const Guest& guest : guests_) all.push_back(guest.connection.get());
    for (const Guest& rank : ranks_) all.push_back(rank.connection.get());
    return all;
  }

  std::vector<int> missing_ranks() const {
    std::vector<int> missing;
    for (int r = 1; r < where_.num_ranks; ++r) {
      if (!ranks_[r].connection) missing.push_back(r);
    }
    return missing;
  }

  std::string waiting_for(const std::vector<int>& missing) const {
    std::string text = "rank 0 waited for " + list_ranks(missing) + " at " + join_address(where_.address, where_.port);
    if (num_refused_ > 0) {
      text += " (" + std::to_string(num_refused_) + " connections refused, the last one from " + last_refusal_ + ")";
    }
    return text;
  }

  void take_connections() {
    std::string from;
    for (Socket socket = accept_from(listener_, from); socket.is_open(); socket = accept_from(listener_, from)) {
      if (guests_.size() == kMaxSilent) {
        refuse(guests_.front(), "it said nothing while many others waited");
        guests_.erase(guests_.begin());
      }
      guests_.push_back({std::make_unique<Connection>(std::move(socket), kMaxHelloBytes), from});
      guests_.back().connection->receive();
    }
  }

  // A guest leaves the list as soon as it is known what it is; the others stay there, where fail() finds them.
  void hear_guests() {
    for (std::size_t i = 0; i < guests_.size();) {
      const Connection& connection = *guests_[i].connection;
      if (connection.peek() == nullptr && !connection.has_ended() && !guests_[i].hello_by.passed()) {
        ++i;
        continue;
      }
      Guest guest = std::move(guests_[i]);
      guests_.erase(guests_.begin() + static_cast<std::ptrdiff_t>(i));
      hear(std::move(guest));
    }
  }

  void hear(Guest guest) {
    if (guest.connection->peek() == nullptr) {
      return refuse(guest, guest.connection->has_ended() ? guest.connection->end_reason() : "it said nothing");
    }
    const Frame frame = guest.connection->take();
    if (guest.greeting.empty()) {
      const auto hello = frame.kind == FrameKind::kHello ? decode_hello(frame.payload) : std::nullopt;
      if (!hello) return refuse(guest, "its greeting is malformed");
      if (where_.secret.empty()) return judge(std::move(guest), *hello);
      guest.greeting = frame.payload;
      guest.challenge = random_nonce();
      guest.connection->send(encode(Frame{FrameKind::kChallenge, 0, {guest.challenge.begin(), guest.challenge.end()}}));
      return guests_.push_back(std::move(guest));
    }
    const Proof expected = prove(ProofOf::kJoiningRank, where_.secret, guest.greeting, guest.challenge);
    if (frame.kind != FrameKind::kProof || !is_same(expected, frame.payload))
      return refuse(guest, "secret: its answer is wrong");
    const Hello hello = *decode_hello(guest.greeting);
    judge(std::move(guest), hello);
  }

  // It may ask to join.
  void judge(Guest guest, const Hello& hello) {
    if (hello.job != where_.job) {
      return refuse(guest, "job: '" + hello.job + "' vs '" + where_.job + "' at rank 0");
    }
    if (hello.generation != where_.generation) {
      const std::string reason =
          "generation: " + std::to_string(hello.generation) + " vs " + std::to_string(where_.generation) + " at rank 0";
      if (hello.generation < where_.generation) return refuse(guest, reason);
      // We are the old ones; a newer rank 0 will listen here when we are gone.
      guest.connection->send(encode_come_again(reason));
      return count_refusal(guest, reason);
    }
    admit(std::move(guest), hello);
  }

  void admit(Guest guest, const Hello& hello) {
    const std::string rank = std::to_string(hello.rank);
    if (hello.num_ranks != where_.num_ranks) {
      guests_.push_back(std::move(guest));  // so that it learns the reason with all others
      fail({ErrorCode::kInvalidArgument, "num_ranks: " + std::to_string(hello.num_ranks) + " at rank " + rank + " vs " +
                                             std::to_string(where_.num_ranks) + " at rank 0"});
    }
    if (hello.rank < 0 || hello.rank >= where_.num_ranks) {
      return refuse(guest, "rank: " + rank + " vs num_ranks " + std::to_string(where_.num_ranks));
    }
    Guest& place = ranks_[hello.rank];
    if (place.connection) place.connection->receive();
    if (hello.rank == 0 || (place.connection && !place.connection->has_ended())) {
      const std::string first =
          hello.rank == 0 ? "the listener at " + join_address(where_.address, where_.port) : place.from;
      const std::string second = guest.from;
      guests_.push_back(std::move(guest));
      fail({ErrorCode::kInvalidArgument, "rank: " + rank + " is claimed twice, by " + first + " and by " + second});
    }
    guest.connection->set_max_payload_bytes(kMaxPayloadBytes);
    place = std::move(guest);
  }

  // Until all are there nobody depends on a rank, so one that leaves may come again; a launcher may have restarted it.
  void watch_ranks() {
    for (Guest& rank : ranks_) {
      if (rank.connection && rank.connection->has_ended()) rank.connection.reset();
    }
    const std::vector<int> missing = missing_ranks();
    if (missing.empty()) return;
    for (Guest& rank : ranks_) {
      // All that a rank may say at this stage is that its own deadline has passed.
      if (!rank.connection || rank.connection->peek() == nullptr) continue;
      rank.connection->send(encode(Failure{ErrorCode::kTimeout, waiting_for(missing)}, 0));
      rank.connection.reset();
    }
  }

  void refuse(Guest& guest, const std::string& reason) {
    guest.connection->send(encode(Failure{ErrorCode::kInvalidArgument, reason}, 0));
    count_refusal(guest, reason);
  }

  void count_refusal(const Guest& guest, const std::string& reason) {
    ++num_refused_;
    last_refusal_ = guest.from + ": " + reason;
  }

  std::vector<std::unique_ptr<Connection>> welcome_all() {
    // First, so that a rank which opens its next group at once does not meet this listener again.
    listener_ = Socket();
    std::vector<std::unique_ptr<Connection>> all(where_.num_ranks);
    for (int r = 1; r < where_.num_ranks; ++r) {
      Frame welcome{FrameKind::kWelcome, 0, {}};
      if (!where_.secret.empty()) {
        const Proof proof = prove(ProofOf::kRank0, where_.secret, ranks_[r].greeting, ranks_[r].challenge);
        welcome.payload.assign(proof.begin(), proof.end());
      }
      all[r] = std::move(ranks_[r].connection);
      all[r]->send(encode(welcome));
    }
    return all;
  }

  [[noreturn]] void fail(const Failure& failure) {
    take_connections();  // those who are at the door learn it too
    const auto frame = std::make_shared<const Bytes>(encode(failure, 0));
    for (Connection* connection : connections()) {
      if (connection != nullptr) connection->send(frame);
    }
    throw Error(failure.code, failure.text);
  }

  const TcpRendezvous& where_;
  const Deadline deadline_;
  Socket listener_;
  std::vector<Guest> guests_;  // have not said who they are
  std::vector<Guest> ranks_;   // by rank; no connection: not here. Entry 0 stays empty
  int num_refused_ = 0;
  std::string last_refusal_;
};

// The port is taken. If another rank 0 of this job has it, it answers our greeting and both learn of the mistake; this
// throws its answer. Otherwise it returns.
void ask_who_listens(const TcpRendezvous& where) {
  TcpRendezvous question = where;
  question.timeout = std::min<std::chrono::milliseconds>(where.timeout, 200ms);
  try {
    (void)join_rank_0(question);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) throw;
  }
}

Socket open_listener(const TcpRendezvous& where) {
  std::string failure;
  const std::vector<Address> addresses = resolve(where.address, where.port, Deadline(where.timeout), failure);
  if (addresses.empty()) throw Error(ErrorCode::kInvalidArgument, "address: " + failure);
  const Deadline patience(std::min<std::chrono::milliseconds>(where.timeout, kBindPatience));
  for (;;) {
    bool is_taken = false;
    for (const Address& address : addresses) {
      Opened opened = listen_on(address);
      if (opened.socket.is_open()) return std::move(opened.socket);
      failure = opened.failure() + " at " + to_string(address);
      is_taken = is_taken || opened.error == EADDRINUSE;
    }
    if (!is_taken) throw Error(ErrorCode::kSystem, failure);
    ask_who_listens(where);
    if (patience.passed())
      throw Error(ErrorCode::kSystem, failure + "; another program listens there, choose another port");
    std::this_thread::sleep_for(kBindPause);
  }
}

}  // namespace

std::vector<std::unique_ptr<Connection>> receive_ranks(const TcpRendezvous& where) {
  return Reception(where, open_listener(where)).run();
}

}  // namespace deep_ep::bootstrap
