// SPDX-License-Identifier: MIT
#include "calls.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "deep_ep/error.h"
#include "handles.h"
#include "torch_tensor.h"

namespace deep_ep::python {

namespace {

std::chrono::milliseconds milliseconds(nb::handle seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(nb::cast<double>(seconds) * 1000));
}

template <typename T>
std::shared_ptr<const T> shared(nb::handle object) {
  return object.is_none() ? nullptr : std::shared_ptr<const T>(nb::cast<std::shared_ptr<T>>(object));
}

// How a call runs, dispatch or combine.
template <typename Input>
bool set_way(Input& in, std::string_view key, nb::handle value) {
  if (key == "handle") {
    in.handle = shared<Handle>(value);
  } else if (key == "timeout_secs") {
    in.timeout = milliseconds(value);
  } else if (key == "num_workers") {
    in.num_workers = nb::cast<int>(value);
  } else if (key == "at_once") {
    in.at_once = nb::cast<bool>(value);
  } else if (key == "mask_silent") {
    in.mask_silent = nb::cast<bool>(value);
  } else {
    return false;
  }
  return true;
}

bool set_tensor(DispatchInput& in, std::string_view key, nb::handle value, Device device) {
  if (key == "x") {
    in.x = view_of(value, "x", device);
  } else if (key == "scales") {
    in.scales = view_of(value, "scales", device);
  } else if (key == "topk_idx") {
    in.topk_idx = view_of(value, "topk_idx", device);
  } else if (key == "topk_weights") {
    in.topk_weights = view_of(value, "topk_weights", device);
  } else if (key == "side") {
    for (nb::handle each : value) in.side.push_back(view_of(each, "side", device));
  } else {
    return false;
  }
  return true;
}

bool set_number(DispatchInput& in, std::string_view key, nb::handle value) {
  if (key == "num_experts") {
    in.num_experts = nb::cast<int>(value);
  } else if (key == "expert_alignment") {
    in.expert_alignment = nb::cast<int>(value);
  } else if (key == "max_tokens_per_rank") {
    in.max_tokens_per_rank = nb::cast<int>(value);
  } else if (key == "max_rows") {
    in.max_rows = nb::cast<std::int64_t>(value);
  } else {
    return false;
  }
  return true;
}

bool set_choice(DispatchInput& in, std::string_view key, nb::handle value) {
  if (key == "placement") {
    in.placement = shared<Placement>(value);
  } else if (key == "layout") {
    in.layout = nb::cast<OutputLayout>(value);
  } else if (key == "column_major_scales") {
    in.scale_order = nb::cast<bool>(value) ? ScaleOrder::kColumnMajor : ScaleOrder::kRowMajor;
  } else if (key == "mask_topk_weights") {
    in.mask_topk_weights = nb::cast<bool>(value);
  } else if (key == "fp8") {  // None, or (round_scale, ue8m0)
    if (value.is_none()) return true;
    const auto [round_scale, ue8m0] = nb::cast<std::pair<bool, bool>>(value);
    in.fp8 = Fp8Options{round_scale, ue8m0};
  } else {
    return false;
  }
  return true;
}

bool set_tensor(CombineInput& in, std::string_view key, nb::handle value, Device device) {
  if (key == "x") {
    in.x = view_of(value, "x", device);
  } else if (key == "topk_weights") {
    in.topk_weights = view_of(value, "topk_weights", device);
  } else if (key == "weights") {
    in.weights = view_of(value, "weights", device);
  } else if (key == "bias_0") {
    in.bias[0] = view_of(value, "bias_0", device);
  } else if (key == "bias_1") {
    in.bias[1] = view_of(value, "bias_1", device);
  } else if (key == "out") {
    in.out = view_of(value, "out", device);
  } else {
    return false;
  }
  return true;
}

WireFormat wire_format(nb::handle value) {
  if (value.is_none()) return WireFormat::kAsIs;
  const std::string_view name = nb::cast<std::string_view>(value);
  if (name == "logfmt10") return WireFormat::kLogFmt10;
  if (name == "fp8") return WireFormat::kFp8;
  throw Error(ErrorCode::kInvalidArgument, "wire: '" + std::string(name) + "' vs 'logfmt10' or 'fp8'");
}

bool set_choice(CombineInput& in, std::string_view key, nb::handle value) {
  if (key == "weights_from_owner") {
    in.weights_home = nb::cast<bool>(value) ? WeightsHome::kFromOwner : WeightsHome::kSumOverRanks;
  } else if (key == "order") {
    in.order = nb::cast<SumOrder>(value);
  } else if (key == "wire") {
    in.wire = wire_format(value);
  } else if (key == "zero_copy") {
    in.zero_copy = nb::cast<bool>(value);
  } else {
    return false;
  }
  return true;
}

[[noreturn]] void unknown(std::string_view key) {
  throw nb::type_error(("unexpected keyword argument '" + std::string(key) + "'").c_str());
}

}  // namespace

DispatchInput dispatch_input(const Seat& seat, const nb::kwargs& keywords) {
  DispatchInput in;
  in.stream = seat.calls;
  for (auto [name, value] : keywords) {
    const std::string_view key = nb::borrow<nb::str>(name).c_str();
    if (!set_tensor(in, key, value, seat.device) && !set_number(in, key, value) && !set_choice(in, key, value) &&
        !set_way(in, key, value))
      unknown(key);
  }
  return in;
}

CombineInput combine_input(const Seat& seat, const nb::kwargs& keywords) {
  CombineInput in;
  in.stream = seat.calls;
  for (auto [name, value] : keywords) {
    const std::string_view key = nb::borrow<nb::str>(name).c_str();
    if (!set_tensor(in, key, value, seat.device) && !set_choice(in, key, value) && !set_way(in, key, value))
      unknown(key);
  }
  return in;
}

namespace {

// One owner for all of them: most of an operation's tensors share a block.
void lend(const Seat& seat, const std::vector<Tensor*>& tensors) {
  if (seat.device == kCpu) return;
  std::vector<std::shared_ptr<void>> owners;
  for (const Tensor* tensor : tensors)
    if (tensor->owner && (owners.empty() || owners.back() != tensor->owner)) owners.push_back(tensor->owner);
  if (owners.empty()) return;
  const std::shared_ptr<void> owner = seat->lend(std::move(owners), seat.user);
  for (Tensor* tensor : tensors)
    if (tensor->owner) tensor->owner = owner;
}

}  // namespace

DispatchOutput lent(const Seat& seat, DispatchOutput output, bool new_handle) {
  std::vector<Tensor*> tensors{&output.x, &output.scales, &output.topk_idx, &output.topk_weights};
  for (Tensor& each : output.side) tensors.push_back(&each);
  lend(seat, tensors);
  if (seat.device == kCpu || !new_handle) return output;
  Handle& handle = const_cast<Handle&>(*output.handle);  // nobody else has it yet
  handle.cuda_device = seat.device;
  tensors.clear();
  for (const auto field : kHandleTensors) tensors.push_back(&(handle.*field));
  for (const auto field : kLowLatencyTensors) tensors.push_back(&(handle.*field));
  lend(seat, tensors);
  return output;
}

CombineOutput lent(const Seat& seat, CombineOutput output) {
  lend(seat, {&output.x, &output.topk_weights});
  return output;
}

nb::tuple to_python(const DispatchOutput& output, Device device) {
  nb::list side;
  for (const Tensor& each : output.side) side.append(to_torch(each, device));
  return nb::make_tuple(to_torch(output.x, device), to_torch(output.scales, device), to_torch(output.topk_idx, device),
                        to_torch(output.topk_weights, device), side,
                        nb::cast(std::const_pointer_cast<Handle>(output.handle)));
}

nb::tuple to_python(const CombineOutput& output, const nb::object& out, Device device) {
  return nb::make_tuple(out.is_none() ? to_torch(output.x, device) : out, to_torch(output.topk_weights, device));
}

}  // namespace deep_ep::python
