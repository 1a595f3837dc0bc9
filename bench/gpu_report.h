// SPDX-License-Identifier: MIT
// The report of a GPU benchmark: who measured where, and one entry per run. The file is whole after every entry, so
// that a program that is stopped leaves what it has measured.
#pragma once

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>

#include "bench/gpu_ranks.h"

namespace deep_ep::bench {

class GpuReport {
 public:
  /// An empty `file`: to standard output, at the end.
  GpuReport(const GpuRank& self, const char* program, const std::string& commit, std::string file)
      : rank_(self.rank()), file_(std::move(file)) {
    cudaDeviceProp info = {};
    gpu(cudaGetDeviceProperties(&info, self.device()));
    report_ = {{"program", program},
               {"gpu", info.name},
               {"gpus", std::min(self.num_gpus(), self.num_ranks())},
               {"ranks", self.num_ranks()},
               {"ranks_are", self.processes() ? "processes" : "threads"},
               {"commit", commit},
               {"runs", nlohmann::json::array()}};
  }
  nlohmann::json& operator[](const char* field) { return report_[field]; }

  void add(nlohmann::json run) {
    report_["runs"].push_back(std::move(run));
    write();
  }
  void write() const {
    if (rank_ != 0 || file_.empty()) return;
    const std::string next = file_ + ".next";
    std::ofstream(next) << report_.dump(1) << '\n';
    if (std::rename(next.c_str(), file_.c_str()) != 0) throw std::runtime_error("cannot write " + file_);
  }
  void finish() const {
    write();
    if (rank_ == 0 && file_.empty()) std::printf("%s\n", report_.dump(1).c_str());
  }

 private:
  int rank_;
  std::string file_;
  nlohmann::json report_;
};

}  // namespace deep_ep::bench
