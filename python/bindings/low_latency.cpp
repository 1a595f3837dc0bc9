// SPDX-License-Identifier: MIT
#include "low_latency.h"

#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "deep_ep/error.h"
#include "handles.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

// The small ones, which are made for every call.
struct SlotTables {
  Tensor count;            // i32 [slots]: rows of each expert
  Tensor src_info;         // i32 [slots, rows of a slot]: token on its source rank; unset behind the last row
  KeyTensor layout_range;  // i64 [slots, num_ranks]: (first row << 32) | rows of that source

  SlotTables(std::int64_t slots, std::int64_t slot_rows, int num_ranks)
      : count(filled({slots}, 0)),
        src_info(Tensor::allocate(DType::kI32, {slots, slot_rows})),
        layout_range(DType::kI64, {slots, num_ranks}) {
    std::fill_n(layout_range.tensor().as<std::int64_t>(), slots * num_ranks, 0);
  }

  void fill(const HandlePtr& handle) {
    const Handle& h = *handle;
    std::copy_n(h.slot_rows.as<const std::int32_t>(), count.numel(), count.as<std::int32_t>());
    const auto* first = h.first_arrival.as<const std::int32_t>();
    for (int src = 0; src < h.num_ranks; ++src) note_source(h, src, first[src], first[src + 1]);
    layout_range.set(handle);
  }

 private:
  // Most selections of a token are on other ranks, in no order that a processor could guess: so those that are here are
  // gathered without a branch first. A product instead of a quotient, which a double has room for.
  void note_source(const Handle& h, int src, std::int64_t begin, std::int64_t end) {
    const auto* rows = h.arrival_row.as<const std::int32_t>();
    const auto* tokens = h.src_token.as<const std::int32_t>();
    std::vector<RowOf> here(static_cast<std::size_t>((end - begin) * h.num_topk) + 1);  // the last may be in vain
    std::size_t count = 0;
    for (std::int64_t i = begin * h.num_topk, arrival = begin; arrival < end; ++arrival)
      for (int k = 0; k < h.num_topk; ++k, ++i) {
        here[count] = {rows[i], tokens[arrival]};
        count += rows[i] >= 0;
      }
    auto* source = src_info.as<std::int32_t>();
    auto* range = layout_range.tensor().as<std::int64_t>() + src;
    const std::int32_t slot_rows = h.num_ranks * h.max_tokens_per_rank;
    const double slots_per_row = 1.0 / slot_rows;
    for (std::size_t i = 0; i < count; ++i) {
      const auto [row, token] = here[i];
      const auto slot = static_cast<std::int32_t>((row + 0.5) * slots_per_row);
      source[row] = token;
      // Rows of a source are contiguous and come in order.
      std::int64_t& block = range[slot * h.num_ranks];
      block = (block == 0 ? std::int64_t{row - slot * slot_rows} << 32 : block) + 1;
    }
  }

  struct RowOf {
    std::int32_t row, token;
  };
};

namespace {

std::vector<Statistics::Peer> peers_of(const Buffer& buffer, const nb::object& wanted) {
  return wanted.is_none() ? std::vector<Statistics::Peer>{} : buffer.statistics().peers;
}

// Adds the time that this rank waited for each other one since `before`, in nanoseconds.
void add_waits(const Buffer& buffer, const std::vector<Statistics::Peer>& before, const nb::object& stats) {
  if (stats.is_none()) return;
  const TensorView view = view_of(stats, "wait_recv_cost_stats");
  const auto after = buffer.statistics().peers;
  for (std::size_t i = 0; i < after.size(); ++i)
    view.as<std::int64_t>()[i] += static_cast<std::int64_t>(after[i].wait_ns_sum - before[i].wait_ns_sum);
}

void add_counts(const Handle& handle, const nb::object& stats) {
  if (stats.is_none()) return;
  const TensorView view = view_of(stats, "cumulative_local_expert_recv_stats");
  for (std::int64_t slot = 0; slot < handle.slot_rows.numel(); ++slot)
    view.as<std::int32_t>()[slot] += handle.slot_rows.as<const std::int32_t>()[slot];
}

nb::tuple padded(const DispatchOutput& out, const SlotTables& tables, Device device) {
  return nb::make_tuple(to_torch(out.x, device), to_torch(out.scales, device), to_torch(tables.count),
                        to_torch(tables.src_info), to_torch(tables.layout_range.tensor()));
}

}  // namespace

DispatchTicket::DispatchTicket(const Seat& seat, const DispatchInput& input) : seat_(seat) {
  nb::gil_scoped_release unlocked;
  ticket_ = seat_->low_latency_dispatch(input);
}
DispatchTicket::~DispatchTicket() = default;
DispatchTicket::DispatchTicket(DispatchTicket&&) noexcept = default;

nb::tuple DispatchTicket::prepare() {
  const DispatchOutput* promised = ticket_.promised();
  if (promised == nullptr)
    throw Error(ErrorCode::kUnsupported, "return_recv_hook: only outputs of one block per expert are known beforehand");
  const Tensor& x = promised->x;
  prepared_ = std::make_unique<SlotTables>(x.size(0), x.size(1), seat_->num_ranks());
  return padded(*promised, *prepared_, seat_.device);
}

nb::tuple DispatchTicket::promised() {
  const DispatchOutput* output = ticket_.promised();
  if (output == nullptr || seat_.device == kCpu)
    throw Error(ErrorCode::kUnsupported, "promised: for operations on a GPU, before they are finished");
  const DispatchOutput out = lent(seat_, *output, true);
  const auto field = [&](Tensor Handle::*tensor) { return to_torch(tensor_of(out.handle, tensor), seat_.device); };
  return nb::make_tuple(to_torch(out.x, seat_.device), to_torch(out.scales, seat_.device), field(&Handle::slot_rows),
                        field(&Handle::row_token), field(&Handle::source_range));
}

void DispatchTicket::finish() {
  nb::gil_scoped_release unlocked;
  ticket_.receive();
}

void CombineTicket::finish() {
  {
    nb::gil_scoped_release unlocked;
    ticket_.receive();
  }
  kept_.clear();
}

DispatchOutput DispatchTicket::wait(const nb::object& wait_stats, const nb::object& count_stats) {
  const auto before = peers_of(*seat_.buffer, wait_stats);
  DispatchOutput out;
  {
    nb::gil_scoped_release unlocked;
    out = ticket_.receive();
    if (prepared_) prepared_->fill(out.handle);
  }
  add_waits(*seat_.buffer, before, wait_stats);
  add_counts(*out.handle, count_stats);
  return out;
}

nb::object DispatchTicket::receive(nb::object wait_stats, nb::object count_stats) {
  const DispatchOutput out = wait(wait_stats, count_stats);
  if (prepared_) return nb::cast(std::const_pointer_cast<Handle>(out.handle));
  return to_python(out, seat_.device);
}

nb::tuple DispatchTicket::receive_padded(const nb::object& wait_stats, const nb::object& count_stats) {
  const DispatchOutput out = wait(wait_stats, count_stats);
  const Handle& h = *out.handle;
  SlotTables tables(h.slot_rows.numel(), std::int64_t{h.num_ranks} * h.max_tokens_per_rank, h.num_ranks);
  tables.fill(out.handle);
  return padded(out, tables, seat_.device);
}

CombineTicket::CombineTicket(const Seat& seat, const CombineInput& input, const nb::kwargs& keywords)
    : seat_(seat), kept_(keywords), out_(nb::none()) {
  if (keywords.contains("out")) out_ = nb::borrow(keywords["out"]);
  nb::gil_scoped_release unlocked;
  ticket_ = seat_->low_latency_combine(input);
}

nb::tuple CombineTicket::receive(nb::object wait_stats) {
  const auto before = peers_of(*seat_.buffer, wait_stats);
  CombineOutput out;
  {
    nb::gil_scoped_release unlocked;
    out = ticket_.receive();
  }
  add_waits(*seat_.buffer, before, wait_stats);
  nb::tuple result = to_python(out, out_, seat_.device);
  kept_.clear();
  return result;
}

DispatchTicket low_latency_dispatch(const Seat& seat, const nb::kwargs& keywords) {
  return {seat, parsed(seat, Operation::kLowLatencyDispatch, [&] { return dispatch_input(seat, keywords); })};
}

CombineTicket low_latency_combine(const Seat& seat, const nb::kwargs& keywords) {
  const CombineInput input = parsed(seat, Operation::kLowLatencyCombine, [&] { return combine_input(seat, keywords); });
  return {seat, input, keywords};
}

nb::tuple low_latency_dispatch_padded(const Seat& seat, bool with_hook, const nb::object& wait_stats,
                                      const nb::object& count_stats, const nb::kwargs& keywords) {
  DispatchTicket ticket = low_latency_dispatch(seat, keywords);
  const nb::tuple made = with_hook ? ticket.prepare() : ticket.receive_padded(wait_stats, count_stats);
  return nb::make_tuple(made, with_hook ? nb::cast(std::move(ticket)) : nb::none());
}

void bind_low_latency(nb::module_& m) {
  nb::class_<DispatchTicket>(m, "DispatchTicket", "A low-latency dispatch on its way.")
      .def("promised", &DispatchTicket::promised)
      .def("finish", &DispatchTicket::finish)
      .def("receive", &DispatchTicket::receive, nb::arg("wait_stats").none() = nb::none(),
           nb::arg("count_stats").none() = nb::none());
  nb::class_<CombineTicket>(m, "CombineTicket", "A low-latency combine on its way.")
      .def("finish", &CombineTicket::finish)
      .def("receive", &CombineTicket::receive, nb::arg("wait_stats").none() = nb::none());
}

}  // namespace deep_ep::python
