// SPDX-License-Identifier: MIT
// Frames in and out of one socket without ever blocking: what is half sent or half received stays where it is, so that
// a call that ends at its deadline leaves the stream in order for the next call.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "bootstrap/deadline.h"
#include "bootstrap/socket.h"
#include "bootstrap/wire.h"

namespace deep_ep::bootstrap {

class Connection {
 public:
  Connection(Socket socket, std::size_t max_payload_bytes)
      : socket_(std::move(socket)), max_payload_bytes_(max_payload_bytes) {}

  /// Puts a frame behind those not yet sent, and sends what the socket takes now. Several connections may share one
  /// frame.
  void send(std::shared_ptr<const Bytes> frame);
  void send(Bytes frame) { send(std::make_shared<const Bytes>(std::move(frame))); }
  void flush();
  bool has_output() const { return !output_.empty(); }

  /// Takes what has arrived.
  void receive();
  /// The oldest frame that nobody has taken, or null.
  const Frame* peek() const { return inbox_.empty() ? nullptr : &inbox_.front(); }
  Frame take();

  /// True once nothing more can come: the peer has closed, the connection broke, or the peer broke the protocol. Frames
  /// that came before may still wait in the inbox.
  bool has_ended() const { return has_ended_; }
  const std::string& end_reason() const { return end_reason_; }

  void set_max_payload_bytes(std::size_t bytes) { max_payload_bytes_ = bytes; }
  int fd() const { return socket_.fd(); }
  /// What to poll for; 0 if there is nothing to wait for.
  short events() const;

 private:
  struct Output {
    std::shared_ptr<const Bytes> frame;
    std::size_t num_sent = 0;
  };

  void end(std::string reason);
  std::span<std::byte> next_space();
  void accept_bytes(std::size_t num_bytes);
  void finish_frame();

  Socket socket_;
  std::size_t max_payload_bytes_;
  std::deque<Output> output_;
  std::deque<Frame> inbox_;
  std::array<std::byte, kHeaderBytes> header_bytes_{};
  std::size_t num_header_bytes_ = 0;
  std::optional<FrameHeader> header_;  // of the frame whose payload is arriving
  Bytes payload_;                      // its first num_payload_bytes_ have arrived
  std::size_t num_payload_bytes_ = 0;
  bool has_ended_ = false;
  std::string end_reason_;
};

/// Waits until one of the connections can go on (null entries are passed over), something arrives at `listener` (if not
/// null), or `most` has passed; then sends and receives what is possible. Throws kSystem if poll() itself fails.
void exchange(std::span<Connection* const> connections, const Socket* listener, std::chrono::milliseconds most);

}  // namespace deep_ep::bootstrap
