// SPDX-License-Identifier: MIT
// TCP sockets that close themselves and never block: listen, accept, connect before a deadline.
#pragma once

#include <netdb.h>
#include <sys/socket.h>

#include <string>
#include <utility>
#include <vector>

#include "bootstrap/deadline.h"

namespace deep_ep::bootstrap {

/// Owns one descriptor. All sockets made here are non-blocking and close-on-exec.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();

  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
};

/// A socket, or the call that failed and its errno.
struct Opened {
  Socket socket;
  std::string call;
  int error = 0;

  std::string failure() const;  // "connect: Connection refused (111)"
};

/// Numeric IPv4 and IPv6 addresses and names. Empty, with `failure` set, if the name is not known, or not by the
/// deadline: a name server may take its own time to answer, so `lookup` then goes on in a thread of its own, unheard.
std::vector<Address> resolve(const std::string& address, int port, const Deadline& deadline, std::string& failure,
                             decltype(&getaddrinfo) lookup = &getaddrinfo);

/// "127.0.0.1:29400" or "[::1]:29400".
std::string to_string(const Address& address);
std::string join_address(const std::string& address, int port);

Opened listen_on(const Address& address);
Opened connect_to(const Address& address, const Deadline& deadline);

/// The next connection and where it comes from; a closed socket if none is waiting. Throws kSystem if the machine
/// refuses, as for lack of descriptors.
Socket accept_from(const Socket& listener, std::string& from);

/// "Connection refused (111)".
std::string describe_errno(int error);

}  // namespace deep_ep::bootstrap
