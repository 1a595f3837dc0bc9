// SPDX-License-Identifier: MIT
// TCP sockets that close themselves and never block.
#include "bootstrap/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <system_error>
#include <thread>

#include "deep_ep/error.h"

namespace deep_ep::bootstrap {
namespace {

const sockaddr* as_sockaddr(const Address& address) { return reinterpret_cast<const sockaddr*>(&address.storage); }
sockaddr* as_sockaddr(Address& address) { return reinterpret_cast<sockaddr*>(&address.storage); }

void set_flag(const Socket& socket, int level, int option) {
  const int on = 1;
  // Both options that are set here are improvements; a refusal harms nothing.
  (void)setsockopt(socket.fd(), level, option, &on, sizeof(on));
}

Opened new_socket(const Address& address) {
  Opened opened;
  opened.socket = Socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!opened.socket.is_open()) return {Socket(), "socket", errno};
  return opened;
}

// A connect() to a local port of the ephemeral range where nobody listens may choose that very port as its source and
// so meet itself. Such a connection would also keep rank 0 from listening there.
bool is_connected_to_itself(const Socket& socket) {
  Address here, there;
  here.size = there.size = sizeof(sockaddr_storage);
  if (getsockname(socket.fd(), as_sockaddr(here), &here.size) != 0) return false;
  if (getpeername(socket.fd(), as_sockaddr(there), &there.size) != 0) return false;
  return here.size == there.size && std::memcmp(&here.storage, &there.storage, here.size) == 0;
}

int wait_until_connected(const Socket& socket, const Deadline& deadline) {
  for (;;) {
    pollfd entry{socket.fd(), POLLOUT, 0};
    const int ready = poll(&entry, 1, static_cast<int>(deadline.left().count()));
    if (ready > 0) break;
    if (ready < 0 && errno != EINTR) return errno;
    if (deadline.passed()) return ETIMEDOUT;
  }
  int error = 0;
  socklen_t size = sizeof(error);
  if (getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
  return error;
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

std::string describe_errno(int error) {
  return std::generic_category().message(error) + " (" + std::to_string(error) + ")";
}

std::string Opened::failure() const { return call + ": " + describe_errno(error); }

namespace {

struct Resolved {
  std::vector<Address> addresses;
  std::string failure;
};

Resolved look_up(const std::string& address, int port, int flags, decltype(&getaddrinfo) lookup) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | flags;
  addrinfo* found = nullptr;
  const int error = lookup(address.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (error != 0)
    return {{},
            "getaddrinfo '" + address + "': " + (error == EAI_SYSTEM ? describe_errno(errno) : gai_strerror(error))};
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  Resolved resolved;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    Address one;
    one.size = entry->ai_addrlen;
    std::memcpy(&one.storage, entry->ai_addr, entry->ai_addrlen);
    resolved.addresses.push_back(one);
  }
  return resolved;
}

}  // namespace

std::vector<Address> resolve(const std::string& address, int port, const Deadline& deadline, std::string& failure,
                             decltype(&getaddrinfo) lookup) {
  // A number needs no server, and no thread.
  if (auto number = look_up(address, port, AI_NUMERICHOST, &getaddrinfo); number.failure.empty())
    return number.addresses;
  auto promise = std::make_shared<std::promise<Resolved>>();
  std::future<Resolved> answer = promise->get_future();
  std::thread([promise, address, port, lookup] { promise->set_value(look_up(address, port, 0, lookup)); }).detach();
  if (answer.wait_until(deadline.at()) != std::future_status::ready) {
    failure = "getaddrinfo '" + address + "': the name server did not answer in time";
    return {};
  }
  Resolved resolved = answer.get();
  if (!resolved.failure.empty()) failure = resolved.failure;
  return resolved.addresses;
}

std::string join_address(const std::string& address, int port) {
  const bool is_ipv6 = address.find(':') != std::string::npos;
  return (is_ipv6 ? "[" + address + "]" : address) + ":" + std::to_string(port);
}

std::string to_string(const Address& address) {
  char host[NI_MAXHOST] = "";
  char service[NI_MAXSERV] = "";
  if (getnameinfo(as_sockaddr(address), address.size, host, sizeof(host), service, sizeof(service),
                  NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "an unknown address";
  }
  return join_address(host, std::atoi(service));
}

Opened listen_on(const Address& address) {
  Opened opened = new_socket(address);
  if (!opened.socket.is_open()) return opened;
  // So that the port can be used again while connections of an earlier group wait out their last minute.
  set_flag(opened.socket, SOL_SOCKET, SO_REUSEADDR);
  if (bind(opened.socket.fd(), as_sockaddr(address), address.size) != 0) return {Socket(), "bind", errno};
  if (listen(opened.socket.fd(), SOMAXCONN) != 0) return {Socket(), "listen", errno};
  return opened;
}

Opened connect_to(const Address& address, const Deadline& deadline) {
  Opened opened = new_socket(address);
  if (!opened.socket.is_open()) return opened;
  set_flag(opened.socket, IPPROTO_TCP, TCP_NODELAY);
  int error = connect(opened.socket.fd(), as_sockaddr(address), address.size) == 0 ? 0 : errno;
  if (error == EINPROGRESS || error == EINTR) error = wait_until_connected(opened.socket, deadline);
  if (error == 0 && is_connected_to_itself(opened.socket)) error = ECONNREFUSED;
  if (error != 0) return {Socket(), "connect", error};
  return opened;
}

Socket accept_from(const Socket& listener, std::string& from) {
  for (;;) {
    Address address;
    address.size = sizeof(address.storage);
    Socket socket(accept4(listener.fd(), as_sockaddr(address), &address.size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.is_open()) {
      set_flag(socket, IPPROTO_TCP, TCP_NODELAY);
      from = to_string(address);
      return socket;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return Socket();
    // These are faults of our own process or machine. Anything else (ECONNABORTED, EPROTO, network errors) belongs to
    // the connection that was lost before we took it: look at the next one.
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM || errno == EBADF ||
        errno == EINVAL) {
      throw Error(ErrorCode::kSystem, "accept: " + describe_errno(errno));
    }
  }
}

}  // namespace deep_ep::bootstrap
