// SPDX-License-Identifier: MIT
// Uses the installed headers and library: two ranks meet, in one process.
#include <deep_ep/bootstrap.h>
#include <deep_ep/error.h>
#include <deep_ep/version.h>

#include <chrono>
#include <cstdio>
#include <thread>

int main() {
  const auto group = deep_ep::in_process_group(2);
  const auto meet = [&](int rank) {
    const deep_ep::Bootstrap::Blob mine(1, static_cast<std::byte>(rank + 1));
    return group[rank]->all_gather(mine, std::chrono::seconds(30));
  };
  std::thread other([&] { meet(1); });
  const auto blobs = meet(0);
  other.join();
  const bool right = blobs.size() == 2 && blobs[0].at(0) == std::byte{1} && blobs[1].at(0) == std::byte{2};
  std::printf("deep_ep %s: two ranks %s\n", DEEP_EP_VERSION, right ? "met" : "got wrong blobs");
  return right ? 0 : 1;
}
