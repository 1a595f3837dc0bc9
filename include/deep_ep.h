// SPDX-License-Identifier: MIT
// The C API: the same operations as deep_ep/buffer.h behind a stable C ABI, and three short calls on a default
// communicator. C11 and C++. docs/c_api.md shows it in use; deep_ep/buffer.h describes what each operation computes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "deep_ep/version.h"

#if defined(__GNUC__)
#define DEEP_EP_API __attribute__((visibility("default")))
#else
#define DEEP_EP_API
#endif

// An enum is an int on both sides of the border, so a value that a later version adds is a value and not undefined
// behaviour.
#ifdef __cplusplus
#define DEEP_EP_ENUM(name) enum name : int
extern "C" {
#else
#define DEEP_EP_ENUM(name) enum name
#endif

// Rules of every call
//
// Structs    begin with `size`: set it to sizeof of the struct, and the rest to zero except for what you choose; zero
//            is the default of every field. A caller compiled against an earlier header passes a smaller size and
//            gets the defaults for the rest; a larger size is accepted while the part that this library does not know
//            is zero.
// Results    a function that can fail returns deep_ep_status and writes through a pointer; on failure an object
//            pointer is NULL. Objects are freed by the function of their name, which takes NULL too, never fails and
//            waits for no peer; only closing a buffer says goodbye to other nodes, within two seconds.
// Tensors    of the caller are borrowed for the call. Tensors of a result, handle or allocation point into it and are
//            valid until it is freed, also after the buffer is closed.
// Ranks      "collective" calls are made by all ranks of the group in the same order. A refused argument is refused
//            on all ranks: where one rank's call on a buffer fails with DEEP_EP_INVALID_ARGUMENT, the peers' same
//            call does too, naming the rank, and the buffer works on. Only a NULL buffer, ticket or result pointer,
//            which leaves nobody to tell, and an object that was freed are not covered.
// Threads    calls on one buffer come from one thread at a time. Different buffers, groups and results are
//            independent.
// Exceptions never cross this border.

// -------------------------------------------------------------------------------------------------------------- errors

typedef DEEP_EP_ENUM(deep_ep_status){
    DEEP_EP_OK = 0,
    DEEP_EP_INVALID_ARGUMENT = 1,  // fix the call; the text names the argument and both values
    DEEP_EP_UNSUPPORTED = 2,       // choose otherwise; the text says what stands in the way
    DEEP_EP_SYSTEM = 3,            // the machine refused: memory, threads, sockets
    DEEP_EP_TIMEOUT = 4,           // a peer did not come in time; deep_ep_last_wait() says who waited for whom
} deep_ep_status;

/// One wait that ended at its deadline.
typedef struct deep_ep_wait {
  size_t size;
  int rank;           // the rank that waited
  int peer;           // the rank it waited for
  uint64_t epoch;     // number of the operation on this buffer
  uint64_t expected;  // what it waited to see
  uint64_t seen;      // what was there instead
  int peer_gone;      // 1: the peer's process is known to have ended
  char phase[60];     // the operation, as in "dispatch"; ends with 0, cut where longer
} deep_ep_wait;

/// "ok", "invalid argument", "unsupported", "system", "timeout"; "unknown" for anything else. Static text.
DEEP_EP_API const char* deep_ep_status_name(deep_ep_status status);

/// Why the last failed call of this thread failed; "" where none did. Successful calls leave it alone. Valid until
/// the next failure on this thread; long texts are cut at 2047 bytes.
DEEP_EP_API const char* deep_ep_last_error(void);

/// Fills `wait` from the last failed call of this thread. DEEP_EP_INVALID_ARGUMENT, with the error text left as it
/// is, where that call did not fail by waiting for a peer, or where wait->size is no size of this struct.
DEEP_EP_API deep_ep_status deep_ep_last_wait(deep_ep_wait* wait);

/// Version of the library that is linked, as "0.1.0"; deep_ep/version.h has the numbers of the one compiled against.
DEEP_EP_API const char* deep_ep_version(void);

// ------------------------------------------------------------------------------------------------------------- tensors

typedef DEEP_EP_ENUM(deep_ep_dtype){
    DEEP_EP_U8 = 0,    // opaque bytes
    DEEP_EP_FP8 = 1,   // E4M3 without infinity, largest 448
    DEEP_EP_BF16 = 2,  // the upper half of an FP32
    DEEP_EP_FP16 = 3,  // IEEE half
    DEEP_EP_FP32 = 4,  // float
    DEEP_EP_I32 = 5,   // int32_t
    DEEP_EP_I64 = 6,   // int64_t
    DEEP_EP_BOOL = 7,  // one byte, 0 or 1
#ifndef DEEP_EP_NO_SHORT_NAMES
    FP8 = DEEP_EP_FP8,    // for the calls on the default communicator:
    BF16 = DEEP_EP_BF16,  // deep_ep_all_to_all(input, output, size, FP8)
    FP32 = DEEP_EP_FP32,  // define DEEP_EP_NO_SHORT_NAMES where the names are in the way
#endif
} deep_ep_dtype;

/// A borrowed array of up to three dimensions. Where a call takes a tensor, NULL and ndim == 0 mean "not given".
typedef struct deep_ep_tensor {
  size_t size;
  void* data;  // written only where a call says so
  deep_ep_dtype dtype;
  int ndim;            // 0 .. 3
  int64_t shape[3];    // elements of each dimension; those from ndim on are not read
  int64_t strides[3];  // elements from one entry to the next; all zero: contiguous, last dimension fastest
} deep_ep_tensor;

/// A contiguous array; dimensions from `ndim` on are ignored.
static inline deep_ep_tensor deep_ep_make_tensor(const void* data, deep_ep_dtype dtype, int ndim, int64_t rows,
                                                 int64_t columns, int64_t depth) {
  deep_ep_tensor tensor;
  tensor.size = sizeof(tensor);
  tensor.data = (void*)data;
  tensor.dtype = dtype;
  tensor.ndim = ndim;
  tensor.shape[0] = rows;
  tensor.shape[1] = columns;
  tensor.shape[2] = depth;
  tensor.strides[0] = tensor.strides[1] = tensor.strides[2] = 0;
  return tensor;
}

// -------------------------------------------------------------------------------------------------------------- groups

/// One rank's membership in a set of ranks that can meet: needed to open buffers, one after the other. May be freed
/// once the buffer is open.
typedef struct deep_ep_group deep_ep_group;

/// Where ranks of several processes meet; see deep_ep::TcpRendezvous.
typedef struct deep_ep_tcp {
  size_t size;
  const char* address;  // where rank 0 listens; NULL: "127.0.0.1"
  int port;             // 0: 29400
  int rank;             // 0 .. num_ranks - 1
  int num_ranks;        // 0: 1
  int reserved;         // 0
  const char* job;      // ranks with another job name are refused; NULL: "deep_ep"
  uint64_t generation;  // raise it to open again after a failure
  int64_t timeout_ms;   // 0: 60000
} deep_ep_tcp;

/// Meets the other ranks over TCP, in any order of start. Collective. `where` NULL: MASTER_ADDR, MASTER_PORT, RANK and
/// WORLD_SIZE, as torchrun and most launchers set them; without them a world of one.
/// DEEP_EP_TIMEOUT names the ranks that did not come.
DEEP_EP_API deep_ep_status deep_ep_group_tcp(const deep_ep_tcp* where, deep_ep_group** group);

/// Ranks that are threads of one process: writes num_ranks groups, groups[r] for the thread of rank r. Each is freed
/// by itself.
DEEP_EP_API deep_ep_status deep_ep_group_in_process(int num_ranks, deep_ep_group* groups[]);

/// Where a callback puts the blobs that it gathered; lives for one call of it.
typedef struct deep_ep_gathered deep_ep_gathered;

/// Copies the blob of one rank, once for every rank, this one included. Only inside a deep_ep_all_gather_fn, on its
/// thread.
DEEP_EP_API deep_ep_status deep_ep_gathered_put(deep_ep_gathered* gathered, int rank, const void* data, size_t bytes);

/// A caller's all-gather: sends `mine` to all ranks, and puts every rank's blob into `gathered`; blobs may differ in
/// size. Returns 0, or any other number for failure, which the call that needed it then reports as DEEP_EP_SYSTEM.
/// Keeps its own deadline.
typedef int (*deep_ep_all_gather_fn)(void* user, const void* mine, size_t mine_bytes, deep_ep_gathered* gathered);

/// Ranks that meet by the caller's means, such as MPI. `user` is passed on and must outlive the group and the opening
/// of every buffer over it; all_gather is called by nothing else.
DEEP_EP_API deep_ep_status deep_ep_group_callback(int rank, int num_ranks, deep_ep_all_gather_fn all_gather, void* user,
                                                  deep_ep_group** group);

/// -1 for NULL.
DEEP_EP_API int deep_ep_group_rank(const deep_ep_group* group);
DEEP_EP_API int deep_ep_group_num_ranks(const deep_ep_group* group);
DEEP_EP_API void deep_ep_group_free(deep_ep_group* group);

// ------------------------------------------------------------------------------------------------------- configuration

/// What all ranks of a buffer agree on; compared when it opens. See deep_ep::Config.
typedef struct deep_ep_config {
  size_t size;
  int max_experts;                      // largest number of experts, replicas counted, in any call; 0: 1024
  int num_ranks_per_node;               // entries of ranks_per_node
  const int* ranks_per_node;            // logical nodes: none = one; {4} = nodes of four; {4, 3} = these two
  int low_latency_max_tokens_per_rank;  // 0: no low-latency calls
  int low_latency_num_topk;             // 0: 8
  size_t low_latency_row_bytes;         // one token on the wire, the larger of dispatch and combine: BF16 hidden * 2
  size_t low_latency_side_bytes;        // scales and side tensors of one token; 0: 1024
  size_t arena_bytes;                   // budget for outputs; 0: an eighth of the memory, 16 GiB at most
  int num_tickets;                      // low-latency operations whose slots exist at once; 0: 4
  int reserved;                         // 0
  int64_t timeout_ms;                   // of every wait for a peer, unless a call brings its own; 0: 30000
  int64_t open_timeout_ms;              // until all ranks have opened the buffer; 0: 60000
} deep_ep_config;

/// Which memory a buffer moves, and with what.
typedef DEEP_EP_ENUM(deep_ep_backend){
    DEEP_EP_HOST = 0,  // ordinary memory, by threads
    DEEP_EP_CUDA = 1,  // the data of all tensors, given or made, are device pointers of one GPU; by kernels. Only where
                       // the library was built with CUDA
} deep_ep_backend;

/// What one rank may choose for itself. The backend is the same on all ranks.
typedef struct deep_ep_options {
  size_t size;
  int num_workers;  // threads that move data for one operation, the caller's included; 0: cores / ranks of this
                    // machine, less one where there is a network. CUDA: multiprocessors
  int pin_workers;  // 1: bind them to cores, and the network's thread where there are cores for all
  deep_ep_backend backend;
  int reserved;            // 0
  const int* cuda_device;  // number of this rank's GPU; NULL: the calling thread's current one
} deep_ep_options;

/// Writes the defaults out, for reading and changing. config->size must be set.
DEEP_EP_API deep_ep_status deep_ep_config_default(deep_ep_config* config);

/// Every byte that a buffer will map, per rank, before anything is allocated.
typedef struct deep_ep_memory_plan deep_ep_memory_plan;

/// One part of a rank's window. The texts live as long as the plan.
typedef struct deep_ep_memory_region {
  size_t size;
  const char* name;
  const char* why;
  size_t bytes;
} deep_ep_memory_region;

/// `config` NULL: the defaults. No communication.
DEEP_EP_API deep_ep_status deep_ep_plan(const deep_ep_config* config, int num_ranks, deep_ep_memory_plan** plan);
/// 0 for NULL. The total is the sum of the regions.
DEEP_EP_API size_t deep_ep_plan_total_bytes(const deep_ep_memory_plan* plan);
DEEP_EP_API int deep_ep_plan_num_regions(const deep_ep_memory_plan* plan);
DEEP_EP_API deep_ep_status deep_ep_plan_region(const deep_ep_memory_plan* plan, int index,
                                               deep_ep_memory_region* region);
/// A table for people; lives as long as the plan. "" for NULL.
DEEP_EP_API const char* deep_ep_plan_text(const deep_ep_memory_plan* plan);
DEEP_EP_API void deep_ep_plan_free(deep_ep_memory_plan* plan);

/// One high-throughput exchange, for sizing an arena.
typedef struct deep_ep_exchange_shape {
  size_t size;
  int64_t rows;         // that one rank receives, padding included
  int64_t tokens;       // distinct (source rank, token) pairs among them; 0: as many as rows
  size_t row_bytes;     // of x
  size_t side_bytes;    // per token, all side tensors together
  int num_scales;       // per row
  int num_topk;         // 0: 8
  int no_topk_weights;  // 1: none travel
  int topk_idx_32;      // 1: ids are int32, else int64
} deep_ep_exchange_shape;

/// Arena bytes that the output of one such dispatch takes.
DEEP_EP_API deep_ep_status deep_ep_arena_bytes_for(const deep_ep_exchange_shape* shape, size_t* bytes);
/// The other way round: rows of this shape that an arena of so many bytes holds at once. shape->rows is not read.
DEEP_EP_API deep_ep_status deep_ep_arena_rows(size_t arena_bytes, const deep_ep_exchange_shape* shape, int64_t* rows);

// ----------------------------------------------------------------------------------------------------------- placement

/// Which ranks host which expert, immutable; ranks must use equal ones in one call. May be freed after any call that
/// takes it.
typedef struct deep_ep_placement deep_ep_placement;

/// Which replica a token takes; see deep_ep::Placement::Policy.
typedef DEEP_EP_ENUM(deep_ep_replica_policy){
    DEEP_EP_SPREAD = 0,       // (source rank + source token) modulo the number of replicas
    DEEP_EP_LOCAL_FIRST = 1,  // the source rank's own, else one of its node, else as above
} deep_ep_replica_policy;

typedef struct deep_ep_placement_lists {
  size_t size;
  int num_ranks;
  int num_experts;
  const int* const* hosted;  // hosted[rank] lists that rank's experts, slot by slot; all are hosted somewhere
  const int* num_hosted;     // [num_ranks]
  deep_ep_replica_policy policy;
  int reserved;  // 0
} deep_ep_placement_lists;

/// Experts in order, num_experts / num_ranks each; the first num_experts % num_ranks ranks host one more.
DEEP_EP_API deep_ep_status deep_ep_placement_even(int num_experts, int num_ranks, deep_ep_placement** placement);
DEEP_EP_API deep_ep_status deep_ep_placement_from_lists(const deep_ep_placement_lists* lists,
                                                        deep_ep_placement** placement);
/// -1 for NULL and where there is no such rank or slot.
DEEP_EP_API int deep_ep_placement_num_slots(const deep_ep_placement* placement, int rank);
DEEP_EP_API int deep_ep_placement_expert_at(const deep_ep_placement* placement, int rank, int slot);
/// Equal for equal placements, on every machine. 0 for NULL.
DEEP_EP_API uint64_t deep_ep_placement_fingerprint(const deep_ep_placement* placement);
DEEP_EP_API void deep_ep_placement_free(deep_ep_placement* placement);

// -------------------------------------------------------------------------------------------------------------- buffer

/// One rank's end of a group that exchanges tokens.
typedef struct deep_ep_buffer deep_ep_buffer;

/// Maps one window per rank and introduces the ranks to one another. Collective. `config` and `options` NULL: the
/// defaults. Where ranks disagree on `config` all fail with DEEP_EP_INVALID_ARGUMENT; where one cannot open its
/// buffer (wrong arguments or environment, no such device, no way to map the memory of the others), all with its
/// status, naming it; where one does not come, the others with DEEP_EP_TIMEOUT.
DEEP_EP_API deep_ep_status deep_ep_buffer_open(const deep_ep_group* group, const deep_ep_config* config,
                                               const deep_ep_options* options, deep_ep_buffer** buffer);

/// Unmaps everything, ends the worker threads and frees the buffer. Takes NULL. Never waits for a peer's calls; where
/// there is a network between nodes, for at most two seconds until the peers know that we leave. Its tickets are to be
/// received or freed first; results, handles and allocations stay valid.
DEEP_EP_API void deep_ep_buffer_close(deep_ep_buffer* buffer);

/// -1 for NULL, and for a rank that does not exist.
DEEP_EP_API int deep_ep_buffer_rank(const deep_ep_buffer* buffer);
DEEP_EP_API int deep_ep_buffer_num_ranks(const deep_ep_buffer* buffer);
DEEP_EP_API int deep_ep_buffer_num_nodes(const deep_ep_buffer* buffer);
DEEP_EP_API int deep_ep_buffer_node_of(const deep_ep_buffer* buffer, int rank);

/// CUDA buffers: waits for everything that was enqueued, then fails with what an enqueued call found out after it had
/// returned; the next call would fail with the same. Host buffers: nothing is ever late.
DEEP_EP_API deep_ep_status deep_ep_check(deep_ep_buffer* buffer);

/// Leaves a rank out (masked != 0), or takes it back: nothing is sent to it and nobody waits for it. A local decision
/// that ranks should take together.
DEEP_EP_API deep_ep_status deep_ep_set_masked(deep_ep_buffer* buffer, int rank, int masked);
/// 1 or 0; -1 for NULL and for a rank that does not exist.
DEEP_EP_API int deep_ep_masked(const deep_ep_buffer* buffer, int rank);

/// What a call needs.
typedef struct deep_ep_call_shape {
  size_t size;
  int64_t hidden;
  int64_t num_tokens;
  int num_topk;
  int num_experts;
  deep_ep_dtype dtype;
  int fp8;          // 1: quantised while it is sent
  int low_latency;  // 1: the low-latency calls
  int reserved;     // 0
} deep_ep_call_shape;

/// DEEP_EP_OK where such a call can be made on this buffer, else DEEP_EP_UNSUPPORTED with the reason as the error text.
DEEP_EP_API deep_ep_status deep_ep_supports(const deep_ep_buffer* buffer, const deep_ep_call_shape* shape);

/// Memory that peers can read: a combine takes it in place, without a staging copy.
typedef struct deep_ep_allocation deep_ep_allocation;

/// Uninitialised memory of shape[0] x .. x shape[ndim - 1] elements, ndim 1 .. 3. DEEP_EP_INVALID_ARGUMENT with the
/// bytes needed and there if the arena is full.
DEEP_EP_API deep_ep_status deep_ep_allocate(deep_ep_buffer* buffer, deep_ep_dtype dtype, int ndim, const int64_t* shape,
                                            deep_ep_allocation** allocation);
/// `tensor` points at the memory, which may be written. tensor->size must be set.
DEEP_EP_API deep_ep_status deep_ep_allocation_tensor(const deep_ep_allocation* allocation, deep_ep_tensor* tensor);
DEEP_EP_API void deep_ep_allocation_free(deep_ep_allocation* allocation);

/// Counters of what passed between this rank and one peer.
typedef struct deep_ep_peer_statistics {
  size_t size;
  uint64_t bytes_sent;  // rows, scales, ids, weights and side tensors written for that rank
  uint64_t waits;       // times that this rank waited for that one
  uint64_t wait_ns_sum;
  uint64_t wait_ns_max;
} deep_ep_peer_statistics;

/// Counters since the buffer opened or since reset. Set size and, where wanted, the two arrays; the rest is written.
typedef struct deep_ep_statistics {
  size_t size;
  deep_ep_peer_statistics* peers;  // [max_peers], the caller's; size must be set in entry 0 and holds for all of them
  uint64_t* rows_per_slot;         // [max_slots], the caller's: rows (by rank: selections) for each hosted expert
  int max_peers;
  int max_slots;
  int num_peers;  // ranks of the buffer; entries 0 .. min(max_peers, num_peers) - 1 are written
  int num_slots;  // slots counted so far; likewise
  uint64_t operations;
  uint64_t refused;  // operations that some rank refused
  uint64_t timeouts;
  uint64_t copied_out_bytes;  // outputs moved to ordinary memory because the arena was at its budget
  uint64_t staged_bytes;      // combine input that was not in the arena
  uint64_t arena_bytes_in_use;
  uint64_t arena_bytes_high_water;
} deep_ep_statistics;

/// Disturbs nothing, no communication.
DEEP_EP_API deep_ep_status deep_ep_get_statistics(const deep_ep_buffer* buffer, deep_ep_statistics* statistics);
DEEP_EP_API deep_ep_status deep_ep_reset_statistics(deep_ep_buffer* buffer);

// ------------------------------------------------------------------------------------------------------------ dispatch

/// How a receiver's rows are arranged; see deep_ep::OutputLayout.
typedef DEEP_EP_ENUM(deep_ep_output_layout){
    DEEP_EP_BY_RANK = 0,    // one row per token that selected anything here, in order (source rank, source token)
    DEEP_EP_BY_EXPERT = 1,  // one row per (token, expert here), grouped by slot; groups zero-padded to expert_alignment
    DEEP_EP_PADDED = 2,     // [slots, num_ranks * max_tokens_per_rank, hidden]: a block per slot, its valid rows first
} deep_ep_output_layout;

/// Rows quantised to FP8 while they are sent, one scale per 128 channels.
typedef DEEP_EP_ENUM(deep_ep_fp8_mode){
    DEEP_EP_NO_FP8 = 0,
    DEEP_EP_FP8_SCALES = 1,          // FP32 scales, largest magnitude / 448
    DEEP_EP_FP8_ROUNDED_SCALES = 2,  // rounded up to powers of two
    DEEP_EP_FP8_UE8M0_SCALES = 3,    // the same as exponents, four to an int32, the first in the lowest byte
} deep_ep_fp8_mode;

typedef DEEP_EP_ENUM(deep_ep_scale_order){
    DEEP_EP_ROW_MAJOR = 0,
    DEEP_EP_COLUMN_MAJOR = 1,  // same shape, strides (1, rows rounded up to 4)
} deep_ep_scale_order;

/// What a dispatch made that later calls need. Immutable and reference-counted: each deep_ep_handle_retain asks for one
/// deep_ep_handle_free. Usable on the buffer that made it.
typedef struct deep_ep_handle deep_ep_handle;

/// The numbers of a handle; see deep_ep::Handle.
typedef struct deep_ep_handle_info {
  size_t size;
  int64_t num_tokens;    // that this rank sent
  int64_t num_rows;      // of the output: exact, or the bound of a bounded call
  int64_t num_arrivals;  // (source rank, source token) pairs that came, or likewise
  deep_ep_output_layout layout;
  int num_ranks;
  int num_topk;
  int num_experts;
  int expert_alignment;
  int max_tokens_per_rank;
  int low_latency;  // 1: made by deep_ep_low_latency_dispatch
  int topk_idx_64;  // 1: ids came as int64
} deep_ep_handle_info;

typedef DEEP_EP_ENUM(deep_ep_handle_field){
    DEEP_EP_HANDLE_DST_RANK = 0,        // i32 [num_tokens, num_topk]; -1: no selection
    DEEP_EP_HANDLE_DST_ROW = 1,         // i32 [num_tokens, num_topk]: row on that rank
    DEEP_EP_HANDLE_FIRST_ARRIVAL = 2,   // i32 [num_ranks + 1]
    DEEP_EP_HANDLE_SRC_TOKEN = 3,       // i32 [num_arrivals]
    DEEP_EP_HANDLE_ARRIVAL_ROW = 4,     // i32 [num_arrivals, num_topk]; not given by rank in high throughput
    DEEP_EP_HANDLE_SLOT_ROWS = 5,       // i32 [slots]
    DEEP_EP_HANDLE_SLOT_FIRST_ROW = 6,  // i32 [slots + 1]
    DEEP_EP_HANDLE_TOKENS_BETWEEN = 7,  // i32 [num_ranks, num_ranks]; low latency: only column `rank` is filled
} deep_ep_handle_field;

/// Adds an owner and returns the same handle. Takes NULL.
DEEP_EP_API deep_ep_handle* deep_ep_handle_retain(deep_ep_handle* handle);
DEEP_EP_API void deep_ep_handle_free(deep_ep_handle* handle);
DEEP_EP_API deep_ep_status deep_ep_handle_get_info(const deep_ep_handle* handle, deep_ep_handle_info* info);
/// To be read only. ndim 0 where the handle has no such field.
DEEP_EP_API deep_ep_status deep_ep_handle_tensor(const deep_ep_handle* handle, deep_ep_handle_field field,
                                                 deep_ep_tensor* tensor);

/// Arguments of deep_ep_dispatch and deep_ep_low_latency_dispatch. Everything pointed at is read until the call
/// returns.
typedef struct deep_ep_dispatch_input {
  size_t size;
  const deep_ep_tensor* x;             // [num_tokens, hidden], contiguous, any dtype; a row is a multiple of 16 bytes
  const deep_ep_tensor* topk_idx;      // [num_tokens, num_topk] i32 or i64, contiguous; negative: no selection
  const deep_ep_handle* handle;        // route as this earlier dispatch did, without topk_idx, num_experts, placement,
                                       // layout and expert_alignment. High throughput only
  const deep_ep_placement* placement;  // NULL: even
  int num_experts;
  deep_ep_output_layout layout;
  const deep_ep_tensor* topk_weights;  // [num_tokens, num_topk] fp32, contiguous; or NULL
  const deep_ep_tensor* scales;        // [num_tokens, num_scales] fp32 or i32, of rows quantised by the caller; or NULL
  const deep_ep_tensor* const* side;  // [num_side] tensors that travel too: [num_tokens, n], rows a multiple of 4 bytes
  int num_side;
  int expert_alignment;     // 0: 1
  int max_tokens_per_rank;  // needed by DEEP_EP_PADDED and by low latency; equal on all ranks
  deep_ep_fp8_mode fp8;     // for BF16, FP16 and FP32 rows
  deep_ep_scale_order scale_order;
  int keep_other_weights;  // by rank: weights of selections that live elsewhere arrive as 0, or (1) as sent
  int num_workers;         // at most so many threads; 0: deep_ep_sm_limit(), else the buffer's
  int reserved;            // 0
  int64_t max_rows;        // 0: outputs have exactly the rows that came, else so many; high throughput only
  int64_t timeout_ms;      // 0: the buffer's
  void* stream;     // CUDA: a cudaStream_t in whose order the call runs, see deep_ep_check(); NULL: the buffer's own,
                    // complete when the call returns
  int at_once;      // low latency, 1: the ticket is received right after the call; CUDA then needs one kernel, not two
  int mask_silent;  // low latency, 1: a rank that is silent until the deadline is masked, and the operation
                    // goes on without it
} deep_ep_dispatch_input;

/// What came: tensors and a handle.
typedef struct deep_ep_dispatch_result deep_ep_dispatch_result;

typedef DEEP_EP_ENUM(deep_ep_dispatch_field){
    DEEP_EP_DISPATCH_X = 0,             // [num_rows, hidden], or [slots, num_ranks * max_tokens_per_rank, hidden]
    DEEP_EP_DISPATCH_SCALES = 1,        // with FP8 or the caller's scales
    DEEP_EP_DISPATCH_TOPK_IDX = 2,      // [num_arrivals, num_topk], dtype as given: slot here, -1 elsewhere
    DEEP_EP_DISPATCH_TOPK_WEIGHTS = 3,  // by rank [num_arrivals, num_topk], else one per row
} deep_ep_dispatch_field;

/// Sends each token once to every rank that hosts one of its experts; returns when everything has come. Collective.
/// DEEP_EP_INVALID_ARGUMENT before anything is sent, DEEP_EP_TIMEOUT if a rank does not come.
DEEP_EP_API deep_ep_status deep_ep_dispatch(deep_ep_buffer* buffer, const deep_ep_dispatch_input* input,
                                            deep_ep_dispatch_result** result);

/// ndim 0 where the dispatch gave no such tensor. May be written, as no other object looks at it. tensor->size must
/// be set.
DEEP_EP_API deep_ep_status deep_ep_dispatch_result_tensor(const deep_ep_dispatch_result* result,
                                                          deep_ep_dispatch_field field, deep_ep_tensor* tensor);
/// Side tensor number `index`, [num_arrivals, n].
DEEP_EP_API deep_ep_status deep_ep_dispatch_result_side(const deep_ep_dispatch_result* result, int index,
                                                        deep_ep_tensor* tensor);
DEEP_EP_API int deep_ep_dispatch_result_num_side(const deep_ep_dispatch_result* result);
/// Borrowed from the result; retain it to keep it longer. NULL for NULL.
DEEP_EP_API deep_ep_handle* deep_ep_dispatch_result_handle(const deep_ep_dispatch_result* result);
DEEP_EP_API void deep_ep_dispatch_result_free(deep_ep_dispatch_result* result);

/// Who gets how much, before anything is sent.
typedef struct deep_ep_layout_result deep_ep_layout_result;

typedef DEEP_EP_ENUM(deep_ep_layout_field){
    DEEP_EP_LAYOUT_TOKENS_PER_RANK = 0,    // i32 [num_ranks]: each token counted once
    DEEP_EP_LAYOUT_TOKENS_PER_NODE = 1,    // i32 [num_nodes]
    DEEP_EP_LAYOUT_TOKENS_PER_EXPERT = 2,  // i32 [num_experts]: selections, duplicates counted
    DEEP_EP_LAYOUT_TOKEN_IN_RANK = 3,      // bool [num_tokens, num_ranks]
} deep_ep_layout_field;

/// Counts only, no communication. topk_idx as in deep_ep_dispatch_input; `placement` NULL: even.
DEEP_EP_API deep_ep_status deep_ep_dispatch_layout(const deep_ep_buffer* buffer, const deep_ep_tensor* topk_idx,
                                                   int num_experts, const deep_ep_placement* placement,
                                                   deep_ep_layout_result** result);
DEEP_EP_API deep_ep_status deep_ep_layout_result_tensor(const deep_ep_layout_result* result, deep_ep_layout_field field,
                                                        deep_ep_tensor* tensor);
DEEP_EP_API void deep_ep_layout_result_free(deep_ep_layout_result* result);

// ------------------------------------------------------------------------------------------------------------- combine

/// Which contribution is added first; see deep_ep::SumOrder.
typedef DEEP_EP_ENUM(deep_ep_sum_key){
    DEEP_EP_SUM_BY_RANK = 0,
    DEEP_EP_SUM_BY_TOPK = 1,  // the natural order of the low-latency combine
} deep_ep_sum_key;

/// How top-k weights that come back with DEEP_EP_BY_RANK rows are joined.
typedef DEEP_EP_ENUM(deep_ep_weights_home){
    DEEP_EP_SUM_OVER_RANKS = 0,  // entry k of every rank that received the token, added in rank order
    DEEP_EP_FROM_OWNER = 1,      // entry k of the rank that took selection k
} deep_ep_weights_home;

/// How rows cross in a low-latency combine, and with what error; see deep_ep::WireFormat.
typedef DEEP_EP_ENUM(deep_ep_wire_format){
    DEEP_EP_WIRE_AS_IS = 0,
    DEEP_EP_WIRE_LOGFMT10 = 1,  // ten bits for a value, which comes back within 1.6 %
    DEEP_EP_WIRE_FP8 = 2,       // E4M3 and a scale for 128 channels: within 1/16
} deep_ep_wire_format;

/// Arguments of deep_ep_combine and deep_ep_low_latency_combine. Everything pointed at is used until the call returns;
/// weights, bias and out of the low-latency call until its ticket is received or freed.
typedef struct deep_ep_combine_input {
  size_t size;
  const deep_ep_handle* handle;   // of the dispatch whose rows come home; the buffer keeps what it needs of it
  const deep_ep_tensor* x;        // rows as that dispatch arranged them; BF16, FP16 or FP32, contiguous. Those of an
                                  // allocation or a dispatch result are read in place, others staged once
  const deep_ep_tensor* weights;  // factors of the sum, [num_tokens, num_topk] fp32; not by rank; or NULL
  const deep_ep_tensor* topk_weights;  // travel home beside the rows, in the shape that dispatch gave them; or NULL
  const deep_ep_tensor* bias[2];       // [num_tokens, hidden], dtype of x; or NULL
  const deep_ep_tensor* out;           // [num_tokens, hidden], contiguous, dtype of x: the result goes here; or NULL
  deep_ep_sum_key sum_key;
  int round_per_rank;  // 1: contributions of one rank are first summed and rounded to the dtype of x
  int round_per_node;  // 1: then those of one logical node likewise
  int bias_last;       // 1: biases are added at the end, else the sum begins with them
  deep_ep_weights_home weights_home;
  int num_workers;           // as in deep_ep_dispatch_input
  int64_t timeout_ms;        // 0: the buffer's
  void* stream;              // as in deep_ep_dispatch_input
  deep_ep_wire_format wire;  // low latency, BF16 and FP16 only; equal on all ranks
  int pre_reduce;            // low latency, with round_per_rank, 1: a rank adds a token's rows up and sends one
  int at_once;               // as in deep_ep_dispatch_input; x is then read until the ticket is received
  int mask_silent;           // likewise
} deep_ep_combine_input;

typedef struct deep_ep_combine_result deep_ep_combine_result;

typedef DEEP_EP_ENUM(deep_ep_combine_field){
    DEEP_EP_COMBINE_X = 0,             // [num_tokens, hidden]; a token that was sent nowhere: its biases, or 0
    DEEP_EP_COMBINE_TOPK_WEIGHTS = 1,  // [num_tokens, num_topk] fp32 where they travelled
} deep_ep_combine_field;

/// Brings rows back to the ranks of their tokens and sums them in the order asked for. Collective. Returns when the
/// result is complete and no peer reads x any more. Fails as deep_ep_dispatch does.
DEEP_EP_API deep_ep_status deep_ep_combine(deep_ep_buffer* buffer, const deep_ep_combine_input* input,
                                           deep_ep_combine_result** result);
/// ndim 0 where the combine gave no such tensor. Where input.out was given, DEEP_EP_COMBINE_X is that memory.
DEEP_EP_API deep_ep_status deep_ep_combine_result_tensor(const deep_ep_combine_result* result,
                                                         deep_ep_combine_field field, deep_ep_tensor* tensor);
DEEP_EP_API void deep_ep_combine_result_free(deep_ep_combine_result* result);

// --------------------------------------------------------------------------------------------------------- low latency

/// An operation whose data is on its way. Received once, on any thread, in any order; then, or instead, freed. One
/// that is freed without being received keeps its slots until its data has come; the result is lost, nothing else.
typedef struct deep_ep_dispatch_ticket deep_ep_dispatch_ticket;
typedef struct deep_ep_combine_ticket deep_ep_combine_ticket;

/// Sends without waiting for any peer's data. Collective, freely mixed with the other calls; up to config.num_tickets
/// - 1 tickets may be outstanding. The buffer needs config.low_latency_max_tokens_per_rank and row_bytes.
DEEP_EP_API deep_ep_status deep_ep_low_latency_dispatch(deep_ep_buffer* buffer, const deep_ep_dispatch_input* input,
                                                        deep_ep_dispatch_ticket** ticket);
/// Waits for the data and places the rows. Fails as deep_ep_dispatch does, and on a ticket that was received before.
DEEP_EP_API deep_ep_status deep_ep_low_latency_dispatch_receive(deep_ep_dispatch_ticket* ticket,
                                                                deep_ep_dispatch_result** result);
DEEP_EP_API void deep_ep_dispatch_ticket_free(deep_ep_dispatch_ticket* ticket);

/// The way back, for a handle of deep_ep_low_latency_dispatch: one row per selection travels, `weights` are applied at
/// home. `weights`, the biases and `out` must stay until the ticket is received or freed. Collective.
DEEP_EP_API deep_ep_status deep_ep_low_latency_combine(deep_ep_buffer* buffer, const deep_ep_combine_input* input,
                                                       deep_ep_combine_ticket** ticket);
DEEP_EP_API deep_ep_status deep_ep_low_latency_combine_receive(deep_ep_combine_ticket* ticket,
                                                               deep_ep_combine_result** result);
DEEP_EP_API void deep_ep_combine_ticket_free(deep_ep_combine_ticket* ticket);

// --------------------------------------------------------------------------------------------------------- short calls

/// The default communicator's shape. Equal on all ranks except for group, num_workers, per_thread and cuda_device.
typedef struct deep_ep_init_config {
  size_t size;
  const deep_ep_group* group;  // NULL: as deep_ep_group_tcp(NULL)
  int hidden;                  // FP32 elements of a row of the low-latency call; 0: 7168
  int max_batch;               // rows that a rank may give to the low-latency call; 0: 128
  int num_experts;             // largest number of experts, for calls on deep_ep_default_buffer(); 0: 1024
  int num_topk;                // likewise, of low-latency calls; 0: 1
  int num_workers;             // as in deep_ep_options
  int per_thread;              // 1: the communicator of the calling thread only, for ranks that are threads
  size_t arena_bytes;          // as in deep_ep_config; an all-to-all takes what its output has on the wire
  int64_t timeout_ms;          // of meeting and of every wait; 0: 60000 and 30000
  deep_ep_backend backend;     // CUDA: the short calls take device pointers
  int reserved;                // 0
  const int* cuda_device;      // as in deep_ep_options
} deep_ep_init_config;

/// Opens the default communicator of the process (or thread, see per_thread). Collective. NULL: the defaults.
/// DEEP_EP_INVALID_ARGUMENT where one is open.
DEEP_EP_API deep_ep_status deep_ep_init(const deep_ep_init_config* config);

/// Closes what deep_ep_init opened, as deep_ep_buffer_close does; the calling thread's where it has one. DEEP_EP_OK
/// also where none is open.
DEEP_EP_API deep_ep_status deep_ep_finalize(void);

/// The buffer of the default communicator, for the calls above; NULL where none is open. Not to be closed by the
/// caller.
DEEP_EP_API deep_ep_buffer* deep_ep_default_buffer(void);

/// Equal split: chunk r of `input` goes to rank r, chunk r of `output` came from rank r. Collective.
///
/// input, output  [size] FP32 each, borrowed for the call; they may be the same memory or overlap
/// size           FP32 elements in total, a multiple of the number of ranks, equal on all ranks
/// wire           how elements travel. FP32: exact. BF16: rounded to nearest even. FP8: E4M3 with one FP32 scale per
///                128 elements of a chunk, error at most 2^-4 of the element plus 2^-10 of the scale
/// The chunk of a masked rank arrives as zeros.
DEEP_EP_API deep_ep_status deep_ep_all_to_all(const float* input, float* output, int size, deep_ep_dtype wire);

/// The same by rows on the low-latency path, exact: block r of batch_size / num_ranks rows goes to rank r. Collective.
///
/// query, result  [batch_size, hidden] FP32 each, borrowed for the call; they may be the same memory
/// batch_size     a multiple of the number of ranks, at most max_batch of deep_ep_init, equal on all ranks
DEEP_EP_API deep_ep_status deep_ep_low_latency_all_to_all(const float* query, float* result, int batch_size);

/// Limits the execution units of the following calls of this process that name no number of their own: on a GPU its
/// multiprocessors, on the host worker threads, the caller's included. limit <= 0: no limit. Changes no result.
DEEP_EP_API deep_ep_status deep_ep_set_sm_limit(int limit);
/// The limit, 0 where there is none.
DEEP_EP_API int deep_ep_sm_limit(void);

#ifdef __cplusplus
}
#endif
#undef DEEP_EP_ENUM
