// SPDX-License-Identifier: MIT
// fork, waitpid, kill.
#include "processes.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace moe {
namespace {

[[noreturn]] void fail(const char* call) { throw std::system_error(errno, std::generic_category(), call); }

std::string describe_status(int status) {
  if (WIFSIGNALED(status)) return fmt::format("signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
  return fmt::format("exit status {}", WEXITSTATUS(status));
}

/// Never returns: what the parent would do after forking must not happen in a child as well.
[[noreturn]] void be_rank(int rank, pid_t parent, const std::function<int(int)>& body) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);   // a parent that is killed takes its ranks along
  if (getppid() != parent) _exit(1);  // it was killed before the line above
  const int status = body(rank);
  std::fflush(nullptr);
  _exit(status);
}

}  // namespace

Processes::Processes(int count, const std::function<int(int)>& body) : ended_(count, false) {
  const pid_t parent = getpid();
  std::fflush(nullptr);  // or every child would print what is still buffered
  for (int rank = 0; rank < count; ++rank) {
    const pid_t child = fork();
    if (child == 0) be_rank(rank, parent, body);
    if (child < 0) {
      const int code = errno;
      kill_all();
      errno = code;
      fail("fork");
    }
    started_.push_back(child);
  }
}

Processes::~Processes() { kill_all(); }

std::optional<Processes::End> Processes::next_end() {
  for (std::size_t rank = 0; rank < started_.size(); ++rank) {
    int status = 0;
    if (ended_[rank] || waitpid(started_[rank], &status, WNOHANG) != started_[rank]) continue;
    ended_[rank] = true;
    return End{static_cast<int>(rank), WIFEXITED(status) && WEXITSTATUS(status) == 0, describe_status(status)};
  }
  return std::nullopt;
}

int Processes::running() const {
  return static_cast<int>(started_.size()) - static_cast<int>(std::count(ended_.begin(), ended_.end(), true));
}

void Processes::kill_all() {
  for (std::size_t rank = 0; rank < started_.size(); ++rank) {
    if (ended_[rank]) continue;
    kill(started_[rank], SIGKILL);
    waitpid(started_[rank], nullptr, 0);
    ended_[rank] = true;
  }
}

int free_port() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener < 0) fail("socket");
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  const bool known = bind(listener, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
                     getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  const int code = errno;
  close(listener);
  errno = code;
  if (!known) fail("bind");
  return ntohs(address.sin_port);
}

}  // namespace moe
