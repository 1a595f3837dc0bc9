// SPDX-License-Identifier: MIT
// Low-latency dispatch. Rows are cut into parts; a warp reads a part of a token, quantises it if asked, and writes it
// to every rank that the token goes to, into the slot of its number, without asking anybody. Meanwhile one block for
// each destination counts, and tells it which tokens come and where their rows belong. The receiver knows the place of
// every row before the rows are there; a warp waits for a part and puts it at each of its experts. Phases: open, route
// | send ... gather, place.
#include "cuda/encode.cuh"
#include "cuda/low_latency.cuh"

namespace deep_ep::cuda {

namespace {

using Params = LowLatencyDispatchParams;

constexpr int kRouteSteps = 4;  // of tokens that a warp routes before the block adds up

__device__ std::byte* message_of(const Now& now, const Params& p, std::byte* window, int source, int token) {
  const std::int64_t number = std::int64_t{source} * p.max_tokens_per_rank + token;
  return window + now.common.layout.low_latency(ticket_of(now)) + number * static_cast<std::int64_t>(p.message.bytes);
}

__device__ std::int64_t flag_number(const Params& p, int source, int token, int part) {
  return (std::int64_t{source} * p.max_tokens_per_rank + token) * p.parts.count + part;
}

// A part of a row on the wire.
__device__ std::int64_t part_begin(const Params& p, int part) { return std::int64_t{part} * p.parts.bytes; }
__device__ std::int64_t part_end(const Params& p, int part) {
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const std::int64_t end = part_begin(p, part) + p.parts.bytes;
  return end < row_bytes ? end : row_bytes;
}

// Shared memory of a block: the peers, then what route or gather need.
struct Shared {
  Peers peers;
  std::int32_t* words;
};

__device__ Shared shared_of(const Params& p, std::byte* memory) {
  return {{reinterpret_cast<Peer*>(memory)},
          reinterpret_cast<std::int32_t*>(memory + sizeof(Peer) * p.common.num_ranks)};
}

__host__ __device__ int route_warps(int max_slots) {
  constexpr int kMostWords = 40 << 10;
  const int fit = kMostWords / (max_slots + 1) - 1;
  return fit < 1 ? 1 : fit > kLowLatencyWarps ? kLowLatencyWarps : fit;
}

// Route
// ---------------------------------------------------------------------------------------------------------------------

__device__ std::int64_t expert_of(const Params& p, std::int64_t at) {
  return p.topk_idx_64 ? static_cast<const std::int64_t*>(p.topk_idx)[at]
                       : static_cast<const std::int32_t*>(p.topk_idx)[at];
}

// Where a selection goes; rank -1: nowhere.
__device__ Placement::Replica replica_of(const Params& p, const Peers& peers, std::int64_t expert, int token) {
  if (expert < 0 || expert >= p.num_experts) return {-1, -1};
  const Placement::Replica to = p.one_copy_each
                                    ? p.placement.replicas[expert]
                                    : plan::route(p.placement, static_cast<int>(expert), p.common.rank, token);
  return peers.active(to.rank) ? to : Placement::Replica{-1, -1};
}

// What a lane knows of its selection after the count inside its warp.
struct Routed {
  int token, k;  // token -1: none
  int slot;      // -1: not at this destination
  int row;       // as the how-manieth of this warp
  int arrival;   // of the token's first selection there; -1 elsewhere
};

// One step of a warp: whole tokens, as many as there are lanes for.
__device__ Routed route_step(const Params& p, const Peers& peers, std::int32_t* counters, int dst, int first, int slots,
                             int lane, unsigned long long* bad) {
  const int of_step = 32 / p.num_topk;
  const int token = first + lane / p.num_topk;
  Routed r{-1, lane % p.num_topk, -1, 0, -1};
  int rank = -1;
  if (lane < of_step * p.num_topk && token < p.num_tokens) {
    const std::int64_t at = std::int64_t{token} * p.num_topk + r.k;
    const std::int64_t expert = expert_of(p, at);
    if (expert >= p.num_experts) atomicMin(bad, static_cast<unsigned long long>(at));
    const Placement::Replica to = replica_of(p, peers, expert, token);
    r.token = token;
    rank = to.rank;
    if (rank == dst) r.slot = to.slot;
    if (dst == p.common.rank) p.dst_rank[at] = rank;
  }
  const unsigned below = (1u << lane) - 1;
  const unsigned same_token = __match_any_sync(kAllLanes, r.slot >= 0 ? lane / p.num_topk : -1 - lane);
  const bool leads = r.slot >= 0 && (same_token & below) == 0;
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  const unsigned same_slot = __match_any_sync(kAllLanes, r.slot >= 0 ? r.slot : -1 - lane);
  if (r.slot >= 0) r.row = counters[r.slot] + __popc(same_slot & below);
  if (leads) r.arrival = counters[slots] + __popc(leaders & below);
  __syncwarp();
  if (r.slot >= 0 && (same_slot & below) == 0) counters[r.slot] += __popc(same_slot);
  if (lane == 0) counters[slots] += __popc(leaders);
  __syncwarp();
  return r;
}

// The head of a token's message: every lane its selection, the lane of selection 0 the arrival.
__device__ void write_head(const Params& p, std::byte* message, const Routed& r, int row, int arrival) {
  reinterpret_cast<std::int32_t*>(message + p.message.slots_at)[r.k] = r.slot;
  reinterpret_cast<std::int32_t*>(message + p.message.rows_at)[r.k] = row;
  if (r.k == 0) *reinterpret_cast<std::int32_t*>(message + p.message.src_token_at) = arrival;
}

// A block: which of our tokens go to one destination, in token order. Then says so, and how many of them there are.
__device__ void route_to(const Now& now, const Params& p, const Shared& shared, int dst, const Place& at) {
  __shared__ unsigned long long bad;  // lowest selection that does not exist
  const Common& common = p.common;
  const int me = common.rank, slots = p.first_copy[dst + 1] - p.first_copy[dst], keys = slots + 1;
  const int warps = route_warps(p.max_slots);
  const int of_step = 32 / p.num_topk, of_warp = of_step * kRouteSteps, of_batch = of_warp * warps;
  std::int32_t* const carry = shared.words;  // over the tokens so far
  std::int32_t* const counters = carry + keys;
  std::byte* const window = shared.peers.window(dst);
  if (threadIdx.x == 0) bad = ~0ull;
  if (at.warp == kLowLatencyWarps - 1) write_signature(now, window, at.lane);
  for (int i = static_cast<int>(threadIdx.x); i < keys; i += kLowLatencyThreads) carry[i] = 0;
  for (int batch = 0; batch < p.num_tokens; batch += of_batch) {
    const int left = p.num_tokens - batch;
    const int working = left < of_batch ? (left + of_warp - 1) / of_warp : warps;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < keys * working; i += kLowLatencyThreads) counters[i] = 0;
    __syncthreads();
    Routed routed[kRouteSteps];
    const int first = batch + at.warp * of_warp;
    if (at.warp < working) {
#pragma unroll
      for (int i = 0; i < kRouteSteps; ++i)
        routed[i] =
            route_step(p, shared.peers, counters + at.warp * keys, dst, first + i * of_step, slots, at.lane, &bad);
    }
    __syncthreads();
    for (int key = static_cast<int>(threadIdx.x); key < keys; key += kLowLatencyThreads) {
      std::int32_t sum = carry[key];
#pragma unroll 8
      for (int w = 0; w < working; ++w) {
        const std::int32_t count = counters[w * keys + key];
        counters[w * keys + key] = sum;
        sum += count;
      }
      carry[key] = sum;
    }
    __syncthreads();
    if (at.warp >= working) continue;
#pragma unroll
    for (int i = 0; i < kRouteSteps; ++i) {
      const Routed& r = routed[i];
      const unsigned of_token = __match_any_sync(kAllLanes, r.token >= 0 ? r.token : -1 - at.lane);
      const unsigned leader = __ballot_sync(kAllLanes, r.arrival >= 0) & of_token;
      const int arrival = __shfl_sync(kAllLanes, r.arrival, leader != 0 ? __ffs(leader) - 1 : at.lane);
      if (r.token < 0) continue;
      const int row = r.slot >= 0 ? r.row + counters[at.warp * keys + r.slot] : 0;
      write_head(p, message_of(now, p, window, me, r.token), r, row,
                 leader != 0 ? arrival + counters[at.warp * keys + slots] : -1);
    }
  }
  __syncthreads();
  std::int32_t* const tokens = announced_tokens_in(now, window, me);
  for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kLowLatencyThreads)
    tokens[common.num_ranks + slot] = carry[slot];
  if (threadIdx.x == 0) {
    tokens[dst] = carry[slots];
    count_sent(common, dst, static_cast<std::uint64_t>(carry[slots]) * p.message.bytes);
  }
  __syncthreads();  // the block's writes, before the fence of lanes 0 and 1
  plan::Words& words = words_in(now, window, me);
  if (at.warp != 0) return;
  if (bad == ~0ull) {
    __threadfence_system();
    auto* const word = static_cast<volatile std::uint64_t*>(at.lane == 0 ? &words.arrived : &words.announced);
    if (at.lane < 2) *word = now.epoch << 32 | static_cast<std::uint32_t>(at.lane == 0 ? p.num_tokens : kSame);
    return;
  }
  if (at.lane != 0) return;
  Announcement& mine = announcement_in(now, window, me);
  mine.bad_selection = static_cast<std::int64_t>(bad);
  mine.bad_expert = expert_of(p, static_cast<std::int64_t>(bad));
  publish(now, &words.announced, kBadExpert);
}

// Send
// ---------------------------------------------------------------------------------------------------------------------

enum class Rows { kAsTheyAre, kBf16, kFp16, kFp32 };

// A lane's share of a piece of a row that travels as it is.
struct PlainPiece {
  static constexpr int kVectors = 4;
  static constexpr int kBytes = kVectors * 512;
  uint4 v[kVectors];

  __device__ void load(const Params& p, int token, std::int64_t begin, std::int64_t end, int lane) {
    const std::byte* row = p.x + token * static_cast<std::int64_t>(p.shape.row_bytes);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t byte = begin + 512 * i + 16 * lane;
      if (byte < end) v[i] = __ldg(reinterpret_cast<const uint4*>(row + byte));
    }
  }
  // To every lane's `message` that is not null.
  __device__ void write(const Params& p, std::byte* message, std::int64_t begin, std::int64_t end, int lane) const {
    for (unsigned rest = __ballot_sync(kAllLanes, message != nullptr); rest != 0; rest &= rest - 1) {
      std::byte* const row = from_lane(message, __ffs(rest) - 1) + p.message.row_at;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t byte = begin + 512 * i + 16 * lane;
        if (byte < end) store16(row + byte, v[i]);
      }
    }
  }
};

// A lane's share of 1024 channels to be quantised: twice sixteen of them, eight lanes to a group.
template <class Number>
struct FloatPiece {
  static constexpr int kHalves = 2, kFours = 4, kChannels = 16;
  static constexpr int kBytes = kHalves * 32 * kChannels;  // on the wire
  using Four = typename Number::Four;
  Four v[kHalves][kFours];

  __device__ void load(const Params& p, int token, std::int64_t begin, std::int64_t end, int lane) {
    const std::byte* row = p.x + token * p.hidden * Number::kBytes;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const std::int64_t channel = begin + (32 * h + lane) * kChannels;
      constexpr int kVectors = kFours * static_cast<int>(sizeof(Four)) / 16;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        split(channel < end ? __ldg(reinterpret_cast<const uint4*>(row + channel * Number::kBytes) + i) : uint4{},
              v[h] + i * kFours / kVectors);
    }
  }
  __device__ static void split(uint4 vector, uint2* fours) {
    fours[0] = {vector.x, vector.y};
    fours[1] = {vector.z, vector.w};
  }
  __device__ static void split(uint4 vector, uint4* fours) { fours[0] = vector; }

  __device__ static std::uint32_t of_group(std::uint32_t largest) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    return largest;
  }

  __device__ void write(const Params& p, std::byte* message, std::int64_t begin, std::int64_t end, int lane) const {
    const unsigned all = __ballot_sync(kAllLanes, message != nullptr);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      std::uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kFours; ++i) largest = max(largest, Number::largest_bits(v[h][i]));
      largest = of_group(largest);
      const bool plain = __all_sync(kAllLanes, largest < static_cast<std::uint32_t>(plan::kFloatInfBits));
      if (!plain) {
        largest = 0;
        for (int i = 0; i < kFours; ++i) {
          float x[4];
          Number::widen(v[h][i], x);
          largest = max(largest, largest_number(x));
        }
        largest = of_group(largest);
      }
      const plan::Fp8Scaling scaling = plan::fp8_scaling(static_cast<std::int32_t>(largest), p.scale_kind);
      std::uint32_t code[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        float x[4];
        Number::widen(v[h][i], x);
        code[i] = encode4(x, scaling.factor, plain);
      }
      const std::int64_t channel = begin + (32 * h + lane) * kChannels;
      const std::int64_t group = channel / plan::kFp8Group;
      const bool packed = p.scale_kind == plan::Fp8Scale::kUe8m0;
      std::uint32_t word = __float_as_uint(scaling.scale);
      if (packed) {
        word = group * plan::kFp8Group < p.hidden ? plan::ue8m0_in_word(scaling.scale, group) : 0;
        word |= __shfl_xor_sync(kAllLanes, word, 8);
        word |= __shfl_xor_sync(kAllLanes, word, 16);
      }
      const std::int64_t at = packed ? group / plan::kUe8m0PerWord : group;
      const bool keeps = lane % (packed ? 32 : 8) == 0 && at < p.shape.num_scales && channel < end;
      for (unsigned rest = all; rest != 0; rest &= rest - 1) {
        std::byte* const to = from_lane(message, __ffs(rest) - 1);
        if (channel < end) store16(to + p.message.row_at + channel, {code[0], code[1], code[2], code[3]});
        if (keeps) reinterpret_cast<std::uint32_t*>(to + p.message.scales_at)[at] = word;
      }
    }
  }
};

template <Rows kRows>
struct PieceOf {
  using Type = PlainPiece;
};
template <>
struct PieceOf<Rows::kBf16> {
  using Type = FloatPiece<Bf16>;
};
template <>
struct PieceOf<Rows::kFp16> {
  using Type = FloatPiece<Fp16>;
};
template <>
struct PieceOf<Rows::kFp32> {
  using Type = FloatPiece<Fp32>;
};

// A warp: what goes beside a token's row, with its first part; the caller's scales with theirs. One destination.
__device__ void write_beside(const Params& p, std::byte* message, int dst, int token, int part, int my_rank, int lane) {
  if (p.scales != nullptr) {
    const int first = part * p.parts.scales;
    const int end = min(first + p.parts.scales, p.shape.num_scales);
    auto* const scales = reinterpret_cast<std::int32_t*>(message + p.message.scales_at);
    for (int word = first + lane; word < end; word += 32)
      scales[word] = p.scales[token * p.scale_strides[0] + word * p.scale_strides[1]];
  }
  if (part != 0) return;
  if (p.shape.topk_weights && lane < p.num_topk)
    reinterpret_cast<float*>(message + p.message.weights_at)[lane] =
        my_rank == dst || !p.mask_topk_weights ? p.topk_weights[std::int64_t{token} * p.num_topk + lane] : 0.0f;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* src = reinterpret_cast<const std::int32_t*>(p.side[i]) + std::int64_t{token} * words;
    auto* dst_words = reinterpret_cast<std::int32_t*>(message + p.message.side_at[i]);
    for (int word = lane; word < words; word += 32) dst_words[word] = src[word];
  }
}

// A warp: one part of one token to all its ranks. `piece` and `expert` are loaded already.
template <Rows kRows>
__device__ void send_unit(const Now& now, const Params& p, const Shared& shared, const Flags& flags,
                          typename PieceOf<kRows>::Type& piece, std::int64_t expert, int unit, int lane) {
  using Piece = typename PieceOf<kRows>::Type;
  const int me = p.common.rank, token = unit / p.parts.count, part = unit % p.parts.count;
  const int rank = replica_of(p, shared.peers, expert, token).rank;
  const unsigned same = __match_any_sync(kAllLanes, rank);
  const bool leads = rank >= 0 && (same & ((1u << lane) - 1)) == 0;
  std::byte* const message = leads ? message_of(now, p, shared.peers.window(rank), me, token) : nullptr;
  const std::int64_t end = part_end(p, part);
  for (std::int64_t byte = part_begin(p, part);;) {
    piece.write(p, message, byte, end, lane);
    byte += Piece::kBytes;
    if (byte >= end) break;
    piece.load(p, token, byte, end, lane);
  }
  if (part == 0 || p.scales != nullptr)
    for (unsigned rest = __ballot_sync(kAllLanes, leads); rest != 0; rest &= rest - 1) {
      const int from = __ffs(rest) - 1;
      write_beside(p, from_lane(message, from), __shfl_sync(kAllLanes, rank, from), token, part, rank, lane);
    }
  if (leads) flags.add(flag_of(now, shared.peers.window(rank), flag_number(p, me, token, part)));
}

// Phases open, route, send. False: not all was sent.
template <Rows kRows>
__device__ bool send(const Now& now, const Params& p, const Shared& shared, const Flags& flags, const Place& at) {
  using Piece = typename PieceOf<kRows>::Type;
  const int ranks = p.common.num_ranks;
  const int units = p.num_tokens * p.parts.count;
  int unit = at.number(ranks);  // blocks that route take rows last
  Piece piece;
  std::int64_t expert = -1;
  const auto look = [&] {  // starts the loads of a unit's first piece
    const int token = unit / p.parts.count, part = unit % p.parts.count;
    piece.load(p, token, part_begin(p, part), part_end(p, part), at.lane);
    expert = at.lane < p.num_topk ? expert_of(p, std::int64_t{token} * p.num_topk + at.lane) : -1;
  };
  if (unit < units) look();
  shared.peers.load(p.common);
  flags.clear();
  if (!open_operation(now, p.window, p.ticket, at, (p.phases & kReceive) != 0)) return false;
  for (int dst = at.block; dst < ranks; dst += at.blocks) {
    if (shared.peers.active(dst)) route_to(now, p, shared, dst, at);
    __syncthreads();
  }
  const int rounds = (units + at.warps() * Flags::kUnits - 1) / (at.warps() * Flags::kUnits);
  for (int round = 0; round < rounds; ++round, flags.raise(now, at))
    for (int i = 0; i < Flags::kUnits && unit < units; ++i) {
      send_unit<kRows>(now, p, shared, flags, piece, expert, unit, at.lane);
      unit += at.warps();
      if (unit < units) look();
    }
  return true;
}

// Gather
// ---------------------------------------------------------------------------------------------------------------------

// What a block knows of all that comes, in shared memory.
struct Gathered {
  std::int32_t* tokens;         // [ranks]: that a source has, wherever they go
  std::int32_t* first_arrival;  // [ranks + 1]
  std::int32_t* slot_first;     // [slots + 1]
  std::int32_t* slot_rows;      // [slots]
  std::int32_t* rows_before;    // [ranks][slots]: rows of earlier sources in the slot
};

__device__ Gathered gathered_of(const Params& p, const Shared& shared) {
  const int ranks = p.common.num_ranks;
  Gathered g;
  g.tokens = shared.words;
  g.first_arrival = g.tokens + ranks;
  g.slot_first = g.first_arrival + ranks + 1;
  g.slot_rows = g.slot_first + p.num_slots + 1;
  g.rows_before = g.slot_rows + p.num_slots;
  return g;
}

__host__ __device__ std::size_t gathered_words(int ranks, int slots) {
  return 2 * static_cast<std::size_t>(ranks) + 1 + 2 * static_cast<std::size_t>(slots) + 1 +
         static_cast<std::size_t>(ranks) * slots;
}

// One warp for each source: its call is ours, and this is what it brings; its arrivals in first_arrival[src].
__device__ bool hear(const Now& now, const Params& p, const Gathered& g, int src, int lane) {
  const int me = p.common.rank;
  std::uint32_t tokens = 0;
  bool heard = await_word(now, src, &words_in(now, p.window, src).arrived, tokens, blockIdx.x == 0, lane);
  const std::int64_t field = load_field(now, p.window, src, lane);
  const std::int32_t* const announced = announced_tokens_in(now, p.window, src);
  const std::int32_t arrivals = __ldcg(announced + me);
#pragma unroll 4
  for (int slot = lane; slot < p.num_slots; slot += 32)
    g.rows_before[src * p.num_slots + slot] = __ldcg(announced + p.common.num_ranks + slot);
  heard = heard && is_our_call(now, src, field, lane);
  if (lane == 0) {
    g.tokens[src] = heard ? static_cast<std::int32_t>(tokens) : 0;
    g.first_arrival[src] = heard ? arrivals : 0;
  }
  return heard;
}

// A warp: values[0 .. count) become what comes before each; values[count] all.
__device__ void prefix_by_warp(std::int32_t* values, int count, int lane) {
  std::int32_t base = 0;
  for (int first = 0; first < count; first += 32) {
    const std::int32_t value = first + lane < count ? values[first + lane] : 0;
    std::int32_t sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::int32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (first + lane < count) values[first + lane] = base + sum - value;
    base += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) values[count] = base;
}

// Every block for itself: where the rows of each source and slot begin, as plan::make_row_plan has it.
__device__ bool gather(const Now& now, const Params& p, const Shared& shared, const Gathered& g, const Place& at) {
  const int ranks = p.common.num_ranks, slots = p.num_slots;
  bool good = true;
  for (int src = at.warp; src < ranks; src += kLowLatencyWarps) {
    if (shared.peers.active(src)) {
      good = hear(now, p, g, src, at.lane) && good;
    } else {
      for (int slot = at.lane; slot < slots; slot += 32) g.rows_before[src * slots + slot] = 0;
      if (at.lane == 0) g.tokens[src] = g.first_arrival[src] = 0;
    }
  }
  if (!__syncthreads_and(good)) return false;
  const std::int64_t padded_rows = std::int64_t{ranks} * p.max_tokens_per_rank;
  for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kLowLatencyThreads) {
    std::int32_t sum = 0;
    for (int src = 0; src < ranks; ++src) {
      const std::int32_t rows = g.rows_before[src * slots + slot];
      g.rows_before[src * slots + slot] = sum;
      sum += rows;
    }
    g.slot_rows[slot] = sum;
    const std::int32_t aligned = (sum + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
    g.slot_first[slot] = p.layout == OutputLayout::kPadded ? slot * static_cast<std::int32_t>(padded_rows) : aligned;
    if (p.layout == OutputLayout::kPadded && sum > padded_rows) {  // duplicate ids only
      report(now, Fault::kFullSlot, p.common.rank, sum, padded_rows);
      good = false;
    }
  }
  if (at.warp == kLowLatencyWarps - 1) prefix_by_warp(g.first_arrival, ranks, at.lane);
  if (!__syncthreads_and(good)) return false;
  if (at.warp == 0) {
    if (p.layout != OutputLayout::kPadded) prefix_by_warp(g.slot_first, slots, at.lane);
    if (p.layout == OutputLayout::kPadded && at.lane == 0)
      g.slot_first[slots] = slots * static_cast<std::int32_t>(padded_rows);
  }
  __syncthreads();
  return true;
}

// Block 0, for the handle and the statistics.
__device__ void write_tables(const Params& p, const Gathered& g) {
  const int ranks = p.common.num_ranks, slots = p.num_slots, first = static_cast<int>(threadIdx.x);
  for (int i = first; i <= ranks; i += kLowLatencyThreads) p.tables.first_arrival[i] = g.first_arrival[i];
  for (int i = first; i < slots; i += kLowLatencyThreads) {
    p.tables.slot_rows[i] = g.slot_rows[i];
    count_received(p.common, i, g.slot_rows[i]);
  }
  for (int i = first; i <= slots; i += kLowLatencyThreads) p.tables.slot_first_row[i] = g.slot_first[i];
  for (int i = first; i < ranks * ranks; i += kLowLatencyThreads)
    p.tables.tokens_between[i] =
        i % ranks == p.common.rank ? g.first_arrival[i / ranks + 1] - g.first_arrival[i / ranks] : 0;
  if (p.tables.source_range == nullptr) return;
  for (int i = first; i < slots * ranks; i += kLowLatencyThreads) {
    const int slot = i / ranks, src = i % ranks;
    const std::int32_t begin = g.rows_before[src * slots + slot];
    const std::int32_t end = src + 1 < ranks ? g.rows_before[(src + 1) * slots + slot] : g.slot_rows[slot];
    p.tables.source_range[i] = std::int64_t{begin} << 32 | (end - begin);
  }
}

// Place
// ---------------------------------------------------------------------------------------------------------------------

// A token that comes here, as a warp holds it: lane k its selection k.
struct Arrived {
  const std::byte* message;
  int src, token;
  std::int32_t arrival;  // -1: it does not come
  std::int32_t slot;     // of the lane's selection; -1: not here
  std::int32_t row;      // where it goes
};

__device__ Arrived read_head(const Now& now, const Params& p, const Gathered& g, std::byte* window, int src, int token,
                             int lane) {
  Arrived a{message_of(now, p, window, src, token), src, token, -1, -1, -1};
  const std::int32_t number = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.src_token_at));
  std::int32_t row = 0;
  if (lane < p.num_topk) {
    a.slot = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.slots_at) + lane);
    row = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.rows_at) + lane);
  }
  if (number < 0) return a;
  a.arrival = g.first_arrival[src] + number;
  if (a.slot >= 0)
    a.row = p.layout == OutputLayout::kByRank ? a.arrival
                                              : g.slot_first[a.slot] + g.rows_before[src * p.num_slots + a.slot] + row;
  return a;
}

// All that comes once per token.
__device__ void place_beside(const Params& p, const Arrived& a, int lane) {
  const bool by_rank = p.layout == OutputLayout::kByRank;
  const std::int64_t entry = std::int64_t{a.arrival} * p.num_topk + lane;
  if (lane < p.num_topk) {
    std::byte* const ids = p.block + p.at.topk_idx_at;
    if (p.shape.topk_idx_bytes == 8) {
      reinterpret_cast<std::int64_t*>(ids)[entry] = a.slot;
    } else {
      reinterpret_cast<std::int32_t*>(ids)[entry] = a.slot;
    }
    p.tables.arrival_row[entry] = a.row;
    if (p.tables.row_token != nullptr && a.row >= 0) p.tables.row_token[a.row] = a.token;
    if (p.shape.topk_weights) {
      const float weight = __ldcg(reinterpret_cast<const float*>(a.message + p.message.weights_at) + lane);
      auto* const weights = reinterpret_cast<float*>(p.block + p.at.topk_weights_at);
      p.tables.arrival_weights[entry] = weight;
      if (by_rank) weights[entry] = weight;
      if (!by_rank && a.row >= 0) weights[a.row] = weight;
    }
  }
  if (lane == 0) p.tables.src_token[a.arrival] = a.token;
  for (int i = 0; i < p.shape.num_side; ++i) {
    const auto words = static_cast<int>(p.shape.side_bytes[i] / 4);
    const auto* from = reinterpret_cast<const std::int32_t*>(a.message + p.message.side_at[i]);
    auto* to = reinterpret_cast<std::int32_t*>(p.block + p.at.side_at[i]) + std::int64_t{a.arrival} * words;
    for (int word = lane; word < words; word += 32) to[word] = __ldcg(from + word);
  }
}

// A part of a row and its scales, to each row that the lanes of `targets` name.
__device__ void place_part(const Params& p, const Arrived& a, unsigned targets, int part, int lane) {
  constexpr int kVectors = PlainPiece::kVectors;
  const auto row_bytes = static_cast<std::int64_t>(p.shape.row_bytes);
  const std::int64_t end = part_end(p, part);
  const std::byte* const from = a.message + p.message.row_at;
  for (std::int64_t piece = part_begin(p, part); piece < end; piece += PlainPiece::kBytes) {
    uint4 v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t byte = piece + 512 * i + 16 * lane;
      if (byte < end) v[i] = load16(from + byte);
    }
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      const std::int64_t row = __shfl_sync(kAllLanes, a.row, __ffs(rest) - 1);
      std::byte* const to = p.block + p.at.x_at + row * row_bytes;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t byte = piece + 512 * i + 16 * lane;
        if (byte < end) store16(to + byte, v[i]);
      }
    }
  }
  const int first_scale = part * p.parts.scales;
  const int end_scale = min(first_scale + p.parts.scales, p.shape.num_scales);
  for (int word = first_scale + lane; word - lane < end_scale; word += 32) {
    std::int32_t value = 0;
    if (word < end_scale) value = __ldcg(reinterpret_cast<const std::int32_t*>(a.message + p.message.scales_at) + word);
    for (unsigned rest = targets; rest != 0; rest &= rest - 1) {
      const std::int64_t row = __shfl_sync(kAllLanes, a.row, __ffs(rest) - 1);
      auto* const to = reinterpret_cast<std::int32_t*>(p.block + p.at.scales_at) + p.at.first_scale(row);
      if (word < end_scale) to[word * p.at.scale_column_stride] = value;
    }
  }
}

// Rows that nobody writes: padding between experts is zero, ids behind the last arrival say "nobody".
__device__ void clear_unwritten(const Params& p, const Gathered& g, const Place& at) {
  const int number = at.number(), warps = at.warps();
  for (int slot = number; p.layout == OutputLayout::kByExpert && slot < p.num_slots; slot += warps) {
    for (std::int64_t row = g.slot_first[slot] + g.slot_rows[slot]; row < g.slot_first[slot + 1]; ++row) {
      std::byte* const x = p.block + p.at.x_at + row * static_cast<std::int64_t>(p.shape.row_bytes);
      for (std::int64_t byte = 16 * at.lane; byte < static_cast<std::int64_t>(p.shape.row_bytes); byte += 512)
        store16(x + byte, uint4{});
      auto* const scales = reinterpret_cast<std::int32_t*>(p.block + p.at.scales_at) + p.at.first_scale(row);
      for (int word = at.lane; word < p.shape.num_scales; word += 32) scales[word * p.at.scale_column_stride] = 0;
      if (p.shape.topk_weights && at.lane == 0) reinterpret_cast<float*>(p.block + p.at.topk_weights_at)[row] = 0;
    }
  }
  const std::int64_t words = p.shape.topk_idx_bytes / 4 * p.num_topk;
  auto* const ids = reinterpret_cast<std::int32_t*>(p.block + p.at.topk_idx_at);
  for (std::int64_t i = g.first_arrival[p.common.num_ranks] * words + number * 32 + at.lane;
       i < p.most_arrivals * words; i += std::int64_t{warps} * 32)
    ids[i] = -1;
}

// Phases gather, place. False: not all has come.
__device__ bool receive(const Now& now, const Params& p, const Shared& shared, const Place& at) {
  const Gathered g = gathered_of(p, shared);
  if (!gather(now, p, shared, g, at)) return false;
  const int ranks = p.common.num_ranks;
  std::byte* const window = p.window;
  int tokens = 0;
  for (int src = 0; src < ranks; ++src) tokens += g.tokens[src];
  bool good = true;
  for (int unit = at.number(); unit < tokens * p.parts.count; unit += at.warps()) {
    const int part = unit % p.parts.count;
    int src = 0, token = unit / p.parts.count;
    while (token >= g.tokens[src]) token -= g.tokens[src++];
    std::uint32_t* const flag = flag_of(now, window, flag_number(p, src, token, part));
    int came = 0;
    if (at.lane == 0) came = ptx::load_acquire_system(flag) == static_cast<std::uint32_t>(now.epoch);
    const Arrived a = read_head(now, p, g, window, src, token, at.lane);
    if (a.arrival < 0) continue;
    if (at.lane == 0 && came == 0) came = await_flag(now, flag, src);
    came = __shfl_sync(kAllLanes, came, 0);
    good = good && came != 0;
    unsigned targets = __ballot_sync(kAllLanes, a.row >= 0);
    if (p.layout == OutputLayout::kByRank) targets &= ~targets + 1;  // one row, however many selections
    if (came == 0) continue;
    place_part(p, a, targets, part, at.lane);
    if (part == 0) place_beside(p, a, at.lane);
  }
  clear_unwritten(p, g, at);
  if (at.block == 0) write_tables(p, g);
  return good;
}

}  // namespace

template <Rows kRows>
__global__ void __launch_bounds__(kLowLatencyThreads, 1) low_latency_dispatch(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ std::uint32_t* to_raise[Flags::kMost];
  __shared__ int num_to_raise;
  const Place at;
  const Shared shared = shared_of(p, memory);
  const bool sends = (p.phases & kSend) != 0;
  const Now now(p.common, sends ? p.common.state->epoch + 1 : *p.ticket);
  bool good = true;
  if (sends) {
    good = send<kRows>(now, p, shared, {to_raise, &num_to_raise}, at);
  } else {
    open_receiving(now, at);
    shared.peers.load(p.common);
  }
  if ((p.phases & kReceive) != 0) {
    __syncthreads();
    good = receive(now, p, shared, at) && good;
  }
  if (!good) abandon_operation(now);
}

__global__ void abandon(const __grid_constant__ AbandonParams p) {
  const Now now(p.common, *p.ticket);
  tell_peers(now, p.common.state->epoch, 0, static_cast<int>(threadIdx.x));
  if (threadIdx.x != 0) return;
  abandon_operation(now);
  p.common.state->ended[now.epoch % plan::kOperationsInFlight] = now.epoch;
}

const void* low_latency_dispatch_kernel(bool quantize, DType dtype) {
  if (!quantize) return reinterpret_cast<const void*>(&low_latency_dispatch<Rows::kAsTheyAre>);
  if (dtype == DType::kBf16) return reinterpret_cast<const void*>(&low_latency_dispatch<Rows::kBf16>);
  if (dtype == DType::kFp16) return reinterpret_cast<const void*>(&low_latency_dispatch<Rows::kFp16>);
  return reinterpret_cast<const void*>(&low_latency_dispatch<Rows::kFp32>);
}

const void* abandon_kernel() { return reinterpret_cast<const void*>(&abandon); }

std::size_t low_latency_shared_bytes(const Params& p) {
  const std::size_t routing = (static_cast<std::size_t>(route_warps(p.max_slots)) + 1) * (p.max_slots + 1);
  const std::size_t gathering = gathered_words(p.common.num_ranks, p.num_slots);
  return sizeof(Peer) * p.common.num_ranks + 4 * (routing > gathering ? routing : gathering);
}

void launch_low_latency_dispatch(const Params& params, int blocks, cudaStream_t stream) {
  Params copy = params;
  void* arguments[] = {&copy};
  cudaLaunchKernel(low_latency_dispatch_kernel(params.quantize, params.x_dtype), dim3(static_cast<unsigned>(blocks)),
                   dim3(kLowLatencyThreads), arguments, low_latency_shared_bytes(params), stream);
}

void launch_abandon(const AbandonParams& params, cudaStream_t stream) { abandon<<<1, 32, 0, stream>>>(params); }

}  // namespace deep_ep::cuda
