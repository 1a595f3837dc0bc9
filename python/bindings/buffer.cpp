// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <string_view>

#include "calls.h"
#include "deep_ep/gradient.h"
#include "low_latency.h"
#include "parts.h"
#include "torch_tensor.h"

namespace deep_ep::python {

namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

// Only objects of Python have it, so whoever drops it holds the interpreter's lock. Closing waits for work on a GPU,
// which other threads of Python may have to enqueue.
BufferPtr shared(std::unique_ptr<Buffer> buffer) {
  return {buffer.release(), [](Buffer* dropped) {
            nb::gil_scoped_release unlocked;
            delete dropped;
          }};
}

Seat open(const std::shared_ptr<Bootstrap>& group, const Config& config, int num_workers, Device device) {
  Options options;
  options.num_workers = num_workers;
  if (device != kCpu) options.backend = BackendKind::kCuda, options.cuda_device = device;
  nb::gil_scoped_release unlocked;
  return Seat{shared(Buffer::open(group, config, options)), device};
}

// Where Python found the mistake: the peers' same call says so.
void refuse(const Seat& seat, std::string_view operation, const std::string& why) {
  nb::gil_scoped_release unlocked;
  for (const Operation each :
       {Operation::kDispatch, Operation::kCombine, Operation::kLowLatencyDispatch, Operation::kLowLatencyCombine})
    if (operation == name(each)) seat->refuse(each, why);
}

nb::tuple dispatch(const Seat& seat, const nb::kwargs& keywords) {
  const DispatchInput input = parsed(seat, Operation::kDispatch, [&] { return dispatch_input(seat, keywords); });
  DispatchOutput output;
  {
    nb::gil_scoped_release unlocked;
    output = lent(seat, seat->dispatch(input), input.handle == nullptr);
  }
  return to_python(output, seat.device);
}

nb::tuple combine(const Seat& seat, const nb::kwargs& keywords) {
  const CombineInput input = parsed(seat, Operation::kCombine, [&] { return combine_input(seat, keywords); });
  CombineOutput output;
  {
    nb::gil_scoped_release unlocked;
    output = lent(seat, seat->combine(input));
  }
  return to_python(output, keywords.contains("out") ? nb::borrow(keywords["out"]) : nb::none(), seat.device);
}

nb::tuple dispatch_layout(const Seat& seat, nb::handle topk_idx, int num_experts,
                          const std::shared_ptr<Placement>& placement) {
  const TensorView ids = view_of(topk_idx, "topk_idx", seat.device);
  DispatchLayout layout;
  {
    nb::gil_scoped_release unlocked;
    layout = seat->dispatch_layout(ids, num_experts, placement, seat.calls);
    if (seat.device != kCpu) {
      const auto owner = seat->lend({layout.tokens_per_rank.owner, layout.is_token_in_rank.owner}, seat.user);
      for (Tensor* each :
           {&layout.tokens_per_rank, &layout.tokens_per_node, &layout.tokens_per_expert, &layout.is_token_in_rank})
        each->owner = owner;
    }
  }
  return nb::make_tuple(to_torch(layout.tokens_per_rank, seat.device), to_torch(layout.tokens_per_node, seat.device),
                        to_torch(layout.tokens_per_expert, seat.device),
                        to_torch(layout.is_token_in_rank, seat.device));
}

nb::tuple weighted_combine_gradient(const Seat& seat, const std::shared_ptr<Handle>& handle, nb::handle grad_out,
                                    nb::handle weights, nb::handle rows) {
  if (seat.device != kCpu)
    throw Error(ErrorCode::kUnsupported, "weighted_combine_gradient: CPU buffers only, this one is on a GPU");
  const TensorView g = view_of(grad_out, "grad_out"), w = view_of(weights, "weights"), r = view_of(rows, "rows");
  WeightedCombineGradient gradient;
  {
    nb::gil_scoped_release unlocked;
    gradient = weighted_combine_backward(*seat.buffer, handle, g, w, r);
  }
  return nb::make_tuple(to_torch(gradient.rows), to_torch(gradient.weights));
}

nb::object allocate(const Seat& seat, nb::handle like, const std::vector<std::int64_t>& shape) {
  const DType dtype = view_of(like, "like", device_of(like, "like")).dtype;
  if (shape.empty() || shape.size() > TensorView::kMaxDims)
    throw Error(ErrorCode::kInvalidArgument,
                "shape must have 1 to 3 dimensions: it has " + std::to_string(shape.size()));
  Tensor made = shape.size() == 1   ? seat->allocate(dtype, {shape[0]})
                : shape.size() == 2 ? seat->allocate(dtype, {shape[0], shape[1]})
                                    : seat->allocate(dtype, {shape[0], shape[1], shape[2]});
  if (seat.device != kCpu) made.owner = seat->lend({made.owner}, seat.user);
  return to_torch(made, seat.device);
}

nb::dict statistics(const Seat& seat) {
  const Statistics s = seat->statistics();
  nb::list peers;
  for (const Statistics::Peer& peer : s.peers) {
    nb::dict each;
    each["bytes_sent"] = peer.bytes_sent;
    each["waits"] = peer.waits;
    each["wait_ns_sum"] = peer.wait_ns_sum;
    each["wait_ns_max"] = peer.wait_ns_max;
    peers.append(each);
  }
  nb::dict result;
  result["peers"] = peers;
  result["rows_per_slot"] = s.rows_per_slot;
  result["operations"] = s.operations;
  result["refused"] = s.refused;
  result["timeouts"] = s.timeouts;
  result["puts_while_packing"] = s.puts_while_packing;
  result["copied_out_bytes"] = s.copied_out_bytes;
  result["staged_bytes"] = s.staged_bytes;
  result["arena_bytes_in_use"] = s.arena_bytes_in_use;
  result["arena_bytes_high_water"] = s.arena_bytes_high_water;
  return result;
}

void bind_config(nb::module_& m) {
  nb::class_<LowLatencyCapacity>(m, "LowLatencyCapacity")
      .def(nb::init<>())
      .def_rw("max_tokens_per_rank", &LowLatencyCapacity::max_tokens_per_rank)
      .def_rw("row_bytes", &LowLatencyCapacity::row_bytes)
      .def_rw("num_topk", &LowLatencyCapacity::num_topk)
      .def_rw("side_bytes", &LowLatencyCapacity::side_bytes);
  nb::class_<Config>(m, "BufferConfig", "What all ranks of a buffer agree on.")
      .def(nb::init<>())
      .def_rw("max_experts", &Config::max_experts)
      .def_rw("ranks_per_node", &Config::ranks_per_node)
      .def_rw("low_latency", &Config::low_latency)
      .def_rw("arena_bytes", &Config::arena_bytes)
      .def_rw("num_tickets", &Config::num_tickets)
      .def_prop_rw(
          "timeout_secs", [](const Config& c) { return static_cast<double>(c.timeout.count()) / 1000; },
          [](Config& c, double seconds) { c.timeout = milliseconds(seconds); })
      .def_prop_rw(
          "open_timeout_secs", [](const Config& c) { return static_cast<double>(c.open_timeout.count()) / 1000; },
          [](Config& c, double seconds) { c.open_timeout = milliseconds(seconds); })
      .def(
          "plan", [](const Config& c, int num_ranks) { return c.plan(num_ranks).total_bytes; }, nb::arg("num_ranks"),
          "Bytes of each rank's window.")
      .def(
          "describe_plan", [](const Config& c, int num_ranks) { return c.plan(num_ranks).to_string(); },
          nb::arg("num_ranks"))
      .def("__str__", &Config::to_string);
  nb::class_<SumOrder>(m, "SumOrder", "The order in which combine adds.")
      .def(
          "__init__",
          [](SumOrder* order, bool by_topk, bool round_per_rank, bool round_per_node, bool bias_first) {
            new (order) SumOrder{by_topk ? SumOrder::Key::kTopK : SumOrder::Key::kRank, round_per_rank, round_per_node,
                                 bias_first};
          },
          nb::arg("by_topk") = false, nb::arg("round_per_rank") = false, nb::arg("round_per_node") = false,
          nb::arg("bias_first") = true);
}

}  // namespace

void bind_buffer(nb::module_& m) {
  bind_config(m);
  m.def("has_cuda", [] { return has_backend(BackendKind::kCuda); });
  nb::class_<Seat>(m, "CoreBuffer", "One rank's end of a group that exchanges tokens.")
      .def_static("open", &open, nb::arg("group"), nb::arg("config"), nb::arg("num_workers") = 0,
                  nb::arg("device") = kCpu)
      .def(
          "use_streams",
          [](Seat& seat, std::uintptr_t calls, std::uintptr_t user) {
            seat.calls = stream_of(calls), seat.user = stream_of(user);
          },
          nb::arg("calls"), nb::arg("user"),
          "CUDA: operations from now on are enqueued on the stream `calls`, their results used on `user`.")
      .def_prop_ro("rank", [](const Seat& seat) { return seat->rank(); })
      .def_prop_ro("num_ranks", [](const Seat& seat) { return seat->num_ranks(); })
      .def_prop_ro("num_nodes", [](const Seat& seat) { return seat->num_nodes(); })
      .def(
          "node_of", [](const Seat& seat, int rank) { return seat->node_of(rank); }, nb::arg("rank"))
      .def("dispatch_layout", &dispatch_layout, nb::arg("topk_idx"), nb::arg("num_experts"),
           nb::arg("placement").none() = nb::none())
      .def("dispatch", &dispatch)
      .def("combine", &combine)
      .def("low_latency_dispatch", &low_latency_dispatch)
      .def("low_latency_dispatch_padded", &low_latency_dispatch_padded, nb::arg("with_hook"),
           nb::arg("wait_stats").none(), nb::arg("count_stats").none(), nb::arg("keywords"))
      .def("low_latency_combine", &low_latency_combine)
      .def("weighted_combine_gradient", &weighted_combine_gradient, nb::arg("handle"), nb::arg("grad_out"),
           nb::arg("weights"), nb::arg("rows"))
      .def("refuse", &refuse, nb::arg("operation"), nb::arg("why"))
      .def("allocate", &allocate, nb::arg("like"), nb::arg("shape"))
      .def(
          "supports_low_latency",
          [](const Seat& seat, std::int64_t hidden, std::int64_t max_tokens, int num_topk, int num_experts) {
            CallShape shape{DType::kBf16, hidden, max_tokens, num_topk, num_experts, false, true};
            return seat->supports(shape).reason;
          },
          nb::arg("hidden"), nb::arg("max_tokens"), nb::arg("num_topk"), nb::arg("num_experts"),
          "Empty where BF16 rows of this shape fit; else what stands in the way.")
      .def(
          "set_masked", [](const Seat& seat, int rank, bool masked) { seat->set_masked(rank, masked); },
          nb::arg("rank"), nb::arg("masked"))
      .def(
          "masked", [](const Seat& seat, int rank) { return seat->masked(rank); }, nb::arg("rank"))
      .def("statistics", &statistics)
      .def("reset_statistics", [](const Seat& seat) { seat->reset_statistics(); })
      .def(
          "check",
          [](const Seat& seat) {
            nb::gil_scoped_release unlocked;
            seat->check();
          },
          "Waits for what was enqueued and raises what it found out.")
      .def("close", [](const Seat& seat) {
        nb::gil_scoped_release unlocked;
        seat->close();
      });
}

}  // namespace deep_ep::python
