// SPDX-License-Identifier: MIT
// The C calls before a buffer exists: groups, configuration, memory plan, placement.
#include <algorithm>

#include "capi/objects.h"

struct deep_ep_gathered {
  std::vector<deep_ep::Bootstrap::Blob> blobs;
  std::vector<bool> put;
};

namespace deep_ep::capi {

namespace {

TcpRendezvous rendezvous_of(const deep_ep_tcp* where) {
  if (where == nullptr) return TcpRendezvous::from_environment();
  const deep_ep_tcp w = read(where, "where", EP_END_OF(deep_ep_tcp, reserved));
  TcpRendezvous made;
  if (w.address != nullptr) made.address = w.address;
  if (w.port != 0) made.port = w.port;
  made.rank = w.rank;
  if (w.num_ranks != 0) made.num_ranks = w.num_ranks;
  if (w.job != nullptr) made.job = w.job;
  made.generation = w.generation;
  if (w.timeout_ms != 0) made.timeout = timeout_of(w.timeout_ms);
  return made;
}

AllGather all_gather_of(int num_ranks, deep_ep_all_gather_fn all_gather, void* user) {
  return [=](const Bootstrap::Blob& mine) {
    deep_ep_gathered gathered{std::vector<Bootstrap::Blob>(num_ranks), std::vector<bool>(num_ranks)};
    const int failure = all_gather(user, mine.data(), mine.size(), &gathered);
    if (failure != 0) {
      throw Error(ErrorCode::kSystem, fmt::format("the caller's all_gather returned {} instead of 0", failure));
    }
    const auto missing = std::find(gathered.put.begin(), gathered.put.end(), false) - gathered.put.begin();
    if (missing != num_ranks) {
      throw Error(ErrorCode::kSystem, fmt::format("the caller's all_gather put no blob of rank {}", missing));
    }
    return std::move(gathered.blobs);
  };
}

std::unique_ptr<deep_ep_group> group_object(std::shared_ptr<Bootstrap> group) {
  return std::unique_ptr<deep_ep_group>(new deep_ep_group{std::move(group)});
}

ExchangeShape shape_of(const deep_ep_exchange_shape* shape) {
  const deep_ep_exchange_shape s = read(&given(shape, "shape"), "shape", EP_END_OF(deep_ep_exchange_shape, row_bytes));
  ExchangeShape made;
  made.rows = s.rows;
  made.tokens = s.tokens;
  made.row_bytes = s.row_bytes;
  made.num_scales = s.num_scales;
  if (s.num_topk != 0) made.num_topk = s.num_topk;
  made.topk_weights = s.no_topk_weights == 0;
  made.topk_idx_64 = s.topk_idx_32 == 0;
  made.side_bytes = s.side_bytes;
  return made;
}

std::vector<std::vector<int>> hosted_of(const deep_ep_placement_lists& lists) {
  require(lists.num_ranks >= 1, "lists.num_ranks: {}, at least 1", lists.num_ranks);
  const int* const* hosted = &given(lists.hosted, "lists.hosted");
  const int* num_hosted = &given(lists.num_hosted, "lists.num_hosted");
  std::vector<std::vector<int>> made(lists.num_ranks);
  for (int rank = 0; rank < lists.num_ranks; ++rank) {
    require(num_hosted[rank] >= 0, "lists.num_hosted[{}]: {}, at least 0", rank, num_hosted[rank]);
    if (num_hosted[rank] == 0) continue;
    const int* experts = &given(hosted[rank], "lists.hosted[rank]");
    made[rank].assign(experts, experts + num_hosted[rank]);
  }
  return made;
}

}  // namespace
}  // namespace deep_ep::capi

using namespace deep_ep::capi;

extern "C" {

deep_ep_status deep_ep_group_tcp(const deep_ep_tcp* where, deep_ep_group** group) {
  return make_object(group, [&] { return group_object(deep_ep::tcp_group(rendezvous_of(where))); });
}

deep_ep_status deep_ep_group_in_process(int num_ranks, deep_ep_group* groups[]) {
  return guarded([&] {
    given(groups, "groups");
    std::vector<std::unique_ptr<deep_ep_group>> made;
    for (auto& group : deep_ep::in_process_group(num_ranks)) made.push_back(group_object(std::move(group)));
    for (std::size_t rank = 0; rank < made.size(); ++rank) groups[rank] = made[rank].release();
  });
}

deep_ep_status deep_ep_gathered_put(deep_ep_gathered* gathered, int rank, const void* data, size_t bytes) {
  return guarded([&] {
    auto& [blobs, put] = given(gathered, "gathered");
    const int num_ranks = static_cast<int>(blobs.size());
    deep_ep::require(rank >= 0 && rank < num_ranks, "rank: {}, ranks are 0 .. {}", rank, num_ranks - 1);
    deep_ep::require(!put[rank], "rank: the blob of rank {} was put before", rank);
    deep_ep::require(data != nullptr || bytes == 0, "data: NULL for {} bytes", bytes);
    const auto* from = static_cast<const std::byte*>(data);
    blobs[rank].assign(from, from + bytes);
    put[rank] = true;
  });
}

deep_ep_status deep_ep_group_callback(int rank, int num_ranks, deep_ep_all_gather_fn all_gather, void* user,
                                      deep_ep_group** group) {
  return make_object(group, [&] {
    deep_ep::require(all_gather != nullptr, "all_gather: NULL");
    return group_object(deep_ep::callback_group(rank, num_ranks, all_gather_of(num_ranks, all_gather, user)));
  });
}

int deep_ep_group_rank(const deep_ep_group* group) { return group != nullptr ? group->group->rank() : -1; }
int deep_ep_group_num_ranks(const deep_ep_group* group) { return group != nullptr ? group->group->num_ranks() : -1; }
void deep_ep_group_free(deep_ep_group* group) { delete group; }

deep_ep_status deep_ep_config_default(deep_ep_config* config) {
  return guarded([&] {
    const deep_ep::Config defaults;
    deep_ep_config c{};
    c.size = sizeof(c);
    c.max_experts = defaults.max_experts;
    c.low_latency_max_tokens_per_rank = defaults.low_latency.max_tokens_per_rank;
    c.low_latency_row_bytes = defaults.low_latency.row_bytes;
    c.low_latency_num_topk = defaults.low_latency.num_topk;
    c.low_latency_side_bytes = defaults.low_latency.side_bytes;
    c.arena_bytes = defaults.arena_bytes;
    c.num_tickets = defaults.num_tickets;
    c.timeout_ms = defaults.timeout.count();
    c.open_timeout_ms = defaults.open_timeout.count();
    write(config, c, "config", EP_END_OF(deep_ep_config, ranks_per_node));
  });
}

deep_ep_status deep_ep_plan(const deep_ep_config* config, int num_ranks, deep_ep_memory_plan** plan) {
  return make_object(plan, [&] {
    deep_ep::MemoryPlan made = config_of(config).plan(num_ranks);
    std::string text = made.to_string();
    return std::unique_ptr<deep_ep_memory_plan>(new deep_ep_memory_plan{std::move(made), std::move(text)});
  });
}

size_t deep_ep_plan_total_bytes(const deep_ep_memory_plan* plan) {
  return plan != nullptr ? plan->plan.total_bytes : 0;
}

int deep_ep_plan_num_regions(const deep_ep_memory_plan* plan) {
  return plan != nullptr ? static_cast<int>(plan->plan.regions.size()) : 0;
}

deep_ep_status deep_ep_plan_region(const deep_ep_memory_plan* plan, int index, deep_ep_memory_region* region) {
  return guarded([&] {
    const auto& regions = given(plan, "plan").plan.regions;
    const int num_regions = static_cast<int>(regions.size());
    deep_ep::require(index >= 0 && index < num_regions, "index: {}, regions are 0 .. {}", index, num_regions - 1);
    const deep_ep::MemoryRegion& r = regions[index];
    const deep_ep_memory_region made{sizeof(made), r.name.c_str(), r.why.c_str(), r.bytes};
    write(region, made, "region", sizeof(made));
  });
}

const char* deep_ep_plan_text(const deep_ep_memory_plan* plan) { return plan != nullptr ? plan->text.c_str() : ""; }
void deep_ep_plan_free(deep_ep_memory_plan* plan) { delete plan; }

deep_ep_status deep_ep_arena_bytes_for(const deep_ep_exchange_shape* shape, size_t* bytes) {
  return guarded([&] { given(bytes, "bytes") = deep_ep::arena_bytes_for(shape_of(shape)); });
}

deep_ep_status deep_ep_arena_rows(size_t arena_bytes, const deep_ep_exchange_shape* shape, int64_t* rows) {
  return guarded([&] { given(rows, "rows") = deep_ep::arena_rows(arena_bytes, shape_of(shape)); });
}

deep_ep_status deep_ep_placement_even(int num_experts, int num_ranks, deep_ep_placement** placement) {
  return make_object(placement, [&] {
    return std::unique_ptr<deep_ep_placement>(new deep_ep_placement{deep_ep::Placement::even(num_experts, num_ranks)});
  });
}

deep_ep_status deep_ep_placement_from_lists(const deep_ep_placement_lists* lists, deep_ep_placement** placement) {
  return make_object(placement, [&] {
    const auto given_lists = read(&given(lists, "lists"), "lists", EP_END_OF(deep_ep_placement_lists, num_hosted));
    const auto policy =
        static_cast<deep_ep::Placement::Policy>(checked_enum(given_lists.policy, DEEP_EP_LOCAL_FIRST, "lists.policy"));
    return std::unique_ptr<deep_ep_placement>(
        new deep_ep_placement{deep_ep::Placement::from_lists(hosted_of(given_lists), given_lists.num_experts, policy)});
  });
}

int deep_ep_placement_num_slots(const deep_ep_placement* placement, int rank) {
  if (placement == nullptr || rank < 0 || rank >= placement->placement->num_ranks()) return -1;
  return placement->placement->num_slots(rank);
}

int deep_ep_placement_expert_at(const deep_ep_placement* placement, int rank, int slot) {
  if (slot < 0 || slot >= deep_ep_placement_num_slots(placement, rank)) return -1;
  return placement->placement->expert_at(rank, slot);
}

uint64_t deep_ep_placement_fingerprint(const deep_ep_placement* placement) {
  return placement != nullptr ? placement->placement->fingerprint() : 0;
}

void deep_ep_placement_free(deep_ep_placement* placement) { delete placement; }

}  // extern "C"
