// SPDX-License-Identifier: MIT
#include "cuda/context.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <thread>

#include "check.h"
#include "cuda/capture.h"
#include "cuda/failure.h"
#include "cuda/forward_combine.h"
#include "cuda/forward_dispatch.h"
#include "cuda/gpus.h"
#include "cuda/graph_memory.h"
#include "cuda/low_latency.h"
#include "cuda/own_memory.h"
#include "introduction.h"
#include "plan/align.h"

namespace deep_ep::cuda {

namespace {

constexpr std::size_t kFirstArenaPages = std::size_t{64} << 20;
constexpr std::size_t kMaxDefaultArena = std::size_t{16} << 30;

int device_of(const Options& options) {
  int device = options.cuda_device;
  if (device < 0) cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaSetDevice(device), fmt::format("cudaSetDevice({})", device));
  return device;
}

// An eighth of one rank's share of the GPU, so that there is room for the model.
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
  bool of_node = false;   // more than one in our node
  bool fabric = true;     // every GPU is in an NVLink fabric
};

struct Introduction {
  char gpu[16];
  std::uint8_t machine[16];
  bool fabric;
};

Neighbours meet_neighbours(const BackendInput& input, const cudaDeviceProp& info, int device) {
  Introduction mine{};
  static_assert(sizeof mine.gpu == sizeof info.uuid.bytes);
  const ProcessIdentity process = this_process();
  std::memcpy(mine.gpu, info.uuid.bytes, sizeof mine.gpu);
  std::memcpy(mine.machine, process.boot_id, sizeof mine.machine);
  mine.fabric = in_fabric(device);
  const auto* bytes = reinterpret_cast<const std::byte*>(&mine);
  const auto all = input.group->all_gather({bytes, sizeof mine}, input.config.open_timeout);
  Neighbours neighbours;
  for (int peer = 0; peer < static_cast<int>(all.size()); ++peer) {
    Introduction theirs{};
    std::memcpy(&theirs, all[peer].data(), std::min(all[peer].size(), sizeof theirs));
    const bool same_machine = std::memcmp(theirs.machine, mine.machine, sizeof mine.machine) == 0;
    neighbours.ranks_here += same_machine && std::memcmp(theirs.gpu, mine.gpu, sizeof mine.gpu) == 0;
    neighbours.machines = neighbours.machines || !same_machine;
    neighbours.of_node = neighbours.of_node || (!same_machine && input.topology.same_node(input.group->rank(), peer));
    neighbours.fabric = neighbours.fabric && theirs.fabric;
  }
  return neighbours;
}

// The network's interface should be near to this GPU, unless the caller said otherwise.
Config near_gpu(Config config, int device) {
  if (!config.network.near_pci_device.empty()) return config;
  config.network.near_pci_device = pci_address(device);
  return config;
}

// For the link. Kernels and the network know it by one address.
std::shared_ptr<std::byte> pinned_pages(std::size_t bytes) {
  auto pages = own_pinned_memory(bytes);
  void* seen_by_kernels = nullptr;
  cuda::check(cudaHostGetDevicePointer(&seen_by_kernels, pages.get(), 0), "cudaHostGetDevicePointer");
  if (seen_by_kernels != pages.get())
    throw Error(ErrorCode::kUnsupported, "a network between GPUs needs unified addresses for pinned memory");
  return pages;
}

}  // namespace

void require_device(const Options& options) { device_of(options); }

// Opening
// ---------------------------------------------------------------------------------------------------------------------

Context::Context(const BackendInput& input)
    : rank(input.group->rank()),
      num_ranks(input.group->num_ranks()),
      device(device_of(input.options)),
      topology(input.topology),
      config(near_gpu(input.config, device)),
      peers_(num_ranks) {
  cudaDeviceProp info;
  cuda::check(cudaGetDeviceProperties(&info, device), "cudaGetDeviceProperties");
  const Neighbours neighbours = meet_neighbours(input, info, device);
  const int ranks_here = neighbours.ranks_here;
  neighbourhood_ = {ranks_here, num_ranks - ranks_here};
  most_blocks_ = std::max(1, info.multiProcessorCount / ranks_here);
  default_blocks_ = input.options.num_workers > 0 ? std::min(most_blocks_, input.options.num_workers)
                                                  : plan::default_sms(neighbourhood_, most_blocks_);
  low_latency_blocks_ = input.options.num_workers > 0 ? default_blocks_ : most_blocks_;
  layout_ = plan::WindowLayout::place(config, num_ranks, arena_bytes(config, ranks_here));

  stream_.emplace(StreamUse::kExchange);
  // A copy must not stand behind kernels of a rank of this process that wait for us.
  copies_.emplace(StreamUse::kShort);
  cuda::check(cudaEventCreateWithFlags(&last_done_, cudaEventDisableTiming), "cudaEventCreate");
  returns_ = std::make_shared<Returns>(device);
  needs_network_ =
      topology.num_nodes > 1 && (!config.network.provider.empty() || (neighbours.machines && !neighbours.fabric));
  sharing_ = choose_sharing(device, needs_network_ ? neighbours.of_node : neighbours.machines);
  place_own_memory();
  piece_of(local_, 1), piece_of(tables_, 1);  // the first slabs
  graph_memory_ = std::make_shared<GraphMemory>();
  prepare_kernels();
  sweep_graphs();  // memory of graphs that are gone: the first call finds none to free
  statistics_.peers.resize(num_ranks);
  open_windows(*input.group);
  if (needs_network_) open_link(*input.group);
}

// What only this rank's kernels and its host thread use.
void Context::place_own_memory() {
  std::size_t end = 0;
  const std::size_t state_at = plan::take(end, sizeof(State)), counters_at = plan::take(end, counters_bytes()),
                    peers_at = plan::take(end, sizeof(Peer) * num_ranks),
                    nodes_at = plan::take(end, sizeof(std::int32_t) * num_ranks),
                    pushed_at = plan::take(end, sizeof(Pushed)),
                    slot_use_at = plan::take(end, sizeof(SlotUse) * num_ranks),
                    passed_on_at = plan::take(end, sizeof(PassedOn) * num_ranks);
  on_device_ = own_device_memory(device, sharing_, end);
  cuda::check(cudaMemsetAsync(on_device_.get(), 0, end, copies_->get()), "cudaMemsetAsync");
  state_ = reinterpret_cast<State*>(on_device_.get() + state_at);
  counters_.peers = reinterpret_cast<Statistics::Peer*>(on_device_.get() + counters_at);
  counters_.rows_per_slot = reinterpret_cast<std::uint64_t*>(counters_.peers + num_ranks);
  counters_.puts_while_packing = counters_.rows_per_slot + config.max_experts;
  device_peers_ = reinterpret_cast<Peer*>(on_device_.get() + peers_at);
  nodes_ = reinterpret_cast<std::int32_t*>(on_device_.get() + nodes_at);
  far_.pushed = reinterpret_cast<Pushed*>(on_device_.get() + pushed_at);
  far_.passed_on = reinterpret_cast<PassedOn*>(on_device_.get() + passed_on_at);
  far_.slot_use = reinterpret_cast<SlotUse*>(on_device_.get() + slot_use_at);
  copy(nodes_, topology.node_of_rank.data(), sizeof(std::int32_t) * num_ranks, cudaMemcpyHostToDevice);

  end = 0;
  const std::size_t mailbox_at = plan::take(end, sizeof(Mailbox)),
                    first_row_at = plan::take(end, sizeof(std::int32_t) * (config.max_experts + 1));
  pinned_ = own_pinned_memory(end);
  std::byte* seen_by_kernels = nullptr;
  cuda::check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&seen_by_kernels), pinned_.get(), 0),
              "cudaHostGetDevicePointer");
  mailbox_ = reinterpret_cast<Mailbox*>(pinned_.get() + mailbox_at);
  device_mailbox_ = reinterpret_cast<Mailbox*>(seen_by_kernels + mailbox_at);
  first_row_ = reinterpret_cast<std::int32_t*>(pinned_.get() + first_row_at);
  device_first_row_ = reinterpret_cast<std::int32_t*>(seen_by_kernels + first_row_at);
}

void Context::open_windows(Bootstrap& group) {
  const std::size_t first = layout_.arena_at + std::min(layout_.arena_bytes, kFirstArenaPages);
  auto own = Window::create({device, sharing_, layout_.total_bytes, first});
  // Everything before the arena; on the device before any peer is told of it.
  cuda::check(cudaMemset(own->base(), 0, layout_.arena_at), "cudaMemset of a window");
  cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  own->offer();
  const auto addresses = exchange_addresses(group, own->address(), config);
  windows_.resize(num_ranks);
  std::optional<Error> failure;
  try {
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (is_far(peer)) continue;
      const WindowAddress& address = addresses[peer];
      windows_[peer] = peer == rank ? own : Window::open(address, {device, rank, config.open_timeout});
      const bool same = std::memcmp(address.device_uuid, own->address().device_uuid, sizeof address.device_uuid) == 0;
      peers_[peer] = {.window = windows_[peer]->base(),
                      .inbox = own->base(),
                      .active = 1,
                      .same_device = same,
                      .far = 0,
                      .inbox_region = 0,
                      .slots_region = 0};
    }
    upload_peers();  // before the others may call: a copy could stand behind kernels that wait for us
  } catch (const Error& error) {
    failure = error;
  }
  failure = first_failure(group, failure, config.open_timeout);
  own->seal();
  if (failure) throw *failure;
  arena_ = std::make_shared<plan::Arena>(own, own->base(), layout_.arena_at, layout_.arena_bytes);
}

// Ranks of other nodes: what stands for their windows, and for ours where they write, is pinned memory.
void Context::open_link(Bootstrap& group) {
  const std::size_t slots = layout_.low_latency_ticket_bytes * static_cast<std::size_t>(layout_.num_tickets);
  far_control_ = pinned_pages(plan::FarMemory::mirror_bytes(layout_));
  far_slots_ = pinned_pages(std::max<std::size_t>(slots, 1));
  kernel_end_ = pinned_pages(net::KernelEnd::bytes(num_ranks));
  auto* const kernels = reinterpret_cast<net::KernelEnd*>(kernel_end_.get());  // zeroed
  link_ = std::make_unique<net::Link>(net::LinkInput{.group = group,
                                                     .config = config,
                                                     .topology = topology,
                                                     .layout = layout_,
                                                     .control = far_control_.get(),
                                                     .low_latency = far_slots_.get(),
                                                     .doorbell = doorbell_,
                                                     .kernels = kernels,
                                                     .memory = pinned_pages});
  far_.end = kernels;
  far_.chunks = link_->chunk(0, 0);
  far_.inbox = link_->inbox();
  far_.slot_bytes = link_->slot_bytes();
  far_.staging = link_->low_latency(0, 0);
  far_.slots = far_slots_.get();
  far_.chunk_region = link_->chunk_region();
  far_.staging_region = link_->low_latency_region();
  for (int peer = 0; peer < num_ranks; ++peer)
    if (is_far(peer))
      peers_[peer] = {.window = link_->mirror(peer),
                      .inbox = far_control_.get(),
                      .active = 1,
                      .same_device = 0,
                      .far = 1,
                      .inbox_region = link_->inbox_region_of(peer),
                      .slots_region = link_->slots_region_of(peer)};
  upload_peers();
  group.all_gather({}, config.open_timeout);  // nobody calls before all know their peers
}

// Loads every kernel now: a load while another rank's kernel spins would wait for it. So would the first launch of one
// that needs more local memory for each thread than CUDA has set aside.
void Context::prepare_kernels() {
  int most = 0;
  std::size_t local = 0, set_aside = 0;
  cuda::check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  shared_limit_ = most - 4096;  // what kernels declare themselves, and what CUDA keeps
  const auto prepare = [&](const void* kernel) {
    cudaFuncAttributes attributes;
    cuda::check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel for this GPU");
    cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - static_cast<int>(attributes.sharedSizeBytes)),
                "cudaFuncSetAttribute");
    local = std::max(local, attributes.localSizeBytes);
  };
  prepare(layout_kernel());
  prepare(notify_kernel());
  prepare(refuse_kernel());
  prepare(forward_plan_kernel());
  prepare(dispatch_kernel(false, DType::kU8));
  prepare(forward_dispatch_kernel(false, DType::kU8));
  prepare(low_latency_dispatch_kernel(false, DType::kU8, needs_network_));
  prepare(abandon_kernel());
  prepare(leave_out_silent_kernel());
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    prepare(dispatch_kernel(true, dtype));
    prepare(forward_dispatch_kernel(true, dtype));
    prepare(forward_combine_kernel(dtype));
    prepare(combine_kernel(dtype, false));
    prepare(combine_kernel(dtype, true));
    prepare(low_latency_dispatch_kernel(true, dtype, needs_network_));
    for (bool levels : {false, true})
      for (bool lines : {false, true}) prepare(low_latency_combine_kernel(dtype, levels, lines));
    if (dtype == DType::kFp32) continue;
    for (bool levels : {false, true})
      for (WireFormat wire : {WireFormat::kLogFmt10, WireFormat::kFp8})
        prepare(low_latency_combine_encoded_kernel(dtype, levels, wire));
  }
  cuda::check(cudaDeviceGetLimit(&set_aside, cudaLimitStackSize), "cudaDeviceGetLimit");
  if (local > set_aside) cuda::check(cudaDeviceSetLimit(cudaLimitStackSize, local), "cudaDeviceSetLimit");
}

Context::~Context() {
  // Enqueued calls have deadlines: this ends.
  cudaSetDevice(device);
  if (last_stream_ != nullptr) cudaEventSynchronize(last_done_);
  for (const auto& stream : {stream_, copies_})
    if (stream) cudaStreamSynchronize(stream->get());
  if (last_done_ != nullptr) cudaEventDestroy(last_done_);
}

void Context::copy(void* dst, const void* src, std::size_t bytes, cudaMemcpyKind kind) const {
  const OutsideCapture outside;
  cuda::check(cudaMemcpyAsync(dst, src, bytes, kind, copies_->get()), "cudaMemcpyAsync");
  copies_->wait("a copy of the buffer's own");
}

void Context::upload_peers() { copy(device_peers_, peers_.data(), sizeof(Peer) * num_ranks, cudaMemcpyHostToDevice); }

// Masks and statistics
// ---------------------------------------------------------------------------------------------------------------------

std::vector<Peer> Context::peers() const {
  std::vector<Peer> now = peers_;
  if (kernels_mask_) copy(now.data(), device_peers_, sizeof(Peer) * num_ranks, cudaMemcpyDeviceToHost);
  return now;
}

void Context::set_masked(int peer, bool masked) {
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  if (last_stream_ != nullptr) cuda::check(cudaEventSynchronize(last_done_), "cudaEventSynchronize");
  peers_ = peers();
  peers_[peer].active = masked ? 0 : 1;
  upload_peers();
}

std::size_t Context::counters_bytes() const {
  return sizeof(Statistics::Peer) * num_ranks + sizeof(std::uint64_t) * (config.max_experts + 1);
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
  std::memcpy(&result.puts_while_packing, counted.data() + peers + sizeof(std::uint64_t) * config.max_experts,
              sizeof result.puts_while_packing);
  result.arena_bytes_in_use = arena_->in_use();
  result.arena_bytes_high_water = arena_->high_water();
  return result;
}

void Context::reset_statistics() {
  const OutsideCapture outside;
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  cuda::check(cudaMemsetAsync(counters_.peers, 0, counters_bytes(), copies_->get()), "cudaMemsetAsync");
  copies_->wait("cudaMemsetAsync");
  std::lock_guard lock(mutex_);
  statistics_ = {};
  statistics_.peers.resize(num_ranks);
}

}  // namespace deep_ep::cuda
