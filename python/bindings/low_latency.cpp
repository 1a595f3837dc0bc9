// SPDX-License-Identifier: MIT
#include "low_latency.h"

#include <nanobind/stl/shared_ptr.h>

#include <utility>
#include <vector>

#include "deep_ep/error.h"
#include "handles.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

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

// What DeepEP's low_latency_dispatch returns: (x, scales, count, src_info, layout_range).
nb::tuple padded(const DispatchOutput& out, Device device) {
  const auto field = [&](Tensor Handle::*tensor) { return to_torch(tensor_of(out.handle, tensor), device); };
  const nb::object layout_range = field(&Handle::source_range);
  if (out.handle->source_range.numel() == 0) put_beside(layout_range, out.handle);
  return nb::make_tuple(to_torch(out.x, device), to_torch(out.scales, device), field(&Handle::slot_rows),
                        field(&Handle::row_token), layout_range);
}

}  // namespace

DispatchTicket::DispatchTicket(const Seat& seat, const DispatchInput& input) : seat_(seat) {
  nb::gil_scoped_release unlocked;
  ticket_ = seat_->low_latency_dispatch(input);
}

nb::tuple DispatchTicket::promised() {
  const DispatchOutput* output = ticket_.promised();
  if (output == nullptr)
    throw Error(ErrorCode::kUnsupported, "promised: only outputs of one block per expert are known beforehand");
  return padded(lent(seat_, *output, true), seat_.device);
}

DispatchOutput DispatchTicket::wait(const nb::object& wait_stats, const nb::object& count_stats) {
  const auto before = peers_of(*seat_.buffer, wait_stats);
  DispatchOutput out;
  {
    nb::gil_scoped_release unlocked;
    out = ticket_.receive();
  }
  add_waits(*seat_.buffer, before, wait_stats);
  add_counts(*out.handle, count_stats);
  return out;
}

void DispatchTicket::finish(const nb::object& wait_stats, const nb::object& count_stats) {
  wait(wait_stats, count_stats);
}

nb::tuple DispatchTicket::receive() { return to_python(wait(nb::none(), nb::none()), seat_.device); }

nb::tuple DispatchTicket::receive_padded(const nb::object& wait_stats, const nb::object& count_stats) {
  return padded(wait(wait_stats, count_stats), seat_.device);
}

void CombineTicket::finish() {
  {
    nb::gil_scoped_release unlocked;
    ticket_.receive();
  }
  kept_.clear();
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
  const nb::tuple made = with_hook ? ticket.promised() : ticket.receive_padded(wait_stats, count_stats);
  return nb::make_tuple(made, with_hook ? nb::cast(std::move(ticket)) : nb::none());
}

void bind_low_latency(nb::module_& m) {
  nb::class_<DispatchTicket>(m, "DispatchTicket", "A low-latency dispatch on its way.")
      .def("promised", &DispatchTicket::promised)
      .def("finish", &DispatchTicket::finish, nb::arg("wait_stats").none() = nb::none(),
           nb::arg("count_stats").none() = nb::none())
      .def("receive", &DispatchTicket::receive);
  nb::class_<CombineTicket>(m, "CombineTicket", "A low-latency combine on its way.")
      .def("finish", &CombineTicket::finish)
      .def("receive", &CombineTicket::receive, nb::arg("wait_stats").none() = nb::none());
}

}  // namespace deep_ep::python
