// SPDX-License-Identifier: MIT
// Low-latency combine. Every row goes back, cut into parts, into the slot of its selection at its token's home; with
// pre_reduce the rows of a token are weighed and added first, and one goes back. Home, a warp waits for the parts that
// it adds, and adds them in the plan's order.
// Phases: open, announce | send ... hear, sum.
#include "cuda/encode.cuh"
#include "cuda/low_latency.cuh"
#include "plan/sum_order.h"

namespace deep_ep::cuda {

namespace {

using Params = LowLatencyCombineParams;

constexpr int kChunk = 512;  // bytes of a row that a warp adds at a time: sixteen for each lane
constexpr int kAhead = 8;    // rows of which it reads at once

// Slots of the ticket in an owner's window:  [ rows: max_tokens x topk | weights: f32, max_tokens x topk x topk ]
struct Slots {
  std::byte* base;
  std::int64_t stride;
  const Params& p;

  __device__ Slots(const Now& now, const Params& params, std::byte* window)
      : base(window + now.common.layout.low_latency(ticket_of(now))), stride(params.row_bytes), p(params) {}
  __device__ std::byte* row(int token, int k) const { return base + (std::int64_t{token} * p.num_topk + k) * stride; }
  // All weights of the row in a slot: one for each selection.
  __device__ float* weights(int token, int k) const {
    const std::int64_t slots = std::int64_t{p.max_tokens_per_rank} * p.num_topk;
    return reinterpret_cast<float*>(base + slots * stride) + (std::int64_t{token} * p.num_topk + k) * p.num_topk;
  }
};

__device__ std::int64_t flag_number(const Params& p, int rank, int token, int part) {
  return (std::int64_t{rank} * p.max_tokens_per_rank + token) * p.parts.count + part;
}

// Only one row of a rank comes home for a token, at the rank's highest selection.
__device__ bool one_row_per_rank(const Params& p) { return p.pre_reduce || p.layout == OutputLayout::kByRank; }

// Sixteen bytes of a row, as floats.
template <class Number>
struct Vector {
  static constexpr int kFours = 16 / static_cast<int>(sizeof(typename Number::Four));
  float x[kFours][4] = {};

  __device__ void add(uint4 v, float weight) {
    const auto* fours = reinterpret_cast<const typename Number::Four*>(&v);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      float widened[4];
      Number::widen(fours[i], widened);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] = plan::fma_rn(weight, widened[j], x[i][j]);  // a weight of 1 adds exactly
    }
  }
  __device__ uint4 narrow() const {
    uint4 v;
    Number::narrow_all(x, *reinterpret_cast<typename Number::Four(*)[kFours]>(&v));
    return v;
  }
  // A complete sum is rounded to the rows' type, as if it had crossed a link, and added one level up.
  __device__ void close_into(Vector& above) {
    above.add(narrow(), 1);
    *this = Vector{};
  }
};

// Send
// ---------------------------------------------------------------------------------------------------------------------

// One part of the rows that `rows` names, lane k that of selection k, into their slots as they are.
__device__ void send_rows(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                          std::int64_t begin, std::int64_t end, int lane) {
  constexpr int kVectors = 4, kAtOnce = 2;
  for (std::int64_t piece = begin; piece < end; piece += kVectors * 512) {
    for (unsigned rest = selected; rest != 0;) {
      uint4 v[kAtOnce][kVectors];
      std::byte* to[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int k = __ffs(rest) - 1;
        to[r] = k >= 0 ? home.row(token, k) + piece : nullptr;
        const std::byte* const from =
            p.x + std::int64_t{__shfl_sync(kAllLanes, row, k >= 0 ? k : 0)} * p.row_bytes + piece;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (k >= 0 && piece + 512 * i + 16 * lane < end)
            v[r][i] = __ldg(reinterpret_cast<const uint4*>(from + 512 * i + 16 * lane));
        rest &= rest - 1;
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
          if (to[r] != nullptr && piece + 512 * i + 16 * lane < end) store16(to[r] + 512 * i + 16 * lane, v[r][i]);
    }
  }
}

// The same rows added, weighed if there are weights, and rounded: one row into the slot of the highest selection.
template <class Number>
__device__ void send_sum(const Params& p, const Slots& home, int token, unsigned selected, std::int32_t row,
                         float weight, std::int64_t begin, std::int64_t end, int lane) {
  std::byte* const to = home.row(token, 31 - __clz(selected));
  for (std::int64_t byte = begin + 16 * lane; byte - 16 * lane < end; byte += kChunk) {
    Vector<Number> sum;
    for (unsigned rest = selected; rest != 0;) {
      uint4 v[kAhead];
      float weights[kAhead];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = rest != 0 ? __ffs(rest) - 1 : 0;
        const std::int64_t from = __shfl_sync(kAllLanes, row, k);
        weights[i] = __shfl_sync(kAllLanes, weight, k);
        if (rest != 0 && byte < end) v[i] = __ldg(reinterpret_cast<const uint4*>(p.x + from * p.row_bytes + byte));
        if (rest != 0) ++count;
        rest &= rest - 1;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i < count) sum.add(v[i], weights[i]);
    }
    if (byte < end) store16(to + byte, sum.narrow());
  }
}

// Weights that travel home: one for each selection, or where rows are joined all of the arrival's with its row.
__device__ void send_weights(const Params& p, const Slots& home, int token, std::int64_t arrival, unsigned selected,
                             std::int32_t row, int lane) {
  if (p.layout == OutputLayout::kByRank) {
    if (lane < p.num_topk) home.weights(token, 31 - __clz(selected))[lane] = p.x_weights[arrival * p.num_topk + lane];
  } else if (row >= 0) {
    home.weights(token, lane)[lane] = p.x_weights[row];
  }
}

// One part of one arrival, as a lane sees it: the row of its selection.
struct Arrival {
  std::int64_t arrival;
  int part, token;
  std::int32_t row;
};

template <class Number>
__device__ void send_part(const Now& now, const Params& p, const Peers& peers, const std::int32_t* first_arrival,
                          const Flags& flags, const Arrival& from, int lane) {
  const auto [arrival, part, token, row] = from;
  int home = 0;
  while (arrival >= first_arrival[home + 1]) ++home;
  if (!peers.active(home)) return;
  const std::int64_t entry = arrival * p.num_topk + lane;
  const unsigned selected = __ballot_sync(kAllLanes, row >= 0);
  const Slots slots(now, p, peers.window(home));
  const std::int64_t begin = std::int64_t{part} * p.parts.bytes;
  const std::int64_t end = begin + p.parts.bytes < p.row_bytes ? begin + p.parts.bytes : p.row_bytes;
  if (selected == 0) return;
  if (p.pre_reduce && p.layout != OutputLayout::kByRank) {
    const float weight = p.arrival_weights != nullptr && lane < p.num_topk ? p.arrival_weights[entry] : 1;
    send_sum<Number>(p, slots, token, selected, row, weight, begin, end, lane);
  } else {
    const unsigned highest = 1u << (31 - __clz(selected));
    send_rows(p, slots, token, one_row_per_rank(p) ? highest : selected, row, begin, end, lane);
  }
  if (part == 0 && p.x_weights != nullptr) send_weights(p, slots, token, arrival, selected, row, lane);
  if (lane == 0) flags.add(flag_of(now, peers.window(home), flag_number(p, p.common.rank, token, part)));
}

// Phases open, announce, send. False: not all was sent.
template <class Number>
__device__ bool send(const Now& now, const Params& p, const Peers& peers, std::int32_t* first_arrival,
                     const Flags& flags, const Place& at) {
  const int ranks = p.common.num_ranks;
  // Fits: each part has a flag, and flags are memory.
  const int most = ranks * p.max_tokens_per_rank * p.parts.count;
  int unit = at.number();
  Arrival from{};
  const auto look = [&] {  // may be behind the last arrival: the tables have room for the most that can come
    from.arrival = unit / p.parts.count;
    from.part = unit % p.parts.count;
    from.row = at.lane < p.num_topk ? p.arrival_row[from.arrival * p.num_topk + at.lane] : -1;
    from.token = p.src_token[from.arrival];
  };
  if (unit < most) look();
  for (int i = static_cast<int>(threadIdx.x); i <= ranks; i += kLowLatencyThreads)
    first_arrival[i] = p.first_arrival[i];
  peers.load(p.common);
  flags.clear();
  if (!open_operation(now, p.window, p.ticket, at, (p.phases & kReceive) != 0)) return false;
  if (at.block == at.blocks - 1)
    for (int peer = at.warp; peer < ranks; peer += kLowLatencyWarps) {
      if (!peers.active(peer)) continue;
      write_signature(now, peers.window(peer), at.lane);
      __syncwarp();
      if (at.lane == 0) publish(now, &words_in(now, peers.window(peer), p.common.rank).announced, kSame);
    }
  const int units = first_arrival[ranks] * p.parts.count;
  const int of_round = at.warps() * Flags::kUnits;
  for (int begun = 0; begun < units; begun += of_round, flags.raise(now, at))
    for (int i = 0; i < Flags::kUnits && unit < units; ++i) {
      send_part<Number>(now, p, peers, first_arrival, flags, from, at.lane);
      unit += at.warps();
      if (unit < units) look();
    }
  return true;
}

// Sum
// ---------------------------------------------------------------------------------------------------------------------

// The contributions to a token's sum: lane k knows that of selection k, lane i the i-th in the plan's order.
struct Terms {
  int rank;          // of selection `lane`; -1: no selection, or its rank takes no part
  bool stands;       // a row comes for it
  int count;         // rows that come
  int k;             // the lane-th row to add
  int closes;        // after it 1: the rank's sum is complete, 2: the node's
  unsigned leaders;  // lanes that are the first of their rank
};

// As plan::make_sum_steps, by a warp: each lane finds the place of its own selection.
__device__ Terms make_terms(const Params& p, const Peers& peers, int token, int lane) {
  Terms t{};
  t.rank = lane < p.num_topk ? p.dst_rank[std::int64_t{token} * p.num_topk + lane] : -1;
  if (t.rank >= 0 && !peers.active(t.rank)) t.rank = -1;
  const int node = p.order.round_per_node && t.rank >= 0 ? p.node_of_rank[t.rank] : -1;
  const unsigned same_rank = __match_any_sync(kAllLanes, t.rank), same_node = __match_any_sync(kAllLanes, node);
  const int highest = 31 - __clz(same_rank);
  t.stands = t.rank >= 0 && (!one_row_per_rank(p) || lane == highest);
  t.leaders = __ballot_sync(kAllLanes, t.rank >= 0 && lane == __ffs(same_rank) - 1);
  t.count = __popc(__ballot_sync(kAllLanes, t.stands));
  const std::uint64_t key =
      t.stands ? plan::sum_key(p.order, lane, {t.rank, highest}, {node, 31 - __clz(same_node)}) : ~std::uint64_t{0};
  int before = 0;
  for (int j = 0; j < p.num_topk; ++j) before += __shfl_sync(kAllLanes, static_cast<unsigned long long>(key), j) < key;
  for (int j = 0; j < p.num_topk; ++j) {
    const int place = __shfl_sync(kAllLanes, t.stands ? before : -1, j);
    if (place == lane) t.k = j;
  }
  const int rank_here = __shfl_sync(kAllLanes, t.rank, t.k), node_here = __shfl_sync(kAllLanes, node, t.k);
  const int rank_next = __shfl_down_sync(kAllLanes, rank_here, 1),
            node_next = __shfl_down_sync(kAllLanes, node_here, 1);
  const bool last = lane + 1 >= t.count;
  t.closes = (p.order.round_per_rank && (last || rank_next != rank_here) ? 1 : 0) |
             (p.order.round_per_node && (last || node_next != node_here) ? 2 : 0);
  return t;
}

// All lanes: the part has come from every rank that has a row of this token.
__device__ bool await_part(const Now& now, const Params& p, const Terms& t, std::byte* window, int token, int part,
                           int lane) {
  bool came = true;
  if ((t.leaders >> lane & 1) != 0)
    came = await_flag(now, flag_of(now, window, flag_number(p, t.rank, token, part)), t.rank);
  return __all_sync(kAllLanes, came) != 0;
}

// Sixteen bytes of a token's sum for each lane.
template <class Number, bool kLevels>
__device__ void sum_chunk(const Params& p, const Terms& t, const Slots& slots, int token, std::int64_t byte,
                          float weight, int lane) {
  const bool mine = byte < p.row_bytes;
  Vector<Number> of_all, of_rank, of_node;
  const auto add_biases = [&] {
    for (const std::byte* bias : p.bias)
      if (bias != nullptr && mine) of_all.add(load16(bias + token * p.row_bytes + byte), 1);
  };
  if (p.order.bias_first) add_biases();
  for (int first = 0; first < t.count; first += kAhead) {
    uint4 v[kAhead];
    int k[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      k[i] = __shfl_sync(kAllLanes, t.k, first + i);
      if (first + i < t.count && mine) v[i] = load16(slots.row(token, k[i]) + byte);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= t.count) continue;
      const float w = __shfl_sync(kAllLanes, weight, k[i]);
      if constexpr (!kLevels) {
        of_all.add(v[i], w);
      } else {
        Vector<Number>& lowest = p.order.round_per_rank ? of_rank : of_node;
        lowest.add(v[i], w);
        const int closes = __shfl_sync(kAllLanes, t.closes, first + i);
        if ((closes & 1) != 0) {
          if (p.order.round_per_node) {
            of_rank.close_into(of_node);
          } else {
            of_rank.close_into(of_all);
          }
        }
        if ((closes & 2) != 0) of_node.close_into(of_all);
      }
    }
  }
  if (!p.order.bias_first) add_biases();
  if (mine) __stcs(reinterpret_cast<uint4*>(p.out + token * p.row_bytes + byte), of_all.narrow());
}

// Weights that came home, joined: each lane one selection's.
__device__ float home_weight(const Params& p, const Terms& t, const Slots& slots, int token, int lane) {
  const bool by_rank = p.layout == OutputLayout::kByRank;
  const unsigned same = __match_any_sync(kAllLanes, t.rank);
  const int highest = 31 - __clz(same);
  const auto entry = [&](int row, int k) { return __ldcg(slots.weights(token, row) + k); };
  float sum = 0;
  if (!by_rank || p.weights_home == WeightsHome::kFromOwner)
    return t.rank >= 0 ? entry(by_rank ? highest : lane, lane) : 0;
  for (int rank = 0; rank < p.common.num_ranks; ++rank) {
    const unsigned of_rank = __ballot_sync(kAllLanes, t.rank == rank);
    if (of_rank != 0 && t.rank >= 0) sum = plan::add_rn(sum, entry(31 - __clz(of_rank), lane));
  }
  return sum;
}

// Phases hear, sum. False: not all has come.
template <class Number, bool kLevels>
__device__ bool receive(const Now& now, const Params& p, const Peers& peers, const Place& at) {
  bool good = true;
  // One block hears whether the peers make the same call. Where one does not, it says so, and the others, which wait
  // for parts that never come, see that.
  for (int peer = at.warp; at.block == at.blocks - 1 && peer < p.common.num_ranks; peer += kLowLatencyWarps) {
    if (!peers.active(peer)) continue;
    std::uint32_t value = 0;
    good = await_word(now, peer, &words_in(now, p.window, peer).announced, value, true, at.lane) &&
           is_our_call(now, peer, load_field(now, p.window, peer, at.lane), at.lane) && good;
  }
  // A token's chunks are shared by as many warps as there are for it.
  const int chunks = p.row_bytes > 0 ? static_cast<int>((p.row_bytes + kChunk - 1) / kChunk) : 1;
  const int wanted = p.num_tokens > 0 ? at.warps() / p.num_tokens : 1;
  const int sharing = wanted < 1 ? 1 : wanted > chunks ? chunks : wanted;
  const int of_warp = (chunks + sharing - 1) / sharing;
  const int shares = (chunks + of_warp - 1) / of_warp;
  const Slots slots(now, p, p.window);
  for (int unit = at.number(); unit < p.num_tokens * shares; unit += at.warps()) {
    const int token = unit / shares, first = unit % shares * of_warp;
    const Terms t = make_terms(p, peers, token, at.lane);
    float weight = 1;
    if (p.weights != nullptr && !p.pre_reduce && at.lane < p.num_topk)
      weight = p.weights[std::int64_t{token} * p.num_topk + at.lane];
    int part = -1;
    bool came = true;
    for (int chunk = first; came && chunk < first + of_warp && chunk < chunks; ++chunk) {
      const int next_part = p.row_bytes > 0 ? chunk * kChunk / p.parts.bytes : 0;
      if (next_part != part) came = await_part(now, p, t, p.window, token, part = next_part, at.lane);
      if (!came) break;
      if (p.row_bytes > 0)
        sum_chunk<Number, kLevels>(p, t, slots, token, std::int64_t{chunk} * kChunk + 16 * at.lane, weight, at.lane);
      if (chunk == 0 && p.weights_out != nullptr) {
        const float joined = home_weight(p, t, slots, token, at.lane);
        if (at.lane < p.num_topk) p.weights_out[std::int64_t{token} * p.num_topk + at.lane] = joined;
      }
    }
    good = good && came;
  }
  return good;
}

}  // namespace

template <class Number, bool kLevels>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) low_latency_combine(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ std::uint32_t* to_raise[Flags::kMost];
  __shared__ int num_to_raise;
  const Place at;
  const Peers peers{reinterpret_cast<Peer*>(memory)};
  auto* const first_arrival = reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  bool good = true;
  if (sends) {
    good = send<Number>(now, p, peers, first_arrival, {to_raise, &num_to_raise}, at);
  } else {
    open_receiving(now, at);
    peers.load(p.common);
    __syncthreads();
  }
  if ((p.phases & kReceive) != 0) good = receive<Number, kLevels>(now, p, peers, at) && good;
  if (!good) abandon_operation(now);
}

const void* low_latency_combine_kernel(DType dtype, bool levels) {
  if (dtype == DType::kBf16)
    return levels ? reinterpret_cast<const void*>(&low_latency_combine<Bf16, true>)
                  : reinterpret_cast<const void*>(&low_latency_combine<Bf16, false>);
  if (dtype == DType::kFp16)
    return levels ? reinterpret_cast<const void*>(&low_latency_combine<Fp16, true>)
                  : reinterpret_cast<const void*>(&low_latency_combine<Fp16, false>);
  return levels ? reinterpret_cast<const void*>(&low_latency_combine<Fp32, true>)
                : reinterpret_cast<const void*>(&low_latency_combine<Fp32, false>);
}

void launch_low_latency_combine(const Params& params, int blocks, cudaStream_t stream) {
  // Rows that are rounded sums of a rank already have one level less.
  const bool levels = (params.order.round_per_rank && !params.pre_reduce) || params.order.round_per_node;
  Params copy = params;
  void* arguments[] = {&copy};
  const std::size_t shared = sizeof(Peer) * params.common.num_ranks + 4 * (params.common.num_ranks + 1);
  cudaLaunchKernel(low_latency_combine_kernel(params.dtype, levels), dim3(static_cast<unsigned>(blocks)),
                   dim3(kLowLatencyThreads), arguments, shared, stream);
}

}  // namespace deep_ep::cuda
