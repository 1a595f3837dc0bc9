// SPDX-License-Identifier: MIT
// Handle: what a dispatch made. Readable, and turned into tensors and back, to be saved or to pass through autograd.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <string>

#include "deep_ep/error.h"
#include "handles.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

namespace {

// Saved form: numbers, placement, then kHandleTensors; what is not given is an empty vector.
constexpr std::int64_t kSavedVersion = 1;
constexpr std::size_t kNumNumbers = 13;

Tensor numbers_of(const Handle& h) {
  Tensor tensor = Tensor::allocate(DType::kI64, {kNumNumbers});
  const std::array<std::int64_t, kNumNumbers> numbers{
      kSavedVersion,         static_cast<std::int64_t>(h.layout),
      h.num_ranks,           h.num_topk,
      h.num_experts,         h.expert_alignment,
      h.max_tokens_per_rank, h.low_latency,
      h.topk_idx_64,         static_cast<std::int64_t>(h.placement->policy()),
      h.num_tokens,          h.num_rows,
      h.num_arrivals};
  std::copy(numbers.begin(), numbers.end(), tensor.as<std::int64_t>());
  return tensor;
}

// For each rank how many experts it hosts, then which.
Tensor placement_of(const Placement& placement) {
  std::vector<std::int32_t> words;
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    words.push_back(placement.num_slots(rank));
    for (int slot = 0; slot < placement.num_slots(rank); ++slot) words.push_back(placement.expert_at(rank, slot));
  }
  Tensor tensor = Tensor::allocate(DType::kI32, {static_cast<std::int64_t>(words.size())});
  std::copy(words.begin(), words.end(), tensor.as<std::int32_t>());
  return tensor;
}

std::shared_ptr<const Placement> placement_from(const TensorView& saved, const Handle& h, Placement::Policy policy) {
  std::vector<std::vector<int>> hosted(h.num_ranks);
  const auto* word = saved.as<const std::int32_t>();
  for (auto& experts : hosted) {
    const int count = *word++;
    experts.assign(word, word + count);
    word += count;
  }
  return Placement::from_lists(hosted, h.num_experts, policy);
}

// Numbers and placement are on the CPU always.
nb::list save(const std::shared_ptr<Handle>& handle) {
  const Handle& h = *handle;
  nb::list saved;
  saved.append(to_torch(numbers_of(h)));
  saved.append(to_torch(placement_of(*h.placement)));
  for (const auto field : kHandleTensors) {
    if (!(h.*field).given())
      saved.append(to_torch(Tensor::allocate(DType::kI32, {0})));
    else
      saved.append(h.cuda_device == kCpu ? to_torch(copy_of(h.*field))
                                         : to_torch(tensor_of(handle, field), h.cuda_device));
  }
  return saved;
}

// Kept as it is, not copied.
void set_tensor(Handle& handle, std::size_t field, nb::handle given) {
  const char* name = kHandleTensorNames[field];
  Tensor tensor = hold(given, name);
  if (!tensor.contiguous())
    throw Error(ErrorCode::kInvalidArgument,
                "handle: its " + std::string(name) + " must be contiguous: " + describe(tensor));
  handle.*kHandleTensors[field] = std::move(tensor);
  handle.cuda_device = device_of(given, name);
}

std::shared_ptr<Handle> restore(const nb::sequence& saved) {
  const std::size_t expected = 2 + kHandleTensors.size();
  if (nb::len(saved) != expected)
    throw Error(ErrorCode::kInvalidArgument, "tensors of a saved handle: " + std::to_string(nb::len(saved)) +
                                                 " are given, " + std::to_string(expected) + " are expected");
  const TensorView numbers = view_of(saved[0], "numbers of a saved handle");
  if (numbers.dtype != DType::kI64 || numbers.numel() != kNumNumbers ||
      numbers.as<const std::int64_t>()[0] != kSavedVersion)
    throw Error(ErrorCode::kInvalidArgument, "this is no saved handle: its numbers are " + describe(numbers));
  const std::int64_t* n = numbers.as<const std::int64_t>();
  auto h = std::make_shared<Handle>();
  h->layout = static_cast<OutputLayout>(n[1]);
  h->num_ranks = static_cast<int>(n[2]);
  h->num_topk = static_cast<int>(n[3]);
  h->num_experts = static_cast<int>(n[4]);
  h->expert_alignment = static_cast<int>(n[5]);
  h->max_tokens_per_rank = static_cast<int>(n[6]);
  h->low_latency = n[7] != 0;
  h->topk_idx_64 = n[8] != 0;
  h->num_tokens = n[10];
  h->num_rows = n[11];
  h->num_arrivals = n[12];
  h->placement =
      placement_from(view_of(saved[1], "placement of a saved handle"), *h, static_cast<Placement::Policy>(n[9]));
  for (std::size_t i = 0; i < kHandleTensors.size(); ++i) {
    const nb::object tensor = saved[2 + i];
    // A matrix of no rows is a tensor that is there; "not given" was saved as a vector.
    if (nb::cast<int>(tensor.attr("ndim")) > 1 || nb::cast<std::int64_t>(tensor.attr("numel")()) > 0)
      set_tensor(*h, i, tensor);
  }
  return h;
}

// A handle from tensors that Python made, by the names of kHandleTensorNames; they are kept as they are.
std::shared_ptr<Handle> handle_from(OutputLayout layout, const std::shared_ptr<Placement>& placement, int num_topk,
                                    int expert_alignment, std::int64_t num_rows, std::int64_t num_arrivals,
                                    const nb::dict& tensors) {
  auto h = std::make_shared<Handle>();
  h->layout = layout;
  h->num_ranks = placement->num_ranks();
  h->num_topk = num_topk;
  h->num_experts = placement->num_experts();
  h->expert_alignment = expert_alignment;
  h->placement = placement;
  h->num_rows = num_rows;
  h->num_arrivals = num_arrivals;
  for (std::size_t i = 0; i < kHandleTensors.size(); ++i) {
    if (tensors.contains(kHandleTensorNames[i])) set_tensor(*h, i, tensors[kHandleTensorNames[i]]);
  }
  h->num_tokens = h->dst_rank.size(0);
  return h;
}

// The same routes for an output of so many rows: a bounded dispatch whose caller kept the valid rows only.
std::shared_ptr<Handle> with_rows(const Handle& handle, std::int64_t num_rows) {
  auto copy = std::make_shared<Handle>(handle);
  copy->num_rows = num_rows;
  if (copy->layout == OutputLayout::kByRank) copy->num_arrivals = num_rows;
  return copy;
}

// The same routes without the selections that `topk_idx`, at the tokens' home, has taken back since the dispatch.
std::shared_ptr<Handle> leave_out(const std::shared_ptr<Handle>& handle, nb::handle topk_idx) {
  const TensorView ids = view_of(topk_idx, "topk_idx");
  const bool wide = ids.dtype == DType::kI64;
  if (!(wide || ids.dtype == DType::kI32) || !ids.contiguous() || ids.shape != handle->dst_rank.shape)
    throw Error(ErrorCode::kInvalidArgument, "topk_idx must be contiguous int32 or int64 of the dispatch's shape " +
                                                 describe(handle->dst_rank) + ": it is " + describe(ids));
  std::shared_ptr<Handle> changed;
  for (std::int64_t i = 0; i < ids.numel(); ++i) {
    const std::int64_t id = wide ? ids.as<const std::int64_t>()[i] : ids.as<const std::int32_t>()[i];
    if (id >= 0 || handle->dst_rank.as<const std::int32_t>()[i] < 0) continue;
    if (!changed) {
      changed = std::make_shared<Handle>(*handle);
      changed->dst_rank = copy_of(handle->dst_rank);
    }
    changed->dst_rank.as<std::int32_t>()[i] = -1;
  }
  return changed ? changed : handle;
}

nb::object handle_of(nb::handle tensor, nb::handle topk_idx) {
  if (tensor.is_none()) return nb::none();
  const void* data = data_of(tensor, "an entry of handle");
  const HandlePtr found = data != nullptr ? handle_at(data) : handle_beside(tensor);
  if (!found || !found->first_arrival.given()) return nb::none();  // the latter: promised, and not received yet
  const auto handle = std::const_pointer_cast<Handle>(found);
  return nb::cast(topk_idx.is_none() ? handle : leave_out(handle, topk_idx));
}

// The same on a GPU, where the caller has taken the selections back himself.
std::shared_ptr<Handle> with_dst_rank(const Handle& handle, nb::handle dst_rank) {
  auto copy = std::make_shared<Handle>(handle);
  set_tensor(*copy, 0, dst_rank);
  static_assert(kHandleTensors[0] == &Handle::dst_rank);
  return copy;
}

std::vector<std::int64_t> aligned_counts(const Handle& handle) {
  std::vector<std::int64_t> counts;
  const bool known = !handle.counted_first_row.empty();
  if (!known && handle.cuda_device != kCpu)
    throw Error(ErrorCode::kUnsupported, "counts of this dispatch are on the device only: it was bounded");
  const std::int32_t* first = known ? handle.counted_first_row.data() : handle.slot_first_row.as<const std::int32_t>();
  for (std::int64_t slot = 0; slot < handle.slot_rows.numel(); ++slot) counts.push_back(first[slot + 1] - first[slot]);
  return counts;
}

}  // namespace

void bind_handle(nb::module_& m) {
  nb::enum_<OutputLayout>(m, "OutputLayout")
      .value("by_rank", OutputLayout::kByRank)
      .value("by_expert", OutputLayout::kByExpert)
      .value("padded", OutputLayout::kPadded);
  nb::class_<Handle> handle(m, "Handle", "What one dispatch made that combine and cached dispatches need.");
  for (std::size_t i = 0; i < kHandleTensors.size(); ++i)
    handle.def_prop_ro(kHandleTensorNames[i], [field = kHandleTensors[i]](const std::shared_ptr<Handle>& h) {
      return to_torch(tensor_of(h, field), h->cuda_device);
    });
  handle.def_ro("layout", &Handle::layout)
      .def_ro("num_ranks", &Handle::num_ranks)
      .def_ro("num_topk", &Handle::num_topk)
      .def_ro("num_experts", &Handle::num_experts)
      .def_ro("expert_alignment", &Handle::expert_alignment)
      .def_ro("max_tokens_per_rank", &Handle::max_tokens_per_rank)
      .def_ro("low_latency", &Handle::low_latency)
      .def_ro("num_tokens", &Handle::num_tokens)
      .def_ro("num_rows", &Handle::num_rows)
      .def_ro("num_arrivals", &Handle::num_arrivals)
      .def_prop_ro("num_slots", [](const Handle& h) { return h.slot_rows.numel(); })
      .def_prop_ro("placement", [](const Handle& h) { return std::const_pointer_cast<Placement>(h.placement); })
      .def("aligned_counts", &aligned_counts, "Rows of each hosted expert, each rounded up to expert_alignment.")
      .def("with_rows", &with_rows, nb::arg("num_rows"))
      .def("with_dst_rank", &with_dst_rank, nb::arg("dst_rank"))
      .def_prop_ro("source_range_ptr",
                   [](const Handle& h) { return reinterpret_cast<std::uintptr_t>(h.source_range.data); })
      .def("save", &save, "As a list of tensors, for Handle.restore.")
      .def_static("make", &handle_from, nb::arg("layout"), nb::arg("placement"), nb::arg("num_topk"),
                  nb::arg("expert_alignment"), nb::arg("num_rows"), nb::arg("num_arrivals"), nb::arg("tensors"),
                  "A handle over tensors with the names of its properties.")
      .def_static("restore", &restore, nb::arg("tensors"));
  m.def("handle_of", &handle_of, nb::arg("tensor").none(), nb::arg("topk_idx").none() = nb::none(),
        "The handle that a tensor of a handle tuple stands for, or None. With topk_idx, for a low-latency dispatch: "
        "without "
        "the selections that are negative there now.");
}

}  // namespace deep_ep::python
