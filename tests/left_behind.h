// SPDX-License-Identifier: MIT
// What ranks have left behind in the file system.
#pragma once

#include <chrono>
#include <filesystem>
#include <set>
#include <string>
#include <thread>

namespace deep_ep::test {

inline std::set<std::string> names_in(const char* folder) {
  std::set<std::string> names;
  std::error_code ignored;  // a folder that is not there holds nothing
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) names.insert(entry.path().filename());
  return names;
}

inline std::set<std::string> shared_memory_files() { return names_in("/dev/shm"); }

/// Files that shared memory has had since `before` and keeps. Those of other programs come and go (libfabric's, say, in
/// a test beside this one), so a file counts only if it outlives the patience.
inline std::set<std::string> left_in_shared_memory(const std::set<std::string>& before,
                                                   std::chrono::seconds patience = std::chrono::seconds(30)) {
  std::set<std::string> left = shared_memory_files();
  for (const std::string& name : before) left.erase(name);
  for (const auto deadline = std::chrono::steady_clock::now() + patience;
       !left.empty() && std::chrono::steady_clock::now() < deadline;
       std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
    const std::set<std::string> now = shared_memory_files();
    std::erase_if(left, [&](const std::string& name) { return !now.contains(name); });
  }
  return left;
}

}  // namespace deep_ep::test
