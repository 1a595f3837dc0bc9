// SPDX-License-Identifier: MIT
// Dispatch and combine for mixture-of-experts layers: open a Buffer over a group of ranks, send tokens to the ranks
// that host their experts, bring the results back summed. Open this header first.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "deep_ep/bootstrap.h"
#include "deep_ep/config.h"
#include "deep_ep/error.h"
#include "deep_ep/tensor.h"

namespace deep_ep {

/// Whether this library was built with that backend.
bool has_backend(BackendKind kind) noexcept;

/// The collective calls of a Buffer.
enum class Operation : std::uint8_t { kDispatch, kCombine, kLowLatencyDispatch, kLowLatencyCombine };

/// "dispatch", "combine", "low_latency_dispatch", "low_latency_combine": as error messages print it.
const char* name(Operation operation) noexcept;

/// How a receiver's rows are arranged. "Slot" is the position of an expert among those that the rank hosts.
enum class OutputLayout : std::uint8_t {
  kByRank,    // one row per token that selected anything here, in order (source rank, source token)
  kByExpert,  // one row per (token, expert here): grouped by slot, each group padded with zeros to expert_alignment
              // rows
  kPadded,  // [slots, num_ranks * max_tokens_per_rank, hidden]: a block per slot, its valid rows first. Only duplicate
            // ids of one token can bring a slot more rows than it has; the call is then refused
};

/// Where the scales of received FP8 rows go.
enum class ScaleOrder : std::uint8_t {
  kRowMajor,     // [rows, num_scales], contiguous
  kColumnMajor,  // same shape, strides (1, rows rounded up to 4): as TMA loads them. Padded: per slot, strides (1, rows
                 // of a slot)
};

/// Quantise BF16, FP16 or FP32 rows to FP8 E4M3 while they are sent: one scale per 128 channels, scale =
/// max(1e-4, max|x|) / 448. hidden is a multiple of 16.
struct Fp8Options {
  bool round_scale = false;  // round scales up to powers of two
  bool ue8m0 = false;        // store scales as biased exponents, four to an int32, the first in the lowest byte; needs
                             // round_scale
};

/// What one dispatch made that later calls need: to combine, to dispatch again along the same routes, to go backward.
/// Plain data in tensors, immutable; may be kept, copied field by field, and used any number of times in any order.
struct Handle {
  OutputLayout layout = OutputLayout::kByRank;
  int num_ranks = 0;
  int num_topk = 0;
  int num_experts = 0;
  int expert_alignment = 1;
  int max_tokens_per_rank = 0;  // kPadded only
  bool low_latency = false;     // made by low_latency_dispatch
  int cuda_device = -1;         // where its tensors are: a GPU, or -1: ordinary memory
  bool topk_idx_64 = true;
  std::shared_ptr<const Placement> placement;

  // As a source: where this rank's tokens went.
  std::int64_t num_tokens = 0;
  Tensor dst_rank;  // i32 [num_tokens, num_topk]; -1: no selection
  Tensor dst_row;   // i32 [num_tokens, num_topk]; row on that rank. kByRank: all selections on one rank share the row.
                    // Not given after low_latency_dispatch: there the receiver alone knows
  Tensor dst_arrival;  // i32 [num_tokens, num_topk]; arrival number on that rank. Given where dst_row is

  // As a receiver: what came. An arrival is a (source rank, source token) pair; arrivals are numbered in that order.
  std::int64_t num_rows = 0;      // rows of the output tensors: exact, or the bound of a bounded call
  std::int64_t num_arrivals = 0;  // likewise; kByRank: num_rows
  Tensor first_arrival;   // i32 [num_ranks + 1]: arrivals of rank r are first_arrival[r] .. first_arrival[r + 1] - 1
  Tensor src_token;       // i32 [num_arrivals]: token number on its source rank
  Tensor arrival_row;     // i32 [num_arrivals, num_topk]: row of selection k here, -1: not here. Not given for kByRank
                          // of high throughput, where it is the arrival itself
  Tensor slot_rows;       // i32 [slots]: real rows (kByRank: selections) of each hosted expert
  Tensor slot_first_row;  // i32 [slots + 1]: first row of each; kByRank: the prefix of slot_rows, each aligned
  std::vector<std::int32_t> counted_first_row;  // CUDA buffers: slot_first_row as the host read it; empty where the
                                                // dispatch was bounded
  Tensor tokens_between;  // i32 [num_ranks, num_ranks]: distinct tokens from rank i to rank j; low latency: column
                          // `rank` only
  // kPadded of low latency only.
  Tensor row_token;     // i32 [slots, num_ranks * max_tokens_per_rank]: the source's token number of each row that came
  Tensor source_range;  // i64 [slots, num_ranks]: (first row in the slot << 32) | rows of that source
  // Low latency on host buffers only.
  Tensor home_slot;         // i32 [num_tokens, num_topk]: where the row of each selection comes home; -1: none
  Tensor first_slot_here;   // i32 [num_ranks + 1]: from where on the rows of each rank do
  Tensor first_slot_there;  // i32 [num_ranks]: from where on this rank's rows come home at each source
  // Low latency on CUDA buffers only.
  Tensor arrival_weights;  // f32 [num_arrivals, num_topk]: where the dispatch carried weights
  Tensor own_row;          // i32 [num_tokens, num_topk]: arrival_row of this rank's own tokens that stay here; those of
                           // other tokens are not written
  Tensor own_weights;      // f32 [num_tokens, num_topk]: arrival_weights, likewise
};

/// Arguments of dispatch() and low_latency_dispatch(). Every tensor is read until the call returns; with a stream,
/// until that stream is done with the call.
///
/// All ranks bring rows (as they travel), scales and side tensors of the same dtypes and widths, ids of one dtype,
/// weights or none, a handle or none, and the same num_topk, num_experts, placement, layout, expert_alignment,
/// max_tokens_per_rank and scale_order; the call is refused otherwise. All else, and the number of tokens, is each
/// rank's own.
struct DispatchInput {
  TensorView x;       // [num_tokens, hidden], contiguous, any dtype; a row is a multiple of 16 bytes
  TensorView scales;  // [num_tokens, num_scales] fp32 or i32, any strides; for rows that the caller quantised; optional
  TensorView topk_idx;      // [num_tokens, num_topk] i32 or i64, contiguous; expert numbers, negative: no selection;
                            // duplicates allowed. num_topk is 1 .. 1024, in low latency on CUDA buffers 1 .. 32
  TensorView topk_weights;  // [num_tokens, num_topk] fp32, contiguous; optional
  std::vector<TensorView> side;  // at most 8 more tensors to travel with each token: [num_tokens, n], contiguous, rows
                                 // a multiple of 4 bytes

  int num_experts = 0;
  std::shared_ptr<const Placement> placement;  // none: Placement::even(num_experts, num_ranks)
  OutputLayout layout = OutputLayout::kByRank;
  int expert_alignment = 1;     // rows of each expert's group are padded to a multiple of this
  int max_tokens_per_rank = 0;  // needed by kPadded and by low latency: no rank brings more; equal on all ranks
  std::optional<Fp8Options> fp8;
  ScaleOrder scale_order = ScaleOrder::kRowMajor;
  bool mask_topk_weights = true;  // kByRank: received weights of selections that live elsewhere are 0, else as sent

  /// 0: output tensors have exactly the rows that came. Otherwise they have this many, valid rows first, and the counts
  /// are only in the handle's tensors; this rank refuses the exchange if more would come. High throughput only, and
  /// not for kPadded.
  std::int64_t max_rows = 0;

  /// Route as this earlier dispatch did: then topk_idx, num_experts, placement, layout and alignment must be left out,
  /// and nothing is counted. x may have another dtype or width. High throughput only.
  std::shared_ptr<const Handle> handle;

  /// Low latency: a rank that stays silent until the deadline is masked from then on (set_masked) and brings nothing to
  /// this operation, which goes on without it. Otherwise receive() throws kTimeout. CUDA buffers then send and receive
  /// in kernels of their own, also with at_once; a rank that falls silent in the midst of its sending is a timeout.
  bool mask_silent = false;

  std::chrono::milliseconds timeout{0};  // 0: the buffer's
  int num_workers = 0;                   // at most this many threads (CUDA: SMs) for this call; 0: the buffer's

  /// CUDA buffers: the call is enqueued here and its results are there in the order of this stream. Null: it runs on
  /// the buffer's own stream and is complete when the call returns.
  Stream stream = nullptr;
  /// Low latency: receive() follows at once. CUDA buffers then send and receive in one kernel.
  bool at_once = false;
};

/// Result of a dispatch. The tensors live in the buffer's arena until the last copy is dropped, also beyond close();
/// where the arena is full, in ordinary memory.
struct DispatchOutput {
  Tensor x;             // [num_rows, hidden], or [slots, num_ranks * max_tokens_per_rank, hidden] for kPadded
  Tensor scales;        // [num_rows, num_scales] (kPadded: three dimensions) with FP8 or caller's scales
  Tensor topk_idx;      // [num_arrivals, num_topk], dtype as given: slot here, -1 elsewhere. Not with a cached handle
  Tensor topk_weights;  // kByRank: [num_arrivals, num_topk]; else one per row: [num_rows] or [slots, num_ranks *
                        // max_tokens_per_rank]
  std::vector<Tensor> side;  // [num_arrivals, n] each
  std::shared_ptr<const Handle> handle;
};

/// The order in which combine adds, a value that host, CUDA and tests read alike. A contribution is one row that came
/// back: one per (token, rank) for kByRank, one per selection otherwise. Sums are FP32; each weighted add is one fused
/// multiply-add.
struct SumOrder {
  enum class Key : std::uint8_t {
    kRank,  // ranks ascending, inside a rank selections ascending
    kTopK,  // a rank (or node) takes the place of its highest selection; selections ascending
  };
  Key key = Key::kRank;
  bool round_per_rank = false;  // contributions of one rank are first summed and rounded to x's dtype
  bool round_per_node = false;  // then those of one logical node likewise
  bool bias_first = true;       // the final sum starts from bias 0 + bias 1, else they are added last

  static constexpr SumOrder by_rank() { return {}; }
  static constexpr SumOrder by_rank_and_node() { return {Key::kRank, false, true, true}; }
  static constexpr SumOrder by_topk() { return {Key::kTopK, false, false, true}; }
  bool operator==(const SumOrder&) const = default;
};

/// How top-k weights that come back with kByRank rows of high throughput are joined. Everywhere else each has one
/// owner.
enum class WeightsHome : std::uint8_t {
  kSumOverRanks,  // entry k of every rank that received the token, added in rank order
  kFromOwner,     // entry k of the rank that took selection k
};

/// How rows cross in a low-latency combine. The home reads what came as rows of their own type again and sums these, so
/// the result is that of a plain combine of the rows as they come back. Blocks of 128 channels; the last may be
/// shorter. The same bits on every backend and instruction set.
enum class WireFormat : std::uint8_t {
  kAsIs,
  kLogFmt10,  // 10 bits a channel, 4 bytes a block: 64 % of BF16. A value comes back within 1.6 % (0.0985 % for each
              // octave from the smallest to the largest of its block), and is then rounded to the rows' type; what is
              // less than 2^-16 of the largest may come back as 0, subnormal numbers within 1.6 % of 2^-126. Zeros,
              // infinities and NaNs come back as such; a BF16 block that spans less than 3.9 octaves as it was
  kFp8,       // E4M3, 8 bits a channel, a scale of 4 bytes a block, as Fp8Options{}: 52 % of BF16. A value comes back
              // within 1/16, and is then rounded; what is less than 2^-14 of a block's largest within 2^-18 of that (of
              // 1e-4, where that is more). A block that holds an infinity comes back as NaNs
};

/// "as is", "LogFMT-10", "fp8": as error messages print it.
const char* name(WireFormat format) noexcept;

/// Arguments of combine() and low_latency_combine(). Every tensor is read until the call returns; for low latency,
/// weights, bias and out (with at_once also x) are used until receive() returns. With a stream: until that stream is
/// done with the call.
///
/// All ranks bring rows of the same dtype and width, and topk_weights or none; the call is refused otherwise. order,
/// weights, bias and out are those of each token's home.
struct CombineInput {
  /// Rows in the arrangement that the dispatch gave: [num_rows, hidden], kPadded three dimensions. bf16, fp16 or fp32,
  /// contiguous. High throughput: memory of Buffer::allocate, and dispatch outputs themselves, are read in place; other
  /// memory is staged once. Low latency: see zero_copy. May be left out where only topk_weights travel.
  TensorView x;
  std::shared_ptr<const Handle> handle;
  /// Travel home beside the rows: the gradient of the dispatched weights. Shape of DispatchOutput::topk_weights;
  /// optional.
  TensorView topk_weights;
  WeightsHome weights_home = WeightsHome::kSumOverRanks;
  /// Factors of a weighted sum: [num_tokens, num_topk] fp32, at the token's home. Not for kByRank, whose rows are sums
  /// already.
  TensorView weights;
  std::array<TensorView, 2> bias;  // [num_tokens, hidden], dtype of x; optional
  SumOrder order;
  TensorView out;  // [num_tokens, hidden], contiguous, dtype of x: written instead of a new tensor; optional

  /// Low latency: x, where it is memory of Buffer::allocate or a dispatch output, stays unchanged until every rank has
  /// received this operation. Then it is read in place; otherwise the send copies it. The tensor itself may be dropped
  /// after the send: its memory is kept as long as a peer reads it. Only host buffers make use of it.
  bool zero_copy = false;
  bool mask_silent = false;  // as in DispatchInput
  /// Low latency, with order.round_per_rank: the rank that computed a token's rows adds them up and sends one row.
  /// `weights`, where given, must be the topk_weights that the dispatch carried. Equal on all ranks. The same bits come
  /// out as without; only CUDA buffers save the traffic.
  bool pre_reduce = false;
  /// Low latency, BF16 and FP16, not with pre_reduce: how the rows cross. topk_weights cross as they are. Equal on all
  /// ranks.
  WireFormat wire = WireFormat::kAsIs;

  std::chrono::milliseconds timeout{0};
  int num_workers = 0;
  Stream stream = nullptr;  // as in DispatchInput
  bool at_once = false;     // likewise. Host buffers then read a rank's rows of its own tokens where they lie
};

/// Result of a combine.
struct CombineOutput {
  Tensor x;             // [num_tokens, hidden]; a token that was sent nowhere: its biases, or 0
  Tensor topk_weights;  // [num_tokens, num_topk] fp32 where topk_weights travelled; 0 where there was no selection
};

/// Who gets how much, before anything is sent. Computed locally.
struct DispatchLayout {
  Tensor tokens_per_rank;    // i32 [num_ranks]: tokens with a selection there, each counted once
  Tensor tokens_per_node;    // i32 [num_nodes]
  Tensor tokens_per_expert;  // i32 [num_experts]: selections, duplicates counted
  Tensor is_token_in_rank;   // bool [num_tokens, num_ranks]
};

/// A low-latency operation whose data is on its way. receive() may be called on any thread, tickets in any order.
template <typename Output>
class Ticket {
 public:
  class Receiver {
   public:
    virtual ~Receiver() = default;
    virtual Output receive() = 0;
    virtual const Output* promised() const { return nullptr; }
  };
  Ticket() = default;
  explicit Ticket(std::unique_ptr<Receiver> receiver) : receiver_(std::move(receiver)) {}
  /// Waits for the data and finishes the operation. Once. Throws as the operation itself does.
  /// A ticket that is dropped instead keeps its slots until its data has come; the result is lost, nothing else.
  Output receive() {
    if (!receiver_)
      throw Error(ErrorCode::kInvalidArgument, "ticket: receive() was called before, or there is no operation");
    return std::exchange(receiver_, nullptr)->receive();
  }
  bool valid() const { return receiver_ != nullptr; }
  /// The tensors that receive() will return, known before they are filled: on CUDA buffers all, on host buffers of a
  /// kPadded dispatch x, scales, and of the handle slot_rows, row_token and source_range. Null where they are not
  /// known, and after receive().
  const Output* promised() const { return receiver_ ? receiver_->promised() : nullptr; }

 private:
  std::unique_ptr<Receiver> receiver_;
};

/// Counters since the buffer opened or since reset; reading them disturbs nothing.
struct Statistics {
  struct Peer {
    std::uint64_t bytes_sent = 0;     // rows, scales, ids, weights and side tensors written for that rank
    std::uint64_t network_bytes = 0;  // handed to the network in writes to that rank, for it or for it to pass on
    std::uint64_t waits = 0;          // times this rank waited for that one
    std::uint64_t wait_ns_sum = 0;
    std::uint64_t wait_ns_max = 0;
  };
  std::vector<Peer> peers;                   // [num_ranks]
  std::vector<std::uint64_t> rows_per_slot;  // rows (kByRank: selections) received for each hosted expert
  std::uint64_t operations = 0;
  std::uint64_t refused = 0;  // operations that some rank refused
  std::uint64_t timeouts = 0;
  /// Between nodes: writes of dispatches that the network had read before the call had packed its last row.
  std::uint64_t puts_while_packing = 0;
  std::uint64_t copied_out_bytes = 0;  // outputs moved to ordinary memory because the arena was at its budget
  std::uint64_t staged_bytes = 0;      // combine input that was not in the arena
  std::size_t arena_bytes_in_use = 0;
  std::size_t arena_bytes_high_water = 0;
};

/// What a call needs, for Buffer::supports().
struct CallShape {
  DType dtype = DType::kBf16;
  std::int64_t hidden = 0;
  std::int64_t num_tokens = 0;
  int num_topk = 0;
  int num_experts = 0;
  bool fp8 = false;
  bool low_latency = false;
};

struct Support {
  bool supported = true;
  std::string reason;  // where not: what stands in the way
  explicit operator bool() const { return supported; }
};

/// One rank's end of a group that exchanges tokens. All ranks make the same sequence of dispatch, combine and
/// low-latency calls ("collective"); calls on one Buffer come from one thread at a time. Any number of Buffers may be
/// open in a process.
///
/// A wrong argument throws kInvalidArgument before anything is sent, and the peers' same call throws too, naming the
/// rank that refused; afterwards the buffer works on. A peer that does not come within the timeout raises kTimeout; the
/// call counts as made, so ranks stay in step. Results are bit-identical across runs, worker counts, and ranks as
/// threads or as processes.
class Buffer {
 public:
  /// Maps one window per rank and introduces the ranks to one another. Collective. Where ranks disagree on `config` all
  /// throw kInvalidArgument; where one cannot open its buffer (wrong arguments or environment, no such device, no way
  /// to map the memory of the others), all throw its error, naming it; where one does not come, the others throw
  /// kTimeout.
  static std::unique_ptr<Buffer> open(std::shared_ptr<Bootstrap> group, const Config& config = {},
                                      const Options& options = {});
  ~Buffer();  // as close()

  int rank() const;
  int num_ranks() const;
  int num_nodes() const;
  int node_of(int rank) const;
  const Config& config() const;
  BackendKind backend() const;

  /// Counts only, no communication. topk_idx as in DispatchInput; `stream` likewise. With a stream, ids that name no
  /// expert are left out of the counts: the dispatch will refuse them.
  DispatchLayout dispatch_layout(const TensorView& topk_idx, int num_experts,
                                 const std::shared_ptr<const Placement>& placement = nullptr,
                                 Stream stream = nullptr) const;

  /// High throughput: sends each token once to every rank that hosts one of its experts; returns when everything has
  /// come. Collective. Throws kInvalidArgument (also: ids out of range, ranks whose calls differ, an arena too small
  /// for the exchange, which names the rank, the bytes needed and the bytes there), kTimeout.
  DispatchOutput dispatch(const DispatchInput& input);

  /// Brings rows back to their tokens' ranks and sums them in input.order. Collective. Returns when the result is
  /// complete and no peer reads `x` any more. Throws as dispatch does.
  CombineOutput combine(const CombineInput& input);

  /// Low latency: sends into fixed slots and returns without waiting for any peer's data; receive() on the ticket
  /// places the rows. A ticket may stay open across Config::num_tickets - 1 further operations of any kind. Collective,
  /// and freely mixed with the other calls.
  Ticket<DispatchOutput> low_latency_dispatch(const DispatchInput& input);

  /// The way back, for a handle of low_latency_dispatch: one row per selection travels, `weights` are applied at home.
  /// The natural order is SumOrder::by_topk().
  Ticket<CombineOutput> low_latency_combine(const CombineInput& input);

  /// Takes part in the peers' next call of this kind by refusing it: it throws on all of them, with this text, and
  /// counts as made everywhere. For layers above that find a mistake in their own arguments while the peers are already
  /// calling. Throws only where the buffer is closed.
  void refuse(Operation operation, const std::string& why);

  /// Memory that peers can read: combine takes it in place, without a staging copy. Uninitialised. Throws
  /// kInvalidArgument with the bytes needed and there if the arena is full.
  Tensor allocate(DType dtype, std::initializer_list<std::int64_t> shape);

  /// One owner for all of these owners of a CUDA buffer's outputs, for a caller who uses them on `user`, a stream that
  /// its calls do not run on: when the last copy is dropped (on any thread), the memory serves again once `user` has
  /// done what it held by then. Host buffers, and a null stream: it serves again at once.
  std::shared_ptr<void> lend(std::vector<std::shared_ptr<void>> owners, Stream user);

  /// Leaves a rank out: nothing is sent to it and nobody waits for it; its rows count as none. A local decision, which
  /// ranks should take together. Taken back with masked = false. High throughput and low latency alike.
  /// Throws kInvalidArgument for a rank that does not exist, and for this one.
  void set_masked(int rank, bool masked);
  bool masked(int rank) const;

  /// Whether such a call can be made on this buffer, and if not, why.
  Support supports(const CallShape& shape) const;

  /// CUDA buffers: waits for everything that was enqueued, then throws what an enqueued call found out after it had
  /// returned (a timeout, another rank's refusal). The next call throws the same, and is refused to the peers, where
  /// nobody asked. Host buffers: nothing is ever late.
  void check();

  /// For logs: the configuration and, between nodes, the network that was chosen and what became of its settings, one
  /// line each.
  std::string describe() const;
  Statistics statistics() const;
  void reset_statistics();

  /// Unmaps everything and ends the worker threads. May be called twice; other calls then throw kInvalidArgument.
  /// Output tensors stay valid. Never waits for a peer's calls; where there is a network between nodes, for at most two
  /// seconds until the peers know that we leave.
  void close();

 private:
  struct State;
  explicit Buffer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace deep_ep
