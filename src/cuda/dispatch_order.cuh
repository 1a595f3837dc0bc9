// SPDX-License-Identifier: MIT
// Dispatch: which tokens a mover warp takes, in which order.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A mover warp among those that write to the same ranks.
struct Place {
  int number;  // where it moves no rows: p.num_tokens
  int warps;
  bool far;
};
__device__ Place place_of(const DispatchParams& p, int warp) {
  const int block = static_cast<int>(blockIdx.x);
  const bool far = block < p.roles.far;
  const int blocks = far ? p.roles.far : p.roles.moving - p.roles.far, in_role = far ? block : block - p.roles.far;
  return {in_role < blocks ? in_role + warp * blocks : p.num_tokens, blocks * p.mover_warps, far};
}
// So many tokens of a warp have a lane for each of their selections, or for 32 of those.
__device__ int tokens_at_once(const DispatchParams& p) { return p.lanes_of_token.quotient(32); }

// The order in which a mover warp takes tokens is one of two classes. A job is one piece of one row, a token comes
// again for each 32 of its selections, and targets are found for a list of tokens at once:
//   begin()                    the first job
//   reach(job)                 goes on to the job that comes next; whether there is one. All lanes
//   has(job)                   it is known already, and there
//   token(job, i)              the i-th token of its list, counted from the job's own
//   list_size(job, most)       so many tokens; `most`: tokens_at_once()
//   advance(job)               to the next piece
//   advance_list(job, most)    to the next list

// Each warp has the same share of the tokens: number, number + warps, ...
class Shares {
 public:
  struct Job {
    int token, chunk, piece;
  };
  __device__ Shares(const DispatchParams& p, const Place& place) : p_(p), first_(place.number), step_(place.warps) {}
  __device__ Job begin() const { return {first_, 0, 0}; }
  __device__ bool reach(const Job& job) const { return has(job); }
  __device__ bool has(const Job& job) const { return job.token < p_.num_tokens; }
  __device__ int token(const Job& job, int i = 0) const { return job.token + i * step_; }
  __device__ int list_size(const Job&, int most) const { return most; }
  // Step by step: a division for each job costs more than moving a short row.
  __device__ void advance(Job& job) const {
    if (++job.piece < p_.pieces) return;
    job.piece = 0;
    skip_pieces(job);
  }
  __device__ void advance_list(Job& job, int most) const {
    if (p_.chunks > 1) {
      skip_pieces(job);
    } else {
      job.token += most * step_;
    }
  }

 private:
  __device__ void skip_pieces(Job& job) const {
    if (++job.chunk < p_.chunks) return;
    job.chunk = 0;
    job.token += step_;
  }

  const DispatchParams& p_;
  const int first_, step_;
};

// The first half of the tokens is shared out by number, a few neighbours at a time; the others are taken one by one,
// with tickets. Neither memory nor a link serves all SMs alike: of 24 that copy the same number of rows to two H200 in
// a bare loop the first is done after 65 us, the last after 110. Warps that quantise keep to shares: each batch is a
// chain of instructions that wait for one another, and lists of one token make it longer by more than is gained.
//
// Known are the list at work and the next one; the ticket of the one behind is on its way, so that nobody waits for it.
// The additions are relaxed: a ticket says nothing but its number. Each dispatch finds the counters at zero. finish()
// sets them back, in the last block of the operation's last kernel, however the call went: blocks that add are ordered
// before it by last_block(), and the next kernel that adds begins after its end. Nobody takes a ticket in a dispatch
// that leaves without it because its room was guessed too small.
class Tickets {
 public:
  struct Job {
    int list, token_here, chunk, piece;
  };
  __device__ Tickets(const DispatchParams& p, const Place& place, int lane)
      : p_(p),
        lane_(lane),
        counter_(&p.common.state->tickets[place.far ? 1 : 0]),
        number_(place.number),
        warps_(place.warps),
        largest_(min(kLargestList, tokens_at_once(p))),
        large_rounds_(moves_rows() ? p.num_tokens / (2 * warps_ * largest_) : 0),
        first_ticket_((large_rounds_ * largest_ + kSingleRounds) * warps_),
        at_work_(by_number(0)),
        next_(by_number(1)) {
    ask_for_ticket(2);
  }
  __device__ Job begin() const { return {0, 0, 0, 0}; }
  __device__ bool reach(const Job& job) {
    if (job.list > list_at_work_) step();
    return has(job);
  }
  __device__ bool has(const Job& job) const { return job.list <= list_at_work_ + 1 && token(job) < p_.num_tokens; }
  __device__ int token(const Job& job, int i = 0) const { return list(job).first + job.token_here + i; }
  __device__ int list_size(const Job& job, int) const { return list(job).size; }
  __device__ void advance(Job& job) const {
    if (++job.piece < p_.pieces) return;
    job.piece = 0;
    if (++job.chunk < p_.chunks) return;
    job.chunk = 0;
    if (++job.token_here < list(job).size) return;
    job.token_here = 0;
    ++job.list;
  }
  __device__ void advance_list(Job& job, int) const {
    if (++job.chunk < p_.chunks) return;
    job.chunk = 0;
    ++job.list;
  }

 private:
  static constexpr int kLargestList = 4;
  static constexpr int kSingleRounds = 2;  // by number too, while the first ticket is on its way
  // Neighbours. Without any where `first` is the number of tokens, or more.
  struct List {
    int first, size;
  };

  __device__ bool moves_rows() const { return number_ < p_.num_tokens; }
  __device__ List nothing() const { return {p_.num_tokens, 1}; }
  // Of a job whose list is known.
  __device__ const List& list(const Job& job) const { return job.list == list_at_work_ ? at_work_ : next_; }
  __device__ bool is_by_number(int round) const { return round < large_rounds_ + kSingleRounds; }
  __device__ List by_number(int round) const {
    if (!moves_rows()) return nothing();
    if (round < large_rounds_) return {(round * warps_ + number_) * largest_, largest_};
    return {(large_rounds_ * largest_ + round - large_rounds_) * warps_ + number_, 1};
  }
  // Tickets grow: behind a list without tokens comes no other.
  __device__ void ask_for_ticket(int round) {
    if (!is_by_number(round) && next_.first < p_.num_tokens && lane_ == 0) ticket_ = atomicAdd(counter_, 1u);
  }
  __device__ void step() {
    const int round = ++list_at_work_ + 1;
    at_work_ = next_;
    if (at_work_.first >= p_.num_tokens) {
      next_ = nothing();
    } else if (is_by_number(round)) {
      next_ = by_number(round);
    } else {
      next_ = {first_ticket_ + static_cast<int>(__shfl_sync(kAllLanes, ticket_, 0)), 1};
    }
    ask_for_ticket(round + 1);
  }

  const DispatchParams& p_;
  const int lane_;
  std::uint32_t* const counter_;
  const int number_, warps_, largest_, large_rounds_, first_ticket_;
  int list_at_work_ = 0;
  List at_work_, next_;
  std::uint32_t ticket_ = 0;
};

}  // namespace
}  // namespace deep_ep::cuda
