// SPDX-License-Identifier: MIT
// Combine between nodes, our end as the one who is asked: a home's requests, batch after batch, and the rows of our
// node that answer them, one by one or joined to the node's sum.
#pragma once

#include "cuda/block_scan.cuh"
#include "cuda/combine_sum.cuh"
#include "cuda/forward_lanes.cuh"

namespace deep_ep::cuda {
namespace {  // a part of one kernel, included by its file alone

// A batch of requests comes
// ---------------------------------------------------------------------------------------------------------------------

// One thread, that of the lane of requests: the batch before is sent.
__device__ bool batch_is_sent(const Serving& serving) {
  // Acquire: other blocks have read the batch, which may be written over.
  return ptx::load_acquire(&serving.chunks_sent) == serving.chunks_in_all;
}

__device__ bool requests_fit(const Exchange& e, const Partner& from, const plan::ChunkHead& head) {
  const std::size_t unit_bytes = e.request(from.factors).bytes;
  return from.serving != nullptr && head.stream == plan::Stream::kRequests && head.units > 0 &&
         head.units <= static_cast<std::uint64_t>(e.p.most_requests) &&
         head.first_unit == static_cast<std::uint64_t>(from.serving->requests_here) &&
         head.units <= static_cast<std::uint64_t>(from.requests - from.serving->requests_here) &&
         head.bytes == e.cut(unit_bytes).chunk_bytes(head.units) && head.bytes <= e.common().far.slot_bytes;
}

// The selections of our node that a home asked for.
struct Asking {
  const Exchange& e;
  const Partner& from;
  const Batch& batch;

  __device__ const std::byte* unit(int request) const {
    return batch.requests + static_cast<std::size_t>(request) * e.request(from.factors).bytes;
  }
  __device__ plan::Selection selection(int request, int k) const {
    return reinterpret_cast<const plan::Selection*>(unit(request))[k];
  }
  __device__ float factor(int request, int k) const {
    if (!from.factors) return 1;
    return reinterpret_cast<const float*>(unit(request) + e.request(true).factors_at)[k];
  }
  // There is such a row in our node: far ranks have no source.
  __device__ bool exists(const plan::Selection& s) const {
    const int rank = e.first_rank + s.member;
    return s.member >= 0 && rank < e.common().num_ranks && e.sources[rank].x != nullptr && s.row >= 0 &&
           s.row < e.now.announcement(e.common().rank, rank).rows;
  }
};

// Every thread: the ranks of all selections. False if somebody asks for a row that is not there.
__device__ bool find_ranks(const Asking& asking, int requests) {
  const int topk = asking.e.p.combine.num_topk;
  bool good = true;
  for (int i = static_cast<int>(threadIdx.x); i < requests * topk; i += kThreads) {
    const plan::Selection s = asking.selection(i / topk, i % topk);
    const bool there = asking.exists(s);
    good = good && (there || s.member < 0);
    asking.batch.dst_rank[i] = there ? asking.e.first_rank + s.member : -1;
  }
  return __syncthreads_and(good);
}

// Every thread: rows go back one by one, in the order of the requests and of their selections. Returns how many.
__device__ int list_rows(const Asking& asking, int requests) {
  const int topk = asking.e.p.combine.num_topk;
  int listed = 0;
  for (int tile = 0; tile < requests; tile += kThreads) {
    const int request = tile + static_cast<int>(threadIdx.x);
    const std::int32_t* const ranks = asking.batch.dst_rank + std::int64_t{request} * topk;
    int rows = 0;
    for (int k = 0; request < requests && k < topk; ++k) rows += ranks[k] >= 0;
    CountPair in_tile;
    Term* next = asking.batch.terms + listed + scan_block<kWarps>(CountPair::of(0, rows), in_tile).second();
    for (int k = 0; request < requests && k < topk; ++k)
      if (ranks[k] >= 0) *next++ = {asking.selection(request, k).row, ranks[k], 1.0f, 0};
    listed += in_tile.second();
  }
  return listed;
}

// Every thread: what is added for each request, in the home's order.
__device__ void plan_sums(const Asking& asking, int requests) {
  const CombineParams& p = asking.e.p.combine;
  plan::SumStep local[kMostLocalSteps];
  for (int request = static_cast<int>(threadIdx.x); request < requests; request += kThreads) {
    const std::int64_t first = std::int64_t{request} * p.num_topk;
    asking.batch.num_terms[request] = plan_terms(
        {asking.from.order, p.layout == OutputLayout::kByRank, p.num_topk, asking.batch.dst_rank + first,
         p.node_of_rank},
        asking.batch.steps != nullptr ? asking.batch.steps + first : local, asking.batch.terms + first,
        [](int) { return true; }, [](int) { return false; }, [&](int k) { return asking.selection(request, k).row; },
        [&](int k) { return asking.factor(request, k); });
  }
}

// Every thread: takes a chunk of requests out and has all lanes of this home serve it.
__device__ void take_requests(const Exchange& e, const Partner& from, const plan::ChunkHead& head) {
  Serving& serving = *from.serving;
  const Batch batch = e.batch(from);
  const Asking asking{e, from, batch};
  const int requests = static_cast<int>(head.units);
  const std::byte* const chunk = chunk_from(e.common(), from.rank, plan::kRequestSlot) + plan::kChunkHeadBytes;
  const int vectors = static_cast<int>(requests * e.request(from.factors).bytes / 16);
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads)
    reinterpret_cast<uint4*>(batch.requests)[i] = ptx::load_streaming(chunk + std::size_t{16} * i);
  __syncthreads();
  if (threadIdx.x == 0) give_back(e.now, from.rank, plan::kRequestSlot);
  if (!find_ranks(asking, requests)) {
    if (threadIdx.x == 0) refuse_stray(e.now, from.rank, head.first_unit, from.requests);
    return;
  }
  if (from.joined) plan_sums(asking, requests);
  const int units = from.joined ? requests : list_rows(asking, requests);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto chunks = static_cast<std::uint32_t>(e.cut(e.unit(from.joined).bytes).num_chunks(units));
  serving.requests_here += requests;
  serving.first_unit += serving.units;
  serving.units = units;
  serving.chunks_in_all += chunks;
  // Release, behind the block barrier: whoever takes a chunk on sees the batch.
  __threadfence();
  atomicExch(&serving.chunks, static_cast<unsigned long long>(chunks) << 32);
}

// Rows go back
// ---------------------------------------------------------------------------------------------------------------------

// One thread: a chunk of the present batch that no block has taken on; -1: none.
__device__ int take_on_chunk(Serving& serving) {
  unsigned long long seen = *static_cast<volatile unsigned long long*>(&serving.chunks);
  while ((seen & 0xffffffffu) < seen >> 32) {
    const unsigned long long was = atomicCAS(&serving.chunks, seen, seen + 1);
    if (was == seen) {
      __threadfence();  // acquire: the batch, which stays until this chunk is counted as sent
      return static_cast<int>(seen & 0xffffffffu);
    }
    seen = was;
  }
  return -1;
}

// Whether there may be one: saves a look at the slot.
__device__ bool has_chunk(const Serving& serving) {
  const unsigned long long seen = *static_cast<const volatile unsigned long long*>(&serving.chunks);
  return (seen & 0xffffffffu) < seen >> 32;
}

// Some units of a batch, on their way into a chunk.
struct Answer {
  int first, units;
  std::byte* chunk;  // behind its head
  std::size_t unit_bytes;
  __device__ std::byte* unit(int i) const { return chunk + static_cast<std::size_t>(i) * unit_bytes; }
};

// Every thread: sums of our node, a warp for each.
template <class Number, bool kWeighted>
__device__ void write_sums(const Exchange& e, const Partner& to, const Batch& batch, const Answer& answer, Ring& ring) {
  constexpr int kVectors = kVectorsOf<true>;
  const CombineParams& p = e.p.combine;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const Share share(answer.first + warp, kWarps, answer.first + answer.units, static_cast<std::int64_t>(p.row_bytes),
                    Feed<kVectors>::kPiece);
  const TermTable table{batch.terms, batch.num_terms, p.num_topk};
  const TermReader<TermTable> reader{table, e.sources, share, lane};
  Feed<kVectors, TermTable> feed(reader, ring);
  for (int request = share.first; request < share.end; request += share.step) {
    Terms terms = reader.read(request);
    for (int piece = 0; piece < share.pieces; ++piece) {
      Sum<Number, kVectors> sum;
      add_terms<Number, true, kWeighted>(to.order, reader, terms, piece, feed, sum);
      auto* const out = reinterpret_cast<uint4*>(answer.unit(request - answer.first) + share.piece_at(piece)) + lane;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if ((32 * i + lane) * 16 < share.bytes(piece)) out[32 * i] = sum.narrow(i);
    }
  }
  ring = feed.ring();
}

// Every thread: the weights that the rows bring home. Those of selections that brought no row mean nothing.
__device__ void write_weights(const Exchange& e, const Partner& to, const Batch& batch, const Answer& answer) {
  const plan::ReturnUnit& unit = e.unit(to.joined);
  const Asking asking{e, to, batch};
  const int of_one = static_cast<int>(unit.weights_of_one), topk = e.p.combine.num_topk;
  const int rows = to.joined ? topk : 1;
  for (int i = static_cast<int>(threadIdx.x); i < answer.units * rows * of_one; i += kThreads) {
    const int number = i / (rows * of_one), k = i / of_one % rows, entry = i % of_one;
    const int at = answer.first + number;
    int rank = 0, row = 0;
    if (to.joined) {
      rank = batch.dst_rank[std::int64_t{at} * topk + k];
      row = asking.selection(at, k).row;
    } else {
      rank = batch.terms[at].rank;
      row = batch.terms[at].row;
    }
    if (rank < 0) continue;
    reinterpret_cast<float*>(answer.unit(number) + unit.weights_at)[i % (rows * of_one)] =
        __ldcv(e.sources[rank].weights + std::int64_t{row} * of_one + entry);
  }
}

// One thread. A rank that gave this operation up may have changed its rows since: what we read of them must not be sent
// as if it were right.
__device__ bool node_still_there(const Exchange& e) {
  for (int peer = 0; peer < e.common().num_ranks; ++peer) {
    if (peer == e.common().rank || e.sources[peer].x == nullptr) continue;
    if (ptx::load_acquire_system(&e.now.progress(e.common().rank, peer).sent) < e.now.epoch) continue;
    report(e.now, Fault::kGaveUp, peer, 1, 0);
    return false;
  }
  return true;
}

// Every thread, the slot and the chunk being ours: answers a home.
template <class Number>
__device__ void send_rows(const Exchange& e, const Partner& to, int slot, int chunk, Ring& ring) {
  const CombineParams& p = e.p.combine;
  Serving& serving = *to.serving;
  const Batch batch = e.batch(to);
  const plan::ReturnUnit& unit = e.unit(to.joined);
  const plan::Chunking cut = e.cut(unit.bytes);
  const int first = chunk * static_cast<int>(cut.per_chunk);
  const Answer answer{first, min(static_cast<int>(cut.per_chunk), serving.units - first),
                      chunk_to(e.common(), to.rank, slot) + plan::kChunkHeadBytes, unit.bytes};
  if (to.joined && to.factors)
    write_sums<Number, true>(e, to, batch, answer, ring);
  else if (to.joined)
    write_sums<Number, false>(e, to, batch, answer, ring);
  else
    copy_rows(
        answer.units, static_cast<std::int64_t>(p.row_bytes),
        [&](int i) {
          const Term& term = batch.terms[first + i];
          return e.sources[term.rank].x + term.row * static_cast<std::int64_t>(p.row_bytes);
        },
        [&](int i) { return answer.unit(i); });
  if (unit.weights_of_one > 0) write_weights(e, to, batch, answer);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (!node_still_there(e)) return leave_slot(e.common(), to.rank, slot);
  plan::ChunkHead head;
  head.epoch = e.now.epoch;
  head.stream = plan::Stream::kRows;
  head.units = static_cast<std::uint32_t>(answer.units);
  head.first_unit = static_cast<std::uint64_t>(serving.first_unit + first);
  head.bytes = cut.chunk_bytes(answer.units);
  put_chunk(e.now, to.rank, slot, head);
  // Release: we have read the batch.
  ptx::add_acquire_release(&serving.chunks_sent, 1);
}

}  // namespace
}  // namespace deep_ep::cuda
