// SPDX-License-Identifier: MIT
// Frames in and out of one socket without ever blocking.
#include "bootstrap/connection.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "deep_ep/error.h"

namespace deep_ep::bootstrap {
namespace {

// Memory grows with what has really arrived, not with what a header promises.
constexpr std::size_t kChunkBytes = std::size_t{256} << 10;
// One connection's share of a turn, so that a fast talker does not starve the others.
constexpr std::size_t kChunksPerTurn = 16;
// A peer is at most one round ahead plus what it gave up; with more than this unread it can wait.
constexpr std::size_t kMaxInbox = 8;

}  // namespace

void Connection::send(std::shared_ptr<const Bytes> frame) {
  output_.push_back({std::move(frame)});
  flush();
  // A peer that broke the protocol may still be told so, but nobody will wait for it.
  if (has_ended_) output_.clear();
}

void Connection::flush() {
  while (!output_.empty()) {
    Output& first = output_.front();
    const std::size_t rest = first.frame->size() - first.num_sent;
    const ssize_t sent = ::send(socket_.fd(), first.frame->data() + first.num_sent, rest, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      // A peer that has gone may have said why before: only receive() decides that the connection has ended.
      if (errno != EAGAIN && errno != EWOULDBLOCK) output_.clear();
      return;
    }
    first.num_sent += static_cast<std::size_t>(sent);
    if (first.num_sent == first.frame->size()) output_.pop_front();
  }
}

void Connection::receive() {
  for (std::size_t turn = 0; turn < kChunksPerTurn && !has_ended_ && inbox_.size() < kMaxInbox; ++turn) {
    const std::span<std::byte> space = next_space();
    const ssize_t got = ::recv(socket_.fd(), space.data(), space.size(), MSG_DONTWAIT);
    if (got > 0) {
      accept_bytes(static_cast<std::size_t>(got));
    } else if (got == 0) {
      end("it closed the connection");
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return;
    } else if (errno != EINTR) {
      end("recv: " + describe_errno(errno));
    }
  }
}

Frame Connection::take() {
  Frame frame = std::move(inbox_.front());
  inbox_.pop_front();
  return frame;
}

short Connection::events() const {
  if (has_ended_) return 0;
  return static_cast<short>((inbox_.size() < kMaxInbox ? POLLIN : 0) | (output_.empty() ? 0 : POLLOUT));
}

void Connection::end(std::string reason) {
  has_ended_ = true;
  end_reason_ = std::move(reason);
  output_.clear();
}

std::span<std::byte> Connection::next_space() {
  if (!header_) return std::span(header_bytes_).subspan(num_header_bytes_);
  const std::size_t rest = header_->payload_bytes - num_payload_bytes_;
  payload_.resize(num_payload_bytes_ + std::min(rest, kChunkBytes));
  return std::span(payload_).subspan(num_payload_bytes_);
}

void Connection::accept_bytes(std::size_t num_bytes) {
  if (header_) {
    num_payload_bytes_ += num_bytes;
  } else {
    num_header_bytes_ += num_bytes;
    if (num_header_bytes_ < kHeaderBytes) return;
    std::string reason;
    header_ = decode_header(header_bytes_, max_payload_bytes_, reason);
    if (!header_) return end(std::move(reason));
  }
  if (num_payload_bytes_ == header_->payload_bytes) finish_frame();
}

void Connection::finish_frame() {
  payload_.resize(num_payload_bytes_);
  inbox_.push_back({header_->kind, header_->round, std::move(payload_)});
  payload_ = {};
  num_payload_bytes_ = 0;
  num_header_bytes_ = 0;
  header_.reset();
}

void exchange(std::span<Connection* const> connections, const Socket* listener, std::chrono::milliseconds most) {
  std::vector<pollfd> entries;
  std::vector<Connection*> watched;
  for (Connection* connection : connections) {
    if (connection == nullptr || connection->events() == 0) continue;
    entries.push_back({connection->fd(), connection->events(), 0});
    watched.push_back(connection);
  }
  if (listener != nullptr) entries.push_back({listener->fd(), POLLIN, 0});
  if (poll(entries.data(), entries.size(), static_cast<int>(most.count())) < 0) {
    if (errno == EINTR) return;
    throw Error(ErrorCode::kSystem, "poll: " + describe_errno(errno));
  }
  for (std::size_t i = 0; i < watched.size(); ++i) {
    if (entries[i].revents == 0) continue;
    watched[i]->flush();
    watched[i]->receive();
  }
}

}  // namespace deep_ep::bootstrap
