// SPDX-License-Identifier: MIT
#include "calls.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
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

// A keyword argument and the field that it sets.
template <typename Input>
struct Keyword {
  std::string_view name;
  void (*set)(Input& in, const char* name, nb::handle given, Device device);
};

template <auto kField, typename Input>
void tensor(Input& in, const char* name, nb::handle given, Device device) {
  in.*kField = view_of(given, name, device);
}

template <auto kField, typename Input>
void value(Input& in, const char*, nb::handle given, Device) {
  in.*kField = nb::cast<std::decay_t<decltype(in.*kField)>>(given);
}

template <int kIndex>
void bias(CombineInput& in, const char* name, nb::handle given, Device device) {
  in.bias[kIndex] = view_of(given, name, device);
}

template <typename Input>
void handle(Input& in, const char*, nb::handle given, Device) {
  in.handle = shared<Handle>(given);
}

template <typename Input>
void timeout(Input& in, const char*, nb::handle given, Device) {
  in.timeout = milliseconds(given);
}

void side(DispatchInput& in, const char* name, nb::handle given, Device device) {
  for (nb::handle each : given) in.side.push_back(view_of(each, name, device));
}

void placement(DispatchInput& in, const char*, nb::handle given, Device) { in.placement = shared<Placement>(given); }

void scale_order(DispatchInput& in, const char*, nb::handle column_major, Device) {
  in.scale_order = nb::cast<bool>(column_major) ? ScaleOrder::kColumnMajor : ScaleOrder::kRowMajor;
}

// None, or (round_scale, ue8m0).
void fp8(DispatchInput& in, const char*, nb::handle given, Device) {
  if (given.is_none()) return;
  const auto [round_scale, ue8m0] = nb::cast<std::pair<bool, bool>>(given);
  in.fp8 = Fp8Options{round_scale, ue8m0};
}

void weights_home(CombineInput& in, const char*, nb::handle from_owner, Device) {
  in.weights_home = nb::cast<bool>(from_owner) ? WeightsHome::kFromOwner : WeightsHome::kSumOverRanks;
}

// None: as they are.
void wire(CombineInput& in, const char*, nb::handle given, Device) {
  if (given.is_none()) return;
  const auto name = nb::cast<std::string_view>(given);
  if (name != "logfmt10" && name != "fp8")
    throw Error(ErrorCode::kInvalidArgument, "wire: '" + std::string(name) + "' vs 'logfmt10' or 'fp8'");
  in.wire = name == "fp8" ? WireFormat::kFp8 : WireFormat::kLogFmt10;
}

constexpr Keyword<DispatchInput> kOfDispatch[] = {
    {"x", tensor<&DispatchInput::x>},
    {"scales", tensor<&DispatchInput::scales>},
    {"topk_idx", tensor<&DispatchInput::topk_idx>},
    {"topk_weights", tensor<&DispatchInput::topk_weights>},
    {"side", side},
    {"num_experts", value<&DispatchInput::num_experts>},
    {"expert_alignment", value<&DispatchInput::expert_alignment>},
    {"max_tokens_per_rank", value<&DispatchInput::max_tokens_per_rank>},
    {"max_rows", value<&DispatchInput::max_rows>},
    {"placement", placement},
    {"layout", value<&DispatchInput::layout>},
    {"column_major_scales", scale_order},
    {"mask_topk_weights", value<&DispatchInput::mask_topk_weights>},
    {"fp8", fp8},
};

constexpr Keyword<CombineInput> kOfCombine[] = {
    {"x", tensor<&CombineInput::x>},
    {"topk_weights", tensor<&CombineInput::topk_weights>},
    {"weights", tensor<&CombineInput::weights>},
    {"bias_0", bias<0>},
    {"bias_1", bias<1>},
    {"out", tensor<&CombineInput::out>},
    {"weights_from_owner", weights_home},
    {"order", value<&CombineInput::order>},
    {"wire", wire},
    {"zero_copy", value<&CombineInput::zero_copy>},
};

// How a call runs, dispatch or combine.
template <typename Input>
constexpr Keyword<Input> kOfBoth[] = {
    {"handle", handle<Input>},
    {"timeout_secs", timeout<Input>},
    {"num_workers", value<&Input::num_workers, Input>},
    {"at_once", value<&Input::at_once, Input>},
    {"mask_silent", value<&Input::mask_silent, Input>},
};

template <typename Input, std::size_t kSize>
const Keyword<Input>* find(const Keyword<Input> (&keywords)[kSize], std::string_view name) {
  const auto* found = std::find_if(keywords, keywords + kSize, [&](const auto& each) { return each.name == name; });
  return found == keywords + kSize ? nullptr : found;
}

template <typename Input, std::size_t kSize>
Input input_of(const Seat& seat, const Keyword<Input> (&own)[kSize], const nb::kwargs& given) {
  Input in;
  in.stream = seat.calls;
  for (auto [key, value] : given) {
    const char* name = nb::borrow<nb::str>(key).c_str();
    const Keyword<Input>* keyword = find(own, name);
    if (keyword == nullptr) keyword = find(kOfBoth<Input>, name);
    if (keyword == nullptr) throw nb::type_error(("unexpected keyword argument '" + std::string(name) + "'").c_str());
    keyword->set(in, name, value, seat.device);
  }
  return in;
}

}  // namespace

DispatchInput dispatch_input(const Seat& seat, const nb::kwargs& keywords) {
  return input_of(seat, kOfDispatch, keywords);
}

CombineInput combine_input(const Seat& seat, const nb::kwargs& keywords) {
  return input_of(seat, kOfCombine, keywords);
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
