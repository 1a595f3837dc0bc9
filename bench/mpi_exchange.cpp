// SPDX-License-Identifier: MIT
// The same exchange as host_exchange makes, written with MPI_Alltoallv: what a user without this library would write,
// and carefully so. Rows go once to each rank; they are packed by destination, and arrive at their final place, in
// order (source rank, source token), without unpacking. Row arithmetic is the library's own, so that only the exchange
// differs. Run it under mpirun.
#include <fmt/core.h>
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/digest.h"
#include "bench/measure.h"
#include "bench/shared_memory.h"
#include "bench/workload.h"
#include "host/rows.h"

namespace deep_ep::bench {
namespace {

// Counts and places of an Alltoallv, in rows.
struct Extent {
  std::vector<int> counts;
  std::vector<int> first;
  int total = 0;

  explicit Extent(int num_ranks) : counts(num_ranks, 0), first(num_ranks, 0) {}
  void place() {
    total = 0;
    for (std::size_t rank = 0; rank < counts.size(); ++rank) {
      first[rank] = total;
      total += counts[rank];
    }
  }
};

// An MPI type of so many bytes, so that counts stay small.
class RowType {
 public:
  explicit RowType(std::int64_t bytes) {
    MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &type_);
    MPI_Type_commit(&type_);
  }
  RowType(const RowType&) = delete;
  RowType& operator=(const RowType&) = delete;
  ~RowType() { MPI_Type_free(&type_); }
  operator MPI_Datatype() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

struct Wire {
  bool fp8 = false;
  std::int64_t row_bytes = 0;  // of the rows; their scales travel by themselves
};

// The exchange of one rank, for one number of tokens. All memory is allocated and touched beforehand.
class Exchange {
 public:
  Exchange(const Workload& work, int rank, int num_tokens, bool by_expert)
      : work_(work),
        rank_(rank),
        num_tokens_(num_tokens),
        by_expert_(by_expert),
        routing_(make_routing(work, rank, num_tokens)),
        traffic_(traffic_of(work, num_tokens)),
        x_(static_cast<std::size_t>(num_tokens * work.hidden)),
        result_(x_.size()),
        send_(work.num_ranks),
        receive_(work.num_ranks),
        rows_(work.row_bytes()),
        fp8_rows_(work.hidden),
        scale_rows_(work.num_scales() * 4),
        meta_rows_(work.meta_bytes()) {
    fill_rows(work, rank, num_tokens, x_.data());
    const std::size_t packed = static_cast<std::size_t>(by_expert ? num_tokens * work.num_topk : traffic_.sent(rank));
    const std::size_t most = static_cast<std::size_t>(by_expert ? received_selections() : traffic_.received(rank));
    resize(packed_, packed * static_cast<std::size_t>(work.row_bytes()));
    resize(received_, std::max(most, static_cast<std::size_t>(traffic_.received(rank))) *
                          static_cast<std::size_t>(work.row_bytes()));
    resize(packed_scales_, packed * static_cast<std::size_t>(work.num_scales() * 4));
    resize(received_scales_, most * static_cast<std::size_t>(work.num_scales() * 4));
    resize(packed_meta_, packed * static_cast<std::size_t>(work.meta_bytes()));
    resize(received_meta_, most * static_cast<std::size_t>(work.meta_bytes()));
    resize(topk_idx_, most * static_cast<std::size_t>(work.num_topk));
    resize(topk_weights_, most * static_cast<std::size_t>(work.num_topk));
    if (by_expert) {
      const std::size_t padded =
          static_cast<std::size_t>(work.slots()) * static_cast<std::size_t>(work.num_ranks * num_tokens);
      resize(padded_, padded * static_cast<std::size_t>(work.row_bytes()));
      resize(returned_, static_cast<std::size_t>(num_tokens * work.num_topk * work.row_bytes()));
      resize(outgoing_, static_cast<std::size_t>(received_selections() * work.row_bytes()));
      if (padded_scales_.empty()) resize(padded_scales_, padded * static_cast<std::size_t>(work.num_scales()));
    }
  }

  void dispatch(bool fp8, bool cached) {
    wire_ = {fp8, fp8 ? work_.hidden : work_.row_bytes()};
    if (!cached) route();
    pack(!cached);
    MPI_Alltoallv(packed_.data(), send_.counts.data(), send_.first.data(), fp8 ? fp8_rows_ : rows_, received_.data(),
                  receive_.counts.data(), receive_.first.data(), fp8 ? fp8_rows_ : rows_, MPI_COMM_WORLD);
    if (fp8) exchange(packed_scales_.data(), received_scales_.data(), scale_rows_);
    if (!cached) {
      exchange(packed_meta_.data(), received_meta_.data(), meta_rows_);
      unpack_meta();
    }
    if (by_expert_) place_by_expert();
  }

  // Rows go home as they lie; each token's come back in rank order.
  void combine(const std::byte* rows) {
    MPI_Alltoallv(rows, receive_.counts.data(), receive_.first.data(), rows_, packed_.data(), send_.counts.data(),
                  send_.first.data(), rows_, MPI_COMM_WORLD);
    for (int token = 0; token < num_tokens_; ++token) {
      summands_.clear();
      for (int rank = 0; rank < work_.num_ranks; ++rank) {
        const int at = place_[static_cast<std::size_t>(token * work_.num_ranks + rank)];
        if (at >= 0) summands_.push_back(packed_.data() + (send_.first[rank] + at) * work_.row_bytes());
      }
      sum_into_result(token, nullptr);
    }
    ops_.flush();
  }

  // One row per selection goes home, and is weighted there.
  void combine_by_expert() {
    Extent out(work_.num_ranks), back(work_.num_ranks);
    count_selections(out, back);
    std::size_t at = 0;
    for (const std::size_t row : padded_row_) {
      std::memcpy(outgoing_.data() + at, padded_.data() + row * static_cast<std::size_t>(work_.row_bytes()),
                  static_cast<std::size_t>(work_.row_bytes()));
      at += static_cast<std::size_t>(work_.row_bytes());
    }
    MPI_Alltoallv(outgoing_.data(), out.counts.data(), out.first.data(), rows_, returned_.data(), back.counts.data(),
                  back.first.data(), rows_, MPI_COMM_WORLD);
    std::vector<int> next = back.first;
    for (int token = 0; token < num_tokens_; ++token) weigh(token, next);
    ops_.flush();
  }

  // Fills the rows that a combine by expert sends: the BF16 rows as they were dispatched.
  void prepare_by_expert() { dispatch(false, false); }

  const std::byte* received() const { return received_.data(); }

  std::int64_t digest_received() const {
    Digest digest;
    for (int row = 0; row < receive_.total; ++row) {
      Digest scales;
      const std::int64_t scale_bytes = work_.num_scales() * 4;
      if (wire_.fp8) scales.add(received_scales_.data() + row * scale_bytes, static_cast<std::size_t>(scale_bytes));
      digest.add(received_.data() + row * wire_.row_bytes, static_cast<std::size_t>(wire_.row_bytes),
                 static_cast<std::uint64_t>(scales.value()));
    }
    return digest.value();
  }

  std::int64_t digest_padded() const {
    Digest digest;
    const std::size_t slot_rows = static_cast<std::size_t>(work_.num_ranks * num_tokens_);
    for (const std::size_t row : padded_row_) {
      digest.add(padded_.data() + row * static_cast<std::size_t>(wire_.row_bytes),
                 static_cast<std::size_t>(wire_.row_bytes), row / slot_rows);
    }
    return digest.value();
  }

  std::int64_t digest_result() const {
    Digest digest;
    for (int token = 0; token < num_tokens_; ++token) {
      digest.add(result_.data() + token * work_.hidden, static_cast<std::size_t>(work_.row_bytes()),
                 static_cast<std::uint64_t>(Digest().value()));
    }
    return digest.value();
  }

 private:
  template <class T>
  static void resize(std::vector<T>& memory, std::size_t n) {
    memory.assign(n, T{});
  }

  std::int64_t received_selections() const {
    std::int64_t n = 0;
    for (int rank = 0; rank < work_.num_ranks; ++rank) {
      for (const std::int64_t expert : make_routing(work_, rank, num_tokens_).topk_idx)
        n += work_.rank_of(expert) == rank_;
    }
    return n;
  }

  // Which ranks each token goes to, how many rows go where, and, by MPI, how many come.
  void route() {
    place_.assign(static_cast<std::size_t>(num_tokens_ * work_.num_ranks), -1);
    std::fill(send_.counts.begin(), send_.counts.end(), 0);
    for (int token = 0; token < num_tokens_; ++token) {
      for (int k = 0; k < work_.num_topk; ++k) {
        const int rank = work_.rank_of(routing_.topk_idx[static_cast<std::size_t>(token * work_.num_topk + k)]);
        int& place = place_[static_cast<std::size_t>(token * work_.num_ranks + rank)];
        if (place < 0) place = send_.counts[rank]++;
      }
    }
    send_.place();
    MPI_Alltoall(send_.counts.data(), 1, MPI_INT, receive_.counts.data(), 1, MPI_INT, MPI_COMM_WORLD);
    receive_.place();
  }

  // Reads each token once; quantises it once, where that is asked for.
  void pack(bool with_meta) {
    for (int token = 0; token < num_tokens_; ++token) {
      const std::uint16_t* row = x_.data() + token * work_.hidden;
      const std::byte* scales = nullptr;
      const std::byte* source = reinterpret_cast<const std::byte*>(row);
      for (int rank = 0; rank < work_.num_ranks; ++rank) {
        const int place = place_[static_cast<std::size_t>(token * work_.num_ranks + rank)];
        if (place < 0) continue;
        const std::int64_t at = send_.first[rank] + place;
        std::byte* to = packed_.data() + at * wire_.row_bytes;
        std::byte* scales_to = packed_scales_.data() + at * work_.num_scales() * 4;
        if (wire_.fp8 && scales == nullptr) {
          ops_.quantize({row, DType::kBf16, work_.hidden, reinterpret_cast<std::uint8_t*>(to), scales_to, 1,
                         plan::Fp8Scale::kExact});
          source = to;
          scales = scales_to;
        } else {
          std::memcpy(to, source, static_cast<std::size_t>(wire_.row_bytes));
          if (wire_.fp8) std::memcpy(scales_to, scales, static_cast<std::size_t>(work_.num_scales() * 4));
        }
        if (with_meta) pack_meta(token, at);
      }
    }
  }

  void pack_meta(int token, std::int64_t at) {
    const std::size_t k = static_cast<std::size_t>(work_.num_topk);
    std::byte* to = packed_meta_.data() + at * work_.meta_bytes();
    std::memcpy(to, routing_.topk_idx.data() + static_cast<std::size_t>(token) * k, k * sizeof(std::int64_t));
    std::memcpy(to + k * sizeof(std::int64_t), routing_.topk_weights.data() + static_cast<std::size_t>(token) * k,
                k * sizeof(float));
  }

  void unpack_meta() {
    const std::size_t k = static_cast<std::size_t>(work_.num_topk);
    for (int row = 0; row < receive_.total; ++row) {
      const std::byte* from = received_meta_.data() + row * work_.meta_bytes();
      std::memcpy(topk_idx_.data() + static_cast<std::size_t>(row) * k, from, k * sizeof(std::int64_t));
      std::memcpy(topk_weights_.data() + static_cast<std::size_t>(row) * k, from + k * sizeof(std::int64_t),
                  k * sizeof(float));
      for (std::size_t i = static_cast<std::size_t>(row) * k; i < (static_cast<std::size_t>(row) + 1) * k; ++i) {
        const bool here = work_.rank_of(topk_idx_[i]) == rank_;
        topk_idx_[i] = here ? topk_idx_[i] % work_.slots() : -1;
        topk_weights_[i] = here ? topk_weights_[i] : 0.0f;
      }
    }
  }

  void exchange(const std::byte* from, std::byte* to, MPI_Datatype type) {
    MPI_Alltoallv(from, send_.counts.data(), send_.first.data(), type, to, receive_.counts.data(),
                  receive_.first.data(), type, MPI_COMM_WORLD);
  }

  // Copies each arrival to the block of each of its experts here: [slots, ranks * tokens, hidden].
  void place_by_expert() {
    std::vector<std::size_t> used(static_cast<std::size_t>(work_.slots()), 0);
    const std::size_t slot_rows = static_cast<std::size_t>(work_.num_ranks * num_tokens_);
    padded_row_.clear();
    padded_source_.clear();
    for (int row = 0; row < receive_.total; ++row) {
      for (int k = 0; k < work_.num_topk; ++k) {
        const std::int64_t slot = topk_idx_[static_cast<std::size_t>(row * work_.num_topk + k)];
        if (slot < 0) continue;
        const std::size_t to = static_cast<std::size_t>(slot) * slot_rows + used[static_cast<std::size_t>(slot)]++;
        std::memcpy(padded_.data() + to * static_cast<std::size_t>(wire_.row_bytes),
                    received_.data() + row * wire_.row_bytes, static_cast<std::size_t>(wire_.row_bytes));
        if (wire_.fp8) {
          std::memcpy(padded_scales_.data() + to * static_cast<std::size_t>(work_.num_scales()),
                      received_scales_.data() + row * work_.num_scales() * 4,
                      static_cast<std::size_t>(work_.num_scales() * 4));
        }
        padded_row_.push_back(to);
        padded_source_.push_back(row);
      }
    }
  }

  // padded_row_ is in order (source rank, token, k): what goes back to a rank is one piece of it.
  void count_selections(Extent& out, Extent& back) const {
    for (const int row : padded_source_) {
      int rank = work_.num_ranks - 1;
      while (receive_.first[rank] > row) --rank;
      ++out.counts[rank];
    }
    for (const std::int64_t expert : routing_.topk_idx) ++back.counts[work_.rank_of(expert)];
    out.place();
    back.place();
  }

  void weigh(int token, std::vector<int>& next) {
    const std::size_t first = static_cast<std::size_t>(token * work_.num_topk);
    summands_.clear();
    for (std::size_t i = first; i < first + static_cast<std::size_t>(work_.num_topk); ++i)
      summands_.push_back(returned_.data() + next[work_.rank_of(routing_.topk_idx[i])]++ * work_.row_bytes());
    sum_into_result(token, routing_.topk_weights.data() + first);
  }

  // As the library writes its results: past the caches, since nobody reads them at once.
  void sum_into_result(int token, const float* weights) {
    ops_.sum({summands_.data(), weights, static_cast<int>(summands_.size()), DType::kBf16, work_.hidden,
              result_.data() + token * work_.hidden, true});
  }

  const Workload& work_;
  const host::RowOps& ops_ = host::row_ops();
  int rank_;
  int num_tokens_;
  bool by_expert_;
  Routing routing_;
  Traffic traffic_;
  std::vector<std::uint16_t> x_, result_;
  std::vector<const void*> summands_;  // of one token
  Wire wire_;
  std::vector<int> place_;  // [num_tokens, num_ranks]: row in that rank's part of the send buffer, or -1
  Extent send_, receive_;
  RowType rows_, fp8_rows_, scale_rows_, meta_rows_;
  std::vector<std::byte> packed_, received_, packed_scales_, received_scales_, packed_meta_, received_meta_;
  std::vector<std::int64_t> topk_idx_;
  std::vector<float> topk_weights_;
  std::vector<std::byte> padded_, returned_, outgoing_;
  std::vector<float> padded_scales_;
  std::vector<std::size_t> padded_row_;
  std::vector<int> padded_source_;
};

struct Command {
  Workload work;
  std::vector<std::string> only;  // names of operations; empty: all
  std::string board;              // a file; empty: memory that MPI shares, where all ranks are of one machine to it
  std::string out;
};

struct Operation {
  std::string name;
  int reps = 0;
  std::function<void()> run;
  std::function<std::int64_t()> digest;
};

std::vector<Operation> large(Exchange& exchange, int reps) {
  std::vector<Operation> all;
  for (const bool fp8 : {false, true}) {
    for (const bool cached : {false, true}) {
      all.push_back({std::string("dispatch_") + (fp8 ? "fp8" : "bf16") + (cached ? "_cached" : ""), reps,
                     [&exchange, fp8, cached] { exchange.dispatch(fp8, cached); },
                     [&exchange] { return exchange.digest_received(); }});
    }
  }
  return all;
}

std::vector<Operation> small(Exchange& exchange, int reps) {
  const auto result = [&exchange] { return exchange.digest_result(); };
  const auto padded = [&exchange] { return exchange.digest_padded(); };
  return {{"ll_dispatch_fp8", reps, [&exchange] { exchange.dispatch(true, false); }, padded},
          {"ll_dispatch_bf16", reps, [&exchange] { exchange.dispatch(false, false); }, padded},
          {"ll_combine_bf16", reps, [&exchange] { exchange.combine_by_expert(); }, result},
          {"ll_round_trip_fp8_bf16", reps,
           [&exchange] {
             exchange.dispatch(true, false);
             exchange.combine_by_expert();
           },
           nullptr}};
}

nlohmann::json measure(Barrier& barrier, const Operation& op, int warmup) {
  if (barrier.rank() == 0) fmt::print(stderr, "mpi_exchange: {}\n", op.name);
  std::vector<std::int64_t> times;
  for (int i = 0; i < warmup; ++i) op.run();
  for (int i = 0; i < op.reps; ++i) times.push_back(barrier.time(op.run));
  nlohmann::json report = {{"name", op.name}, {"time", to_json(summarize(times))}};
  if (!op.digest) return report;
  barrier.board().ranks[barrier.rank()].note[0] = op.digest();
  barrier.sync();
  for (int rank = 0; rank < barrier.num_ranks(); ++rank)
    report["digest"].push_back(barrier.board().ranks[rank].note[0]);
  barrier.sync();
  return report;
}

nlohmann::json run(const Command& command, Barrier& barrier) {
  const Workload& work = command.work;
  nlohmann::json report;
  const auto add = [&](const Operation& op) {
    if (command.only.empty() || std::find(command.only.begin(), command.only.end(), op.name) != command.only.end())
      report.push_back(measure(barrier, op, work.warmup));
  };
  {
    Exchange exchange(work, barrier.rank(), work.num_tokens, false);
    for (const Operation& op : large(exchange, work.reps)) add(op);
    exchange.dispatch(false, false);
    const std::vector<std::byte> rows(
        exchange.received(),
        exchange.received() + traffic_of(work, work.num_tokens).received(barrier.rank()) * work.row_bytes());
    add({"combine_bf16", work.reps, [&] { exchange.combine(rows.data()); }, [&] { return exchange.digest_result(); }});
  }
  Exchange exchange(work, barrier.rank(), work.num_ll_tokens, true);
  for (const Operation& op : small(exchange, work.ll_reps)) add(op);
  return report;
}

// A board in memory that MPI shares between the ranks of one machine, or in a file.
class SharedBoard {
 public:
  SharedBoard(int rank, const std::string& file) {
    if (!file.empty()) {
      mapping_ = map_board(file);
      board_ = reinterpret_cast<Board*>(mapping_.get());
      return;
    }
    void* mine = nullptr;
    MPI_Win_allocate_shared(rank == 0 ? sizeof(Board) : 0, 1, MPI_INFO_NULL, MPI_COMM_WORLD, &mine, &window_);
    MPI_Aint bytes = 0;
    int unit = 0;
    void* first = nullptr;
    MPI_Win_shared_query(window_, 0, &bytes, &unit, &first);
    if (rank == 0) std::memset(first, 0, sizeof(Board));
    board_ = static_cast<Board*>(first);
    MPI_Barrier(MPI_COMM_WORLD);
  }
  SharedBoard(const SharedBoard&) = delete;
  SharedBoard& operator=(const SharedBoard&) = delete;
  ~SharedBoard() {
    if (window_ != MPI_WIN_NULL) MPI_Win_free(&window_);
  }
  Board& operator*() { return *board_; }

 private:
  MPI_Win window_ = MPI_WIN_NULL;
  Mapping mapping_;
  Board* board_ = nullptr;
};

int run_ranks(Command command) {
  Workload& work = command.work;
  const std::string& out = command.out;
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &work.num_ranks);
  if (const std::string wrong = complaint(work); !wrong.empty()) {
    if (rank == 0) fmt::print(stderr, "mpi_exchange: {}\n", wrong);
    return 2;
  }
  SharedBoard board(rank, command.board);
  Barrier barrier(*board, rank, work.num_ranks);
  nlohmann::json report = {{"program", "mpi_exchange"},
                           {"workload", to_json(work)},
                           {"clock", kClockBoundary},
                           {"isa", host::row_ops().isa}};
  char version[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(version, &length);
  report["library"] = std::string(version, static_cast<std::size_t>(length));
  report["operations"] = run(command, barrier);
  if (rank != 0) return 0;
  if (out.empty()) {
    fmt::print("{}\n", report.dump(1));
    return 0;
  }
  std::ofstream file(out);
  file << report.dump(1) << '\n';
  return file.flush() ? 0 : 1;
}

}  // namespace
}  // namespace deep_ep::bench

int main(int argc, char** argv) {
  deep_ep::bench::Command command;
  CLI::App app("The exchange of host_exchange written with MPI_Alltoallv; run it as: mpirun -np 4 mpi_exchange");
  add_options(app, command.work);
  app.add_option("--only", command.only, "names of operations, others are left out")->delimiter(',');
  app.add_option("--board", command.board,
                 "a file, empty at first, by which ranks meet that MPI takes for ranks of several machines");
  app.add_option("--out", command.out, "file for the JSON report; without it: standard output");
  CLI11_PARSE(app, argc, argv);
  MPI_Init(&argc, &argv);
  int status = 1;
  try {
    status = deep_ep::bench::run_ranks(command);
  } catch (const std::exception& error) {
    fmt::print(stderr, "mpi_exchange: {}\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return status;
}
