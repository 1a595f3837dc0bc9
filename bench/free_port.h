// SPDX-License-Identifier: MIT
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace deep_ep::bench {

/// A port that nobody listens on now.
inline int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in where = {};
  where.sin_family = AF_INET;
  where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(where);
  const bool found = fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&where), size) == 0 &&
                     getsockname(fd, reinterpret_cast<sockaddr*>(&where), &size) == 0;
  if (fd >= 0) close(fd);
  if (!found) throw std::system_error(errno, std::generic_category(), "looking for a free port");
  return ntohs(where.sin_port);
}

}  // namespace deep_ep::bench
