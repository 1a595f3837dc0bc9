// SPDX-License-Identifier: MIT
// A buffer's memory: blocks of the arena that peers write, those that are in doubt, and memory that only this rank
// uses.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cuda/capture.h"
#include "cuda/context.h"
#include "cuda/failure.h"
#include "cuda/graph_memory.h"
#include "cuda/own_memory.h"

namespace deep_ep::cuda {
std::uint64_t Context::completed() const {
  return std::atomic_ref<std::uint64_t>(mailbox_->completed).load(std::memory_order_acquire);
}

// Blocks whose call ended well go; quarantined ones once every peer has left their operation.
void Context::sweep() {
  const std::uint64_t done = completed();
  if (fault_waits()) quarantine_doubts();  // seen, where a call that has ended left one: it did before it ended
  while (!in_doubt_.empty() && in_doubt_.front().serial <= done) in_doubt_.pop_front();
  if (!quarantine_.empty()) sweep_quarantine(done);
}

// A peer may still write where we offered room, in the operation that failed or in one that was enqueued behind it.
void Context::quarantine_doubts() {
  for (Doubt& doubt : in_doubt_) quarantine_.push_back({std::move(doubt), std::nullopt});
  in_doubt_.clear();
}

// Epochs are counted on the device, where graphs replay: what the device has counted once a call has ended is that
// call's epoch or a later one.
void Context::sweep_quarantine(std::uint64_t done) {
  std::uint64_t counted = 0;
  copy(&counted, &state_->epoch, sizeof counted, cudaMemcpyDeviceToHost);
  for (Quarantined& entry : quarantine_)
    if (!entry.epoch && entry.of.serial <= done) entry.epoch = counted;
  const std::size_t line = plan::WindowLayout::kLine;
  std::vector<std::byte> words(line * num_ranks);
  copy(words.data(), window() + layout_.released(0), words.size(), cudaMemcpyDeviceToHost);
  std::uint64_t left = UINT64_MAX;
  for (int peer = 0; peer < num_ranks; ++peer) {
    std::uint64_t released = 0;
    std::memcpy(&released, words.data() + line * peer + offsetof(Progress, sent), sizeof released);
    // Far ranks write nothing here: a rank of our node passes their rows on.
    if (!is_far(peer) && !is_gone(peer)) left = std::min(left, released);
  }
  std::erase_if(quarantine_, [&](const Quarantined& entry) { return entry.epoch && *entry.epoch <= left; });
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
  const std::vector<Peer> now = peers();
  for (int peer = 0; peer < num_ranks; ++peer)
    if (now[peer].active == 0) masked.push_back(peer);
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

std::shared_ptr<void> Context::local(std::size_t bytes) { return kept(piece_of(local_, bytes)); }

std::shared_ptr<void> Context::piece_of(Slabs& slabs, std::size_t bytes) {
  const OutsideCapture outside;
  for (const auto& slab : slabs.all)
    if (plan::Arena::Block block = slab->allocate(bytes, true); block.owner) return std::move(block.owner);
  const std::size_t size = std::max(slabs.first << slabs.all.size(), 2 * bytes);
  std::shared_ptr<std::byte> memory = own_device_memory(device, sharing_, size);
  std::byte* const base = memory.get();
  slabs.all.push_back(std::make_shared<plan::Arena>(std::move(memory), base, 0, size));
  return slabs.all.back()->allocate(bytes, true).owner;
}

// What a captured call takes belongs to its graph too: every replay uses it.
std::shared_ptr<void> Context::kept(std::shared_ptr<void> owner) {
  if (capturing_ && owner) captured_.push_back(owner);
  return owner;
}

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

namespace {

// As DevicePlacement::even.
int experts_of_each(const Placement& placement, int num_ranks) {
  const auto replicas = placement.all_replicas();
  const int copies = static_cast<int>(replicas.size()), each = copies / num_ranks;
  if (each * num_ranks != copies || placement.first_replica().size() != replicas.size() + 1) return 0;
  for (int expert = 0; expert < copies; ++expert)
    if (replicas[expert].rank != expert / each || replicas[expert].slot != expert % each) return 0;
  return each;
}

}  // namespace

const DevicePlacement& Context::on_device(const std::shared_ptr<const Placement>& placement, const Call& call) {
  DevicePlacement& entry = placements_[placement.get()];
  if (entry.placement) return entry;
  const auto first = placement->first_replica();
  const auto replicas = placement->all_replicas();
  std::vector<std::int32_t> words(first.begin(), first.end());
  for (const Placement::Replica& replica : replicas) words.push_back(replica.rank), words.push_back(replica.slot);
  const std::size_t copies_at = words.size();
  words.push_back(0);
  for (int r = 0; r < num_ranks; ++r) words.push_back(words.back() + placement->num_slots(r));
  const std::size_t bytes = words.size() * sizeof(std::int32_t);
  entry.source = own_pinned_memory(bytes);
  std::memcpy(entry.source.get(), words.data(), bytes);
  // Not of local(): calls that are enqueued may use pieces of it that are free here.
  entry.memory = piece_of(tables_, bytes);
  // With the call's kernels, in whose queue nothing of others stands: from another stream this copy could stand behind
  // kernels of a rank that waits for us. A graph may never run, or later than calls that need the tables too.
  if (call.capturing)
    copy(entry.memory.get(), entry.source.get(), bytes, cudaMemcpyHostToDevice);
  else
    cuda::check(cudaMemcpyAsync(entry.memory.get(), entry.source.get(), bytes, cudaMemcpyHostToDevice, call.stream),
                "cudaMemcpyAsync");
  const auto* at = static_cast<const std::int32_t*>(entry.memory.get());
  entry.view = {at, reinterpret_cast<const Placement::Replica*>(at + first.size()), nodes_, placement->policy()};
  entry.first_copy = at + copies_at;
  entry.num_copies = static_cast<int>(replicas.size());
  entry.even = experts_of_each(*placement, num_ranks);
  entry.placement = placement;
  return entry;
}

}  // namespace deep_ep::cuda
