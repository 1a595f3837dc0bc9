// SPDX-License-Identifier: MIT
// What the machine itself can do, with the same processes at the same time: copies into another process's memory, the
// same reads and writes without any protocol, quantising alone, and one round of signals.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bench/shared_memory.h"
#include "bench/workload.h"
#include "host/rows.h"

namespace deep_ep::bench {

/// How one rank copies: `rows` rows of `row_bytes`, one after the other.
struct CopyShape {
  std::int64_t rows = 0;
  std::int64_t row_bytes = 0;
  std::int64_t bytes() const { return rows * row_bytes; }
};

enum class CopyBy { kMemcpyRows, kMemcpyWhole, kStreamingStores };
inline constexpr CopyBy kAllCopies[] = {CopyBy::kMemcpyRows, CopyBy::kMemcpyWhole, CopyBy::kStreamingStores};

inline const char* name(CopyBy by) {
  switch (by) {
    case CopyBy::kMemcpyRows: return "memcpy, row by row";
    case CopyBy::kMemcpyWhole: return "memcpy, one call";
    case CopyBy::kStreamingStores: return "streaming stores, row by row";
  }
  return "";
}

/// One rank's part in the limits. Its target is memory of the next rank, mapped by both, every page touched.
class Limits {
 public:
  Limits(const Workload& work, int rank, const std::vector<SharedFile>& files, std::size_t bytes)
      : work_(work), rank_(rank), bytes_(bytes), source_(map_private(bytes)), scratch_(work.fp8_row_bytes() + 64) {
    for (const SharedFile& file : files) windows_.push_back(file.map());
    std::memset(windows_[next()].get(), 0, bytes);
    for (const Mapping& window : windows_) touch(window.get(), bytes);
  }

  void copy(const CopyShape& shape, CopyBy by) {
    std::byte* to = windows_[next()].get();
    const std::byte* from = source_.get();
    const std::size_t row_bytes = static_cast<std::size_t>(shape.row_bytes);
    switch (by) {
      case CopyBy::kMemcpyWhole: std::memcpy(to, from, static_cast<std::size_t>(shape.bytes())); return;
      case CopyBy::kMemcpyRows:
        for (std::int64_t row = 0; row < shape.rows; ++row)
          std::memcpy(to + row * shape.row_bytes, from + row * shape.row_bytes, row_bytes);
        return;
      case CopyBy::kStreamingStores:
        for (std::int64_t row = 0; row < shape.rows; ++row)
          ops_.copy(to + row * shape.row_bytes, from + row * shape.row_bytes, row_bytes);
        ops_.flush();
        return;
    }
  }

  /// What dispatch must do and nothing else: each row of x read once and written to each of its ranks, at a place known
  /// beforehand.
  void bare_dispatch(const Traffic& traffic, const std::vector<std::uint32_t>& ranks_of_token, bool fp8) {
    std::vector<std::byte*> to;
    for (int dst = 0; dst < work_.num_ranks; ++dst) {
      std::int64_t first = 0;
      for (int src = 0; src < rank_; ++src) first += traffic.rows[src][dst];
      to.push_back(windows_[dst].get() + first * wire_bytes(fp8));
    }
    for (std::size_t token = 0; token < ranks_of_token.size(); ++token) {
      const std::byte* row = source_.get() + token * static_cast<std::size_t>(work_.row_bytes());
      if (fp8) row = quantize(row);
      for (int dst = 0; dst < work_.num_ranks; ++dst) {
        if ((ranks_of_token[token] >> dst & 1u) == 0) continue;
        ops_.copy(to[dst], row, static_cast<std::size_t>(wire_bytes(fp8)));
        to[dst] += wire_bytes(fp8);
      }
    }
    ops_.flush();
  }

  /// What low-latency dispatch must do and nothing else: each row of x read once and written at each of its experts;
  /// scales lie apart, as there, in the half of the window that rows of FP8 leave free.
  void bare_ll_dispatch(const std::vector<PlaceOfSelection>& places, bool fp8) {
    const std::size_t topk = static_cast<std::size_t>(work_.num_topk);
    std::vector<std::uint8_t*> to(topk);
    for (std::size_t token = 0; token < places.size() / topk; ++token) {
      const std::byte* row = source_.get() + token * static_cast<std::size_t>(work_.row_bytes());
      for (std::size_t k = 0; k < topk; ++k) {
        const PlaceOfSelection& place = places[token * topk + k];
        to[k] = reinterpret_cast<std::uint8_t*>(windows_[place.rank].get() +
                                                place.row * (fp8 ? work_.hidden : work_.row_bytes()));
      }
      if (!fp8) {
        ops_.copy_to_all(reinterpret_cast<std::byte* const*>(to.data()), work_.num_topk, row,
                         static_cast<std::size_t>(work_.row_bytes()));
        continue;
      }
      quantize(row, to);
      const std::size_t scales_bytes = static_cast<std::size_t>(work_.num_scales()) * sizeof(float);
      for (std::size_t k = 0; k < topk; ++k) {
        const PlaceOfSelection& place = places[token * topk + k];
        std::memcpy(windows_[place.rank].get() + bytes_ / 2 + static_cast<std::size_t>(place.row) * scales_bytes,
                    scratch_.data() + work_.hidden, scales_bytes);
      }
    }
    ops_.flush();
  }

  /// What combine must do and nothing else: the rows of a token read where they are, summed in FP32, written once.
  void bare_combine(const Traffic& traffic, const std::vector<std::uint32_t>& ranks_of_token) {
    std::vector<const std::byte*> from;
    for (int dst = 0; dst < work_.num_ranks; ++dst) {
      std::int64_t first = 0;
      for (int src = 0; src < rank_; ++src) first += traffic.rows[src][dst];
      from.push_back(windows_[dst].get() + first * work_.row_bytes());
    }
    std::vector<const void*> rows(static_cast<std::size_t>(work_.num_ranks));
    for (std::size_t token = 0; token < ranks_of_token.size(); ++token) {
      int count = 0;
      for (int dst = 0; dst < work_.num_ranks; ++dst) {
        if ((ranks_of_token[token] >> dst & 1u) == 0) continue;
        rows[count++] = from[dst];
        from[dst] += work_.row_bytes();
      }
      std::byte* to = source_.get() + token * static_cast<std::size_t>(work_.row_bytes());
      ops_.sum({rows.data(), nullptr, count, DType::kBf16, work_.hidden, to, true});
    }
    ops_.flush();
  }

  /// Reads every token and quantises it into the same small buffer.
  void quantize_only(int num_tokens) {
    for (int token = 0; token < num_tokens; ++token) quantize(source_.get() + token * work_.row_bytes());
  }

 private:
  int next() const { return (rank_ + 1) % work_.num_ranks; }
  std::int64_t wire_bytes(bool fp8) const { return fp8 ? work_.fp8_row_bytes() : work_.row_bytes(); }

  const std::byte* quantize(const std::byte* row, const std::vector<std::uint8_t*>& copies = {}) {
    std::uint8_t* codes = scratch_.data();
    ops_.quantize({row, DType::kBf16, work_.hidden, codes, codes + work_.hidden, 1, plan::Fp8Scale::kExact,
                   copies.data(), static_cast<int>(copies.size())});
    return reinterpret_cast<const std::byte*>(codes);
  }

  static void touch(const std::byte* memory, std::size_t bytes) {
    std::uint64_t sum = 0;
    for (std::size_t at = 0; at < bytes; at += 4096)
      sum += static_cast<std::uint64_t>(*const_cast<const volatile std::byte*>(memory + at));
    touched_ += sum;
  }

  const Workload& work_;
  const host::RowOps& ops_ = host::row_ops();
  int rank_;
  std::size_t bytes_;  // of each window
  Mapping source_;
  std::vector<Mapping> windows_;
  std::vector<std::uint8_t> scratch_;
  static inline std::uint64_t touched_ = 0;
};

/// Every rank tells every other and waits until all have told it.
inline void signal_round(Board& board, int rank, int num_ranks, std::uint64_t epoch) {
  // Release and acquire, as flags over data would need.
  for (int peer = 0; peer < num_ranks; ++peer) board.ranks[peer].signals[rank].store(epoch, std::memory_order_release);
  for (int peer = 0; peer < num_ranks; ++peer) {
    for (int spin = 0; board.ranks[rank].signals[peer].load(std::memory_order_acquire) < epoch; ++spin) {
      if (board.failed.load(std::memory_order_relaxed) != 0) throw std::runtime_error("another rank failed");
      if (spin >= 64) sched_yield();
    }
  }
}

/// For each token a bit for each rank that it goes to. Up to 32 ranks.
inline std::vector<std::uint32_t> ranks_of_tokens(const Workload& work, const Routing& routing) {
  std::vector<std::uint32_t> ranks(routing.topk_idx.size() / static_cast<std::size_t>(work.num_topk), 0);
  for (std::size_t i = 0; i < routing.topk_idx.size(); ++i)
    ranks[i / static_cast<std::size_t>(work.num_topk)] |= 1u << work.rank_of(routing.topk_idx[i]);
  return ranks;
}

}  // namespace deep_ep::bench
