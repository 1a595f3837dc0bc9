// SPDX-License-Identifier: MIT
#include "cuda/share.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "deep_ep/error.h"

namespace deep_ep::cuda {

namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void throw_system(const std::string& call) {
  throw Error(ErrorCode::kSystem, fmt::format("{}: {}", call, std::strerror(errno)));
}

socklen_t abstract_name(const std::string& text, sockaddr_un& name) {
  name = {};
  name.sun_family = AF_UNIX;
  text.copy(name.sun_path + 1, sizeof name.sun_path - 1);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

// A piece, with its descriptor as ancillary data.
struct Parcel {
  Piece piece;
  iovec data{&piece, sizeof piece};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  Parcel() {
    message.msg_iov = &data;
    message.msg_iovlen = 1;
  }
  void attach(int fd) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
};

bool send_piece(int socket, Piece piece, int memory) {
  Parcel parcel;
  parcel.piece = piece;
  if (memory >= 0) parcel.attach(memory);
  return sendmsg(socket, &parcel.message, MSG_NOSIGNAL) == sizeof piece;
}

// False where the other end is gone. `memory` is -1 for a piece without bytes.
bool receive_piece(int socket, Piece& piece, int& memory) {
  Parcel parcel;
  parcel.message.msg_control = parcel.control;
  parcel.message.msg_controllen = sizeof parcel.control;
  if (recvmsg(socket, &parcel.message, MSG_CMSG_CLOEXEC) != sizeof piece) return false;
  piece = parcel.piece;
  memory = -1;
  const cmsghdr* header = CMSG_FIRSTHDR(&parcel.message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) std::memcpy(&memory, CMSG_DATA(header), sizeof memory);
  return true;
}

void set_timeout(int socket, std::chrono::milliseconds timeout) {
  const timeval limit{timeout.count() / 1000, timeout.count() % 1000 * 1000};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

bool readable_before(int socket, Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
  pollfd watched{socket, POLLIN, 0};
  return poll(&watched, 1, static_cast<int>(std::max<std::int64_t>(left.count(), 0))) == 1;
}

void close_all(std::initializer_list<int*> fds) {
  for (int* fd : fds)
    if (*fd >= 0) close(std::exchange(*fd, -1));
}

}  // namespace

// The owner
// ---------------------------------------------------------------------------------------------------------------------

Door::Door(const std::string& name, Piece first, int memory) : first_(first), memory_(memory) {
  try {
    // Packets: a piece arrives whole, and so does the news that there is none any more.
    listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (listener_ < 0) throw_system("socket");
    sockaddr_un address;
    const socklen_t length = abstract_name(name, address);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), length) != 0) throw_system("bind of a window's socket");
    if (listen(listener_, 128) != 0) throw_system("listen on a window's socket");
    bell_ = eventfd(0, EFD_CLOEXEC);
    if (bell_ < 0) throw_system("eventfd");
    thread_ = std::thread([this] { serve(); });
  } catch (...) {
    close_all({&memory_, &listener_, &bell_});
    throw;
  }
}

Door::~Door() {
  seal();
  for (auto& [rank, guest] : guests_) {
    send_piece(guest, {}, -1);
    close(guest);
  }
}

void Door::seal() {
  if (!thread_.joinable()) return;
  const std::uint64_t ring = 1;
  (void)!write(bell_, &ring, sizeof ring);
  thread_.join();
  close_all({&memory_, &listener_, &bell_});
}

void Door::serve() {
  for (;;) {
    pollfd watched[] = {{listener_, POLLIN, 0}, {bell_, POLLIN, 0}};
    if (poll(watched, 2, -1) < 0 && errno != EINTR) return;
    if (watched[1].revents != 0) return;
    if (watched[0].revents == 0) continue;
    const int guest = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (guest >= 0) welcome(guest);
  }
}

void Door::welcome(int guest) {
  ucred who{};
  socklen_t length = sizeof who;
  set_timeout(guest, std::chrono::seconds(1));
  int rank = -1;
  const bool ours = getsockopt(guest, SOL_SOCKET, SO_PEERCRED, &who, &length) == 0 && who.uid == geteuid();
  // A guest that went away reports it itself.
  if (!ours || recv(guest, &rank, sizeof rank, 0) != sizeof rank || !send_piece(guest, first_, memory_)) {
    close(guest);
    return;
  }
  std::lock_guard lock(mutex_);
  if (const auto old = guests_.find(rank); old != guests_.end()) close(old->second);
  guests_[rank] = guest;
}

std::vector<int> Door::give(Piece piece, int memory, const std::vector<int>& skip, std::chrono::milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  std::vector<int> silent;
  std::lock_guard lock(mutex_);
  std::erase_if(guests_, [&](const auto& guest) {
    const bool there = send_piece(guest.second, piece, memory);
    if (!there) close(guest.second);
    return !there;
  });
  close(memory);
  for (auto& [rank, guest] : guests_) {
    if (std::find(skip.begin(), skip.end(), rank) != skip.end()) continue;
    // Answers come in the order of pieces; one to a piece that we once did not wait for is as old as its number says.
    std::uint64_t answered = 0;
    bool ended = false;
    while (answered < piece.at && !ended && readable_before(guest, deadline))
      ended = recv(guest, &answered, sizeof answered, 0) != sizeof answered;
    if (answered < piece.at && !ended) silent.push_back(rank);
  }
  return silent;
}

// A peer
// ---------------------------------------------------------------------------------------------------------------------

Subscription::Subscription(const std::string& name, int rank, std::chrono::milliseconds timeout, Map map)
    : map_(std::move(map)) {
  try {
    socket_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (socket_ < 0) throw_system("socket");
    sockaddr_un address;
    const socklen_t length = abstract_name(name, address);
    if (connect(socket_, reinterpret_cast<sockaddr*>(&address), length) != 0) throw_system("connect");
    set_timeout(socket_, timeout);
    if (send(socket_, &rank, sizeof rank, MSG_NOSIGNAL) != sizeof rank) throw_system("send");
    Piece first;
    int memory = -1;
    if (!receive_piece(socket_, first, memory) || memory < 0) throw_system("recvmsg of a peer's window");
    map_(first, memory);
    set_timeout(socket_, std::chrono::milliseconds(0));  // none
    thread_ = std::thread([this] { listen(); });
  } catch (...) {
    close_all({&socket_});
    throw;
  }
}

Subscription::~Subscription() {
  shutdown(socket_, SHUT_RDWR);
  thread_.join();
  close(socket_);
}

void Subscription::listen() {
  Piece piece;
  int memory = -1;
  while (receive_piece(socket_, piece, memory)) {
    if (piece.bytes == 0) return;
    try {
      map_(piece, memory);
    } catch (const std::exception&) {
      return;  // the owner hears no answer, and its call fails
    }
    (void)!send(socket_, &piece.at, sizeof piece.at, MSG_NOSIGNAL);
  }
  gone_.store(true, std::memory_order_release);
}

}  // namespace deep_ep::cuda
