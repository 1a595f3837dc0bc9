// SPDX-License-Identifier: MIT
#include "cuda/context.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <sstream>
#include <thread>

#include "check.h"
#include "cuda/capture.h"
#include "cuda/failure.h"
#include "cuda/low_latency.h"

namespace deep_ep::cuda {

namespace {

using Bytes = Bootstrap::Blob;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kFirstSlab = std::size_t{32} << 20;
constexpr std::size_t kFirstArenaPages = std::size_t{64} << 20;
constexpr std::size_t kMaxDefaultArena = std::size_t{16} << 30;

// Pinned memory that kernels write and the host reads, and its address for kernels.
template <typename T>
void allocate_mapped(T*& host, T*& device, std::size_t bytes) {
  cuda::check(cudaHostAlloc(reinterpret_cast<void**>(&host), bytes, cudaHostAllocMapped | cudaHostAllocPortable),
              "cudaHostAlloc");
  std::memset(static_cast<void*>(host), 0, bytes);
  cuda::check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device), host, 0), "cudaHostGetDevicePointer");
}

int device_of(const Options& options) {
  int device = options.cuda_device;
  if (device < 0) cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaSetDevice(device), fmt::format("cudaSetDevice({})", device));
  return device;
}

// Half of what one rank's share of the GPU has free, so that there is room for the model.
std::size_t arena_bytes(const Config& config, int ranks_here) {
  if (config.arena_bytes > 0) return config.arena_bytes;
  std::size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return std::min(kMaxDefaultArena, total / 8 / static_cast<std::size_t>(ranks_here));
}

// What ranks tell one another first: it decides how much of its GPU each takes, and how memory is shared.
struct Neighbours {
  int ranks_here = 0;     // on this GPU
  bool machines = false;  // more than one
};

Neighbours meet_neighbours(Bootstrap& group, const cudaDeviceProp& info, std::chrono::milliseconds timeout) {
  const ProcessIdentity process = this_process();
  Bytes mine(sizeof info.uuid.bytes + sizeof process.boot_id);
  std::memcpy(mine.data(), info.uuid.bytes, sizeof info.uuid.bytes);
  std::memcpy(mine.data() + sizeof info.uuid.bytes, process.boot_id, sizeof process.boot_id);
  Neighbours neighbours;
  for (const Bytes& theirs : group.all_gather(mine, timeout)) {
    neighbours.ranks_here += theirs == mine;
    const bool same_machine =
        theirs.size() == mine.size() &&
        std::equal(mine.begin() + sizeof info.uuid.bytes, mine.end(), theirs.begin() + sizeof info.uuid.bytes);
    neighbours.machines = neighbours.machines || !same_machine;
  }
  return neighbours;
}

Bytes pack(const WindowAddress& address, const std::string& config) {
  Bytes blob(sizeof address + config.size());
  std::memcpy(blob.data(), &address, sizeof address);
  std::memcpy(blob.data() + sizeof address, config.data(), config.size());
  return blob;
}

void require_same_config(const std::string& ours, const Bytes& blob, int our_rank, int their_rank) {
  require(blob.size() >= sizeof(WindowAddress),
          "rank {} sent {} bytes of introduction, {} are needed: do all ranks "
          "open a CUDA buffer?",
          their_rank, blob.size(), sizeof(WindowAddress));
  std::istringstream a(ours);
  std::istringstream b(std::string(reinterpret_cast<const char*>(blob.data()) + sizeof(WindowAddress),
                                   blob.size() - sizeof(WindowAddress)));
  for (std::string line_a, line_b; std::getline(a, line_a) && std::getline(b, line_b);)
    require(line_a == line_b, "config differs: rank {} has {}, rank {} has {}", our_rank, line_a, their_rank, line_b);
}

}  // namespace

// Opening
// ---------------------------------------------------------------------------------------------------------------------

Context::Context(const BackendInput& input)
    : rank(input.group->rank()),
      num_ranks(input.group->num_ranks()),
      device(device_of(input.options)),
      topology(input.topology),
      config(input.config),
      peers_(num_ranks) {
  cudaDeviceProp info;
  cuda::check(cudaGetDeviceProperties(&info, device), "cudaGetDeviceProperties");
  const Neighbours neighbours = meet_neighbours(*input.group, info, config.open_timeout);
  const int ranks_here = neighbours.ranks_here;
  neighbourhood_ = {ranks_here, num_ranks - ranks_here};
  most_blocks_ = std::max(1, info.multiProcessorCount / ranks_here);
  default_blocks_ = input.options.num_workers > 0 ? std::min(most_blocks_, input.options.num_workers)
                                                  : plan::default_sms(neighbourhood_, most_blocks_);
  low_latency_blocks_ = input.options.num_workers > 0 ? default_blocks_ : most_blocks_;
  layout_ = plan::WindowLayout::place(config, num_ranks, arena_bytes(config, ranks_here));

  cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  cuda::check(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking), "cudaStreamCreate");
  cuda::check(cudaEventCreateWithFlags(&last_done_, cudaEventDisableTiming), "cudaEventCreate");
  allocate_mapped(mailbox_, device_mailbox_, sizeof(Mailbox));
  allocate_mapped(first_row_, device_first_row_, sizeof(std::int32_t) * (config.max_experts + 1));
  returns_ = std::make_shared<Returns>(device);
  cuda::check(cudaMalloc(reinterpret_cast<void**>(&state_), sizeof(State)), "cudaMalloc");
  cuda::check(cudaMemset(state_, 0, sizeof(State)), "cudaMemset");
  cuda::check(cudaMalloc(reinterpret_cast<void**>(&counters_.peers), counters_bytes()), "cudaMalloc");
  cuda::check(cudaMemset(counters_.peers, 0, counters_bytes()), "cudaMemset");
  counters_.rows_per_slot = reinterpret_cast<std::uint64_t*>(counters_.peers + num_ranks);
  cuda::check(cudaMalloc(reinterpret_cast<void**>(&device_peers_), sizeof(Peer) * num_ranks), "cudaMalloc");
  cuda::check(cudaMalloc(reinterpret_cast<void**>(&nodes_), sizeof(std::int32_t) * num_ranks), "cudaMalloc");
  copy(nodes_, topology.node_of_rank.data(), sizeof(std::int32_t) * num_ranks, cudaMemcpyHostToDevice);
  local(1);  // the first slab
  graph_memory_ = std::make_shared<GraphMemory>();
  prepare_kernels();
  statistics_.peers.resize(num_ranks);
  open_windows(*input.group, choose_sharing(device, neighbours.machines));
}

void Context::open_windows(Bootstrap& group, Sharing sharing) {
  const std::size_t first = layout_.arena_at + std::min(layout_.arena_bytes, kFirstArenaPages);
  auto own = Window::create({device, sharing, layout_.total_bytes, first});
  // Everything before the arena; on the device before any peer is told of it.
  cuda::check(cudaMemset(own->base(), 0, layout_.arena_at), "cudaMemset of a window");
  cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  own->offer();
  const std::string text = config.to_string();
  const auto blobs = group.all_gather(pack(own->address(), text), config.open_timeout);
  windows_.resize(num_ranks);
  std::string failure;
  try {
    for (int peer = 0; peer < num_ranks; ++peer) {
      require_same_config(text, blobs[peer], rank, peer);
      WindowAddress address;
      std::memcpy(&address, blobs[peer].data(), sizeof address);
      windows_[peer] = peer == rank ? own : Window::open(address, {device, rank, config.open_timeout});
      const bool same = std::memcmp(address.device_uuid, own->address().device_uuid, sizeof address.device_uuid) == 0;
      peers_[peer] = {windows_[peer]->base(), 1, same};
    }
    upload_peers();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) throw;
    failure = error.what();
  }
  const auto failures =
      group.all_gather({reinterpret_cast<const std::byte*>(failure.data()), failure.size()}, config.open_timeout);
  own->seal();
  for (int peer = 0; peer < num_ranks; ++peer)
    if (!failures[peer].empty())
      throw Error(ErrorCode::kSystem, fmt::format("rank {} could not open the buffer: {}", peer,
                                                  std::string(reinterpret_cast<const char*>(failures[peer].data()),
                                                              failures[peer].size())));
  arena_ = std::make_shared<plan::Arena>(own, own->base(), layout_.arena_at, layout_.arena_bytes);
}

// Loads every kernel now: a load while another rank's kernel spins would wait for it.
void Context::prepare_kernels() {
  int most = 0;
  cuda::check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  shared_limit_ = most - 4096;  // what kernels declare themselves, and what CUDA keeps
  const auto prepare = [&](const void* kernel) {
    cudaFuncAttributes attributes;
    cuda::check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel for this GPU");
    cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - static_cast<int>(attributes.sharedSizeBytes)),
                "cudaFuncSetAttribute");
  };
  prepare(layout_kernel());
  prepare(notify_kernel());
  prepare(refuse_kernel());
  prepare(dispatch_kernel(false, DType::kU8));
  prepare(low_latency_dispatch_kernel(false, DType::kU8));
  prepare(abandon_kernel());
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    prepare(dispatch_kernel(true, dtype));
    prepare(combine_kernel(dtype, false));
    prepare(combine_kernel(dtype, true));
    prepare(low_latency_dispatch_kernel(true, dtype));
    prepare(low_latency_combine_kernel(dtype, false));
    prepare(low_latency_combine_kernel(dtype, true));
  }
}

Context::~Context() {
  // Enqueued calls have deadlines: this ends.
  cudaSetDevice(device);
  if (last_stream_ != nullptr) cudaEventSynchronize(last_done_);
  for (cudaStream_t stream : {stream_, copies_})
    if (stream != nullptr) cudaStreamSynchronize(stream), cudaStreamDestroy(stream);
  if (last_done_ != nullptr) cudaEventDestroy(last_done_);
  cudaFree(state_);
  cudaFree(counters_.peers);
  cudaFree(device_peers_);
  cudaFree(nodes_);
  cudaFreeHost(mailbox_);
  cudaFreeHost(first_row_);
}

void Context::copy(void* dst, const void* src, std::size_t bytes, cudaMemcpyKind kind) const {
  const OutsideCapture outside;
  cuda::check(cudaMemcpyAsync(dst, src, bytes, kind, copies_), "cudaMemcpyAsync");
  cuda::check(cudaStreamSynchronize(copies_), "cudaStreamSynchronize");
}

void Context::upload_peers() { copy(device_peers_, peers_.data(), sizeof(Peer) * num_ranks, cudaMemcpyHostToDevice); }

// Calls
// ---------------------------------------------------------------------------------------------------------------------

Call Context::begin_local(Stream stream) {
  Call call;
  call.wait = stream == nullptr;
  call.stream = call.wait ? stream_ : static_cast<cudaStream_t>(stream);
  take_turn(call);
  return call;
}

// Calls of one buffer run one after the other, whatever streams they come on.
void Context::take_turn(Call& call) {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda::check(cudaStreamIsCapturing(call.stream, &status), "cudaStreamIsCapturing");
  call.capturing = capturing_ = status != cudaStreamCaptureStatusNone;
  captured_.clear();  // of a call that failed
  if (!call.capturing && last_stream_ != nullptr && last_stream_ != call.stream)
    cuda::check(cudaStreamWaitEvent(call.stream, last_done_), "cudaStreamWaitEvent");
  returns_->sweep(completed());
  sweep_graphs();
}

Call Context::plain_call(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers) {
  const bool low_latency = operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine;
  Call call = begin_local(stream);
  call.operation = operation;
  call.timeout = timeout;
  call.blocks = num_workers > 0 ? std::min(num_workers, most_blocks_)
                : low_latency   ? low_latency_blocks_
                                : default_blocks_;
  call.number = ++operations_;
  count_launch(call);
  return call;
}

void Context::count_launch(Call& call) {
  call.serial = ++serial_;
  returns_->note_call(call.serial);
}

Call Context::resume(const Call& sent) {
  Call call = sent;
  take_turn(call);
  count_launch(call);
  return call;
}

// Found here, because on the device it would be a wait for ourselves.
void Context::refuse_where_tickets_are_open(const Call& call) {
  const bool low_latency =
      call.operation == Operation::kLowLatencyDispatch || call.operation == Operation::kLowLatencyCombine;
  const auto depth = static_cast<std::uint64_t>(low_latency ? std::min(plan::kOperationsInFlight, config.num_tickets)
                                                            : plan::kOperationsInFlight);
  if (open_tickets_.empty() || *open_tickets_.begin() + depth > call.number) return;
  const std::string why = fmt::format(
      "{}: the ticket of operation {} is still open, and {} needs its place: receive it first (num_tickets "
      "= {})",
      name(call.operation), *open_tickets_.begin(), call.number, config.num_tickets);
  refuse(call, why);
  throw Error(ErrorCode::kInvalidArgument, why);
}

Call Context::begin(Operation operation, Stream stream, std::chrono::milliseconds timeout, int num_workers) {
  count([](Statistics& statistics) { ++statistics.operations; });
  Call call = plain_call(operation, stream, timeout, num_workers);
  Fault fault;
  if (!call.capturing && take_fault(fault)) {
    launch_refusal(call, fmt::format("an earlier call of rank {} had failed", rank));
    end(call);
    raise(fault);
  }
  refuse_where_tickets_are_open(call);
  sweep();
  return call;
}

Common Context::common(const Call& call, const Signature& signature) const {
  Common common{};
  common.state = state_;
  common.mailbox = device_mailbox_;
  common.counters = counters_;
  common.peers = device_peers_;
  common.layout = layout_;
  common.rank = rank;
  common.num_ranks = num_ranks;
  common.operation = call.operation;
  common.timeout_ns = static_cast<std::uint64_t>(std::chrono::nanoseconds(call.timeout).count());
  common.serial = call.serial;
  std::copy(signature.fields.begin(), signature.fields.end(), common.signature);
  return common;
}

void Context::launched(const Call& call) {
  if (const cudaError_t code = cudaGetLastError(); code != cudaSuccess)
    cuda::check(code, fmt::format("launching {}", name(call.operation)));
  if (call.capturing) {
    give_to_graph(call.stream, std::exchange(captured_, {}));
    return;
  }
  cuda::check(cudaEventRecord(last_done_, call.stream), "cudaEventRecord");
  last_stream_ = call.stream;
}

void Context::end(const Call& call) {
  end_sending(call);
  if (call.wait && !call.capturing) raise_fault();
}

void Context::end_sending(const Call& call) {
  launched(call);
  if (call.wait && !call.capturing) cuda::check(cudaStreamSynchronize(call.stream), name(call.operation));
}

void Context::await_counts(const Call& call) {
  cuda::check(cudaGetLastError(), fmt::format("launching {}", name(call.operation)));
  // The kernel has the deadline; the host's is a net below it, for a GPU that does not answer at all.
  const auto deadline = Clock::now() + 2 * call.timeout + std::chrono::seconds(10);
  const std::atomic_ref<std::uint64_t> counted(mailbox_->counted);
  while (counted.load(std::memory_order_acquire) != call.serial) {
    if (Clock::now() < deadline) continue;
    cuda::check(cudaStreamQuery(call.stream), name(call.operation));
    throw Error(ErrorCode::kSystem, fmt::format("{}: the GPU did not answer", name(call.operation)));
  }
  raise_fault();
}

void Context::launch_refusal(const Call& call, const std::string& why) {
  RefuseParams params{};
  params.common = common(call, Signature{});
  why.copy(params.text, sizeof params.text - 1);
  launch_refuse(params, call.stream);
}

void Context::refuse(Operation operation, const std::string& why) {
  count([](Statistics& statistics) { ++statistics.refused; });
  refuse(plain_call(operation, nullptr, config.timeout, 1), why);
}

void Context::refuse(const Call& begun, const std::string& why) {
  launch_refusal(begun, why);
  end(begun);
}

void Context::check() {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  if (last_stream_ != nullptr) cuda::check(cudaEventSynchronize(last_done_), "cudaEventSynchronize");
  raise_fault();
}

// Faults
// ---------------------------------------------------------------------------------------------------------------------

bool Context::take_fault(Fault& fault) {
  const std::atomic_ref<std::uint32_t> kind(mailbox_->fault.kind);
  // Acquire: the kernel wrote the record, fenced, then set the kind.
  if (kind.load(std::memory_order_acquire) == Fault::kNone) return false;
  fault = mailbox_->fault;
  // A peer may still write where we offered room in that operation: kept until all have left it.
  while (!in_doubt_.empty()) {
    quarantine_.emplace_back(fault.epoch, std::move(in_doubt_.front().block));
    in_doubt_.pop_front();
  }
  kind.store(Fault::kNone, std::memory_order_release);
  return true;
}

void Context::raise_fault() {
  Fault fault;
  if (take_fault(fault)) raise(fault);
}

void Context::raise(const Fault& fault) {
  const auto operation = static_cast<Operation>(fault.phase);
  const bool late = fault.kind == Fault::kTimeout || fault.kind == Fault::kGaveUp;
  count([&](Statistics& statistics) { ++(late ? statistics.timeouts : statistics.refused); });
  switch (static_cast<Fault::Kind>(fault.kind)) {
    case Fault::kTimeout:
      throw Error(WaitRecord{rank, name(operation), fault.peer, fault.epoch, static_cast<std::uint64_t>(fault.expected),
                             static_cast<std::uint64_t>(fault.seen), windows_[fault.peer]->owner_gone()});
    case Fault::kGaveUp:
      throw Error(WaitRecord{rank, "combine (that rank gave up first)", fault.peer, fault.epoch, 1, 0, false});
    case Fault::kDiffers: {
      Signature ours, theirs;
      ours.fields[fault.field] = fault.expected;
      theirs.fields[fault.field] = fault.seen;
      ours.require_same(theirs, rank, fault.peer);
      break;
    }
    case Fault::kBadId:
      require(false, "rank {} refused this {}: topk_idx: selection {} is expert {}, which does not exist", fault.peer,
              name(operation), fault.expected, fault.seen);
      break;
    case Fault::kRefused:
      require(false, "rank {} refused this {}: {}", fault.peer, name(operation), fault.refusal);
      break;
    case Fault::kNoRoom:
      require(false, "arena_bytes: rank {} needs {} bytes of arena for this dispatch, {} are free there", fault.peer,
              fault.expected, fault.seen);
      break;
    case Fault::kFullSlot:
      require(false, "kPadded: a slot of rank {} would get {} rows, it has room for {}", fault.peer, fault.expected,
              fault.seen);
      break;
    case Fault::kTooManyRows:
      require(false, "max_rows: rank {} would receive {} rows, max_rows there is {}", fault.peer, fault.expected,
              fault.seen);
      break;
    case Fault::kNone: break;
  }
  throw Error(ErrorCode::kSystem, "a fault of unknown kind was reported");
}

// Memory
// ---------------------------------------------------------------------------------------------------------------------

std::uint64_t Context::completed() const {
  return std::atomic_ref<std::uint64_t>(mailbox_->completed).load(std::memory_order_acquire);
}

// Blocks whose call ended well go; quarantined ones once every peer has left their operation.
void Context::sweep() {
  const std::uint64_t done = completed();
  while (!in_doubt_.empty() && in_doubt_.front().serial <= done) in_doubt_.pop_front();
  if (quarantine_.empty()) return;
  const std::size_t line = plan::WindowLayout::kLine;
  std::vector<std::byte> words(line * num_ranks);
  copy(words.data(), window() + layout_.released(0), words.size(), cudaMemcpyDeviceToHost);
  std::uint64_t left = UINT64_MAX;
  for (int peer = 0; peer < num_ranks; ++peer) {
    std::uint64_t released = 0;
    std::memcpy(&released, words.data() + line * peer + offsetof(Progress, sent), sizeof released);
    if (!windows_[peer]->owner_gone()) left = std::min(left, released);
  }
  std::erase_if(quarantine_, [&](const auto& entry) { return entry.first <= left; });
}

plan::Arena::Block Context::arena_block(std::size_t bytes, bool anywhere, const Call& call) {
  plan::Arena::Block block = arena_block(bytes, anywhere);
  if (block.owner || call.capturing) {
    block.owner = kept(std::move(block.owner));
    return block;
  }
  returns_->reclaim(call.stream);
  if (block = arena_block(bytes, anywhere); block.owner || in_doubt_.empty()) return block;
  if (last_stream_ != nullptr) cuda::check(cudaEventSynchronize(last_done_), "cudaEventSynchronize");
  sweep();
  return arena_block(bytes, anywhere);
}

plan::Arena::Block Context::arena_block(std::size_t bytes, bool anywhere) {
  plan::Arena::Block block = arena_->allocate(bytes, false);
  if (!block.owner && anywhere) block = arena_->allocate(bytes, true);
  no_pages_ = block.owner && !grow_arena(block.at + block.bytes);
  return no_pages_ ? plan::Arena::Block{} : block;
}

plan::Arena::Block Context::arena_reservation(std::size_t most) {
  return arena_->reserve(most, windows_[rank]->mapped());
}

// Pages for all of the window up to there. Without them there is no room, as where the arena is full.
bool Context::grow_arena(std::size_t upto) {
  const OutsideCapture outside;
  std::vector<int> masked;
  for (int peer = 0; peer < num_ranks; ++peer)
    if (peers_[peer].active == 0) masked.push_back(peer);
  return windows_[rank]->grow(upto, masked, config.timeout) == Window::Growth::kDone;
}

std::size_t Context::arena_room() const {
  return no_pages_ ? windows_[rank]->mapped() - layout_.arena_at : arena_->largest_free();
}

void Context::keep_in_doubt(const Call& call, std::shared_ptr<void> block) {
  if (block && !call.capturing) in_doubt_.push_back({call.serial, std::move(block)});
}

void Context::not_in_doubt(const Call& call) {
  std::erase_if(in_doubt_, [&](const Doubt& doubt) { return doubt.serial == call.serial; });
}

std::shared_ptr<void> Context::local(std::size_t bytes) {
  const OutsideCapture outside;
  for (const auto& slab : slabs_)
    if (plan::Arena::Block block = slab->allocate(bytes, true); block.owner) return kept(std::move(block.owner));
  const std::size_t size = std::max(kFirstSlab << slabs_.size(), 2 * bytes);
  void* memory = nullptr;
  cuda::check(cudaMalloc(&memory, size), fmt::format("cudaMalloc of {} bytes", size));
  std::shared_ptr<void> owner(memory, [](void* p) { cudaFree(p); });
  slabs_.push_back(std::make_shared<plan::Arena>(std::move(owner), static_cast<std::byte*>(memory), 0, size));
  return kept(slabs_.back()->allocate(bytes, true).owner);
}

// What a captured call takes belongs to its graph too: every replay uses it.
std::shared_ptr<void> Context::kept(std::shared_ptr<void> owner) {
  if (capturing_ && owner) captured_.push_back(owner);
  return owner;
}

struct Context::GraphMemory {
  std::mutex mutex;
  std::multimap<std::size_t, std::shared_ptr<void>> free;  // by bytes

  std::shared_ptr<void> take(std::size_t& bytes) {
    std::lock_guard lock(mutex);
    const auto found = free.lower_bound(bytes);
    if (found == free.end() || found->first > 2 * bytes) return nullptr;
    bytes = found->first;
    std::shared_ptr<void> memory = std::move(found->second);
    free.erase(found);
    return memory;
  }
  void give(std::size_t bytes, std::shared_ptr<void> memory) {
    std::lock_guard lock(mutex);
    free.emplace(bytes, std::move(memory));
  }
};

std::shared_ptr<void> Context::output_memory(std::size_t bytes, const Call& call) {
  const auto fresh = [&] {
    plan::Arena::Block block = arena_block(bytes, false);
    if (!block.owner && !call.capturing) {
      returns_->reclaim(call.stream);
      block = arena_block(bytes, false);
    }
    return block.owner ? block.owner : local(bytes);
  };
  if (!call.capturing) return fresh();
  std::shared_ptr<void> memory = graph_memory_->take(bytes);
  if (!memory) memory = fresh();
  void* const at = memory.get();
  return {at, [pool = graph_memory_, bytes, memory](void*) mutable { pool->give(bytes, std::move(memory)); }};
}

Tensor Context::local_tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view(static_cast<void*>(nullptr), dtype, shape);
  auto owner = local(std::max<std::size_t>(view.bytes(), 1));
  view.data = owner.get();
  return Tensor(view, std::move(owner));
}

const DevicePlacement& Context::on_device(const std::shared_ptr<const Placement>& placement) {
  DevicePlacement& entry = placements_[placement.get()];
  if (entry.placement) return entry;
  const auto first = placement->first_replica();
  const auto replicas = placement->all_replicas();
  std::vector<std::int32_t> words(first.begin(), first.end());
  for (const Placement::Replica& replica : replicas) words.push_back(replica.rank), words.push_back(replica.slot);
  const std::size_t copies_at = words.size();
  words.push_back(0);
  for (int r = 0; r < num_ranks; ++r) words.push_back(words.back() + placement->num_slots(r));
  entry.memory = local(words.size() * sizeof(std::int32_t));
  copy(entry.memory.get(), words.data(), words.size() * sizeof(std::int32_t), cudaMemcpyHostToDevice);
  const auto* at = static_cast<const std::int32_t*>(entry.memory.get());
  entry.view = {at, reinterpret_cast<const Placement::Replica*>(at + first.size()), nodes_, placement->policy()};
  entry.first_copy = at + copies_at;
  entry.num_copies = static_cast<int>(replicas.size());
  entry.placement = placement;
  return entry;
}

// Masks and statistics
// ---------------------------------------------------------------------------------------------------------------------

void Context::set_masked(int peer, bool masked) {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  if (last_stream_ != nullptr) cuda::check(cudaEventSynchronize(last_done_), "cudaEventSynchronize");
  peers_[peer].active = masked ? 0 : 1;
  upload_peers();
}

std::size_t Context::counters_bytes() const {
  return sizeof(Statistics::Peer) * num_ranks + sizeof(std::uint64_t) * config.max_experts;
}

void Context::show_slots(int num_slots) {
  count([&](Statistics& statistics) {
    if (statistics.rows_per_slot.size() < static_cast<std::size_t>(num_slots))
      statistics.rows_per_slot.resize(num_slots);
  });
}

// Read beside whatever runs, on a stream of its own.
Statistics Context::statistics() const {
  std::vector<std::byte> counted(counters_bytes());
  copy(counted.data(), counters_.peers, counted.size(), cudaMemcpyDeviceToHost);
  std::lock_guard lock(mutex_);
  Statistics result = statistics_;
  const std::size_t peers = sizeof(Statistics::Peer) * num_ranks;
  std::memcpy(result.peers.data(), counted.data(), peers);
  std::memcpy(result.rows_per_slot.data(), counted.data() + peers, sizeof(std::uint64_t) * result.rows_per_slot.size());
  result.arena_bytes_in_use = arena_->in_use();
  result.arena_bytes_high_water = arena_->high_water();
  return result;
}

void Context::reset_statistics() {
  const OutsideCapture outside;
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  cuda::check(cudaMemsetAsync(counters_.peers, 0, counters_bytes(), copies_), "cudaMemsetAsync");
  cuda::check(cudaStreamSynchronize(copies_), "cudaStreamSynchronize");
  std::lock_guard lock(mutex_);
  statistics_ = {};
  statistics_.peers.resize(num_ranks);
}

}  // namespace deep_ep::cuda
