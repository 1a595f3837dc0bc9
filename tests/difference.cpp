// SPDX-License-Identifier: MIT
#include "difference.h"

#include <cstring>
#include <memory>
#include <sstream>
#include <utility>
#include <vector>

namespace deep_ep::test {

using oracle::Array;

namespace {

std::string shape_text(const TensorView& view) { return view.given() ? describe(view) : "nothing"; }

// Compares `rows` first rows in the order of the logical shape, whatever the strides. skip: rows whose content is
// undefined.
std::string compare_rows(const char* what, const TensorView& got, const Array& expected, std::int64_t rows,
                         const std::vector<bool>* written = nullptr) {
  const std::size_t item = item_bytes(expected.dtype);
  const int dims = static_cast<int>(expected.shape.size());
  const std::int64_t outer = dims == 3 ? expected.shape[1] : 1;  // rows of a slot
  const std::int64_t width = dims == 1 ? 1 : expected.shape[dims - 1];
  for (std::int64_t r = 0; r < rows; ++r) {
    if (written != nullptr && !(*written)[r]) continue;
    std::int64_t base = r * got.strides[0];
    if (dims == 3) base = (r / outer) * got.strides[0] + (r % outer) * got.strides[1];
    const std::int64_t step = dims == 1 ? 1 : got.strides[dims - 1];
    const std::byte* have = got.as<std::byte>();
    const std::byte* want = expected.bytes.data() + r * width * item;
    for (std::int64_t c = 0; c < width; ++c) {
      if (std::memcmp(have + (base + c * step) * item, want + c * item, item) == 0) continue;
      std::uint64_t h = 0, w = 0;
      std::memcpy(&h, have + (base + c * step) * item, item);
      std::memcpy(&w, want + c * item, item);
      std::ostringstream text;
      text << what << " " << shape_text(got) << " differs at row " << r << " column " << c << std::hex << ": 0x" << h
           << " instead of 0x" << w;
      return text.str();
    }
  }
  return "";
}

bool same_shape(const TensorView& got, const Array& expected, std::int64_t first_dim = -1) {
  if (got.given() != expected.given()) return false;
  if (!got.given()) return true;
  if (got.dtype != expected.dtype || got.ndim != static_cast<int>(expected.shape.size())) return false;
  for (int d = 0; d < got.ndim; ++d) {
    if (got.shape[d] != (d == 0 && first_dim >= 0 ? first_dim : expected.shape[d])) return false;
  }
  return true;
}

std::string compare(const char* what, const TensorView& got, const Array& expected,
                    const std::vector<bool>* written = nullptr) {
  if (!same_shape(got, expected)) {
    return std::string(what) + " is " + shape_text(got) + " instead of " + shape_text(expected.view());
  }
  if (!got.given()) return "";
  std::int64_t rows = expected.shape[0];
  if (written != nullptr) rows = static_cast<std::int64_t>(written->size());
  if (written == nullptr && expected.shape.size() == 3) rows *= expected.shape[1];
  if (written != nullptr && expected.shape.size() == 2 && expected.shape[0] != rows) {
    // [slots, rows of a slot]: one value per row
    Array flat = expected;
    flat.shape = {rows};
    TensorView view = got;
    view.ndim = 1;
    view.shape[0] = rows;
    view.strides[0] = 1;
    return compare_rows(what, view, flat, rows, written);
  }
  return compare_rows(what, got, expected, rows, written);
}

std::string compare_ints(const char* what, const TensorView& got, const std::vector<std::int32_t>& expected,
                         std::int64_t prefix = -1) {
  const std::string begin = std::string("handle.") + what;
  if (!got.given() || got.dtype != DType::kI32) return begin + " is " + shape_text(got);
  const std::int64_t count = prefix >= 0 ? prefix : static_cast<std::int64_t>(expected.size());
  if (prefix < 0 ? got.numel() != count : got.numel() < count) {
    return begin + " has " + std::to_string(got.numel()) + " entries instead of " + std::to_string(count);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (got.as<std::int32_t>()[i] != expected[i]) {
      return begin + " differs at " + std::to_string(i) + ": " + std::to_string(got.as<std::int32_t>()[i]) +
             " instead of " + std::to_string(expected[i]);
    }
  }
  return "";
}

std::string compare_tokens_between(const World& world, int rank, const TensorView& got) {
  const int n = world.shape.ranks;
  if (!got.given() || got.dtype != DType::kI32 || got.numel() != std::int64_t{n} * n) {
    return "handle.tokens_between is " + shape_text(got);
  }
  for (int from = 0; from < n; ++from) {
    for (int to = 0; to < n; ++to) {
      if (world.shape.low_latency && to != rank) continue;
      const std::int32_t have = got.as<std::int32_t>()[from * n + to];
      const std::int32_t want = world.expected[rank].tokens_between[from * n + to];
      if (have != want) {
        return "handle.tokens_between[" + std::to_string(from) + "," + std::to_string(to) + "] is " +
               std::to_string(have) + " instead of " + std::to_string(want);
      }
    }
  }
  return "";
}

std::string first_of(std::initializer_list<std::string> messages) {
  for (const std::string& m : messages) {
    if (!m.empty()) return m;
  }
  return "";
}

std::string compare_scalars(const World& world, int rank, const Handle& h) {
  std::ostringstream text;
  const auto check = [&](const char* what, std::int64_t got, std::int64_t want) {
    if (got != want && text.str().empty()) text << "handle." << what << " is " << got << " instead of " << want;
  };
  check("layout", static_cast<int>(h.layout), static_cast<int>(world.shape.layout));
  check("num_ranks", h.num_ranks, world.shape.ranks);
  check("num_topk", h.num_topk, world.shape.topk);
  check("num_experts", h.num_experts, world.shape.experts);
  check("expert_alignment", h.expert_alignment, world.shape.alignment);
  check("low_latency", h.low_latency, world.shape.low_latency);
  check("topk_idx_64", h.topk_idx_64, world.shape.idx64);
  check("num_tokens", h.num_tokens, world.expected[rank].num_tokens);
  if (!h.placement && text.str().empty()) text << "handle.placement is missing";
  return text.str();
}

std::string compare_handle(const World& world, int rank, const Handle& h, bool bounded) {
  const oracle::Dispatched& e = world.expected[rank];
  if (!bounded && (h.num_rows != e.num_rows || h.num_arrivals != e.num_arrivals)) {
    return "handle has " + std::to_string(h.num_rows) + " rows, " + std::to_string(h.num_arrivals) +
           " arrivals instead of " + std::to_string(e.num_rows) + " and " + std::to_string(e.num_arrivals);
  }
  const bool low = world.shape.low_latency;  // there the sender does not know rows, and the receiver always does
  const auto absent = [](const char* what, const TensorView& view) {
    return view.given() ? std::string("handle.") + what + " is given" : std::string();
  };
  return first_of(
      {compare_scalars(world, rank, h), compare_ints("dst_rank", h.dst_rank, e.dst_rank),
       low ? absent("dst_row", h.dst_row) : compare_ints("dst_row", h.dst_row, e.dst_row),
       low ? absent("dst_arrival", h.dst_arrival) : compare_ints("dst_arrival", h.dst_arrival, e.dst_arrival),
       compare_ints("first_arrival", h.first_arrival, e.first_arrival),
       compare_ints("src_token", h.src_token, e.src_token, bounded ? e.num_arrivals : -1),
       world.shape.layout == OutputLayout::kByRank && !low
           ? absent("arrival_row", h.arrival_row)
           : compare_ints("arrival_row", h.arrival_row, e.arrival_row, bounded ? e.num_arrivals * h.num_topk : -1),
       compare_ints("slot_rows", h.slot_rows, e.slot_rows),
       compare_ints("slot_first_row", h.slot_first_row, e.slot_first_row),
       compare_tokens_between(world, rank, h.tokens_between)});
}

std::string compare_scale_strides(const World& world, const TensorView& scales) {
  if (!scales.given()) return "";
  const bool padded = scales.ndim == 3;
  const std::int64_t rows = scales.shape[padded ? 1 : 0];
  const std::int64_t width = scales.shape[padded ? 2 : 1];
  const bool columns = world.shape.scale_order == ScaleOrder::kColumnMajor;
  const std::int64_t step = padded ? rows : (rows + 3) / 4 * 4;
  const std::int64_t row_stride = columns ? 1 : width;
  const std::int64_t column_stride = columns ? step : 1;
  if (rows < 2 || width < 2) return "";  // strides of a single row or column say nothing
  if (scales.strides[padded ? 1 : 0] != row_stride || scales.strides[padded ? 2 : 1] != column_stride) {
    return "scales have strides " + std::to_string(scales.strides[padded ? 1 : 0]) + ", " +
           std::to_string(scales.strides[padded ? 2 : 1]) + " instead of " + std::to_string(row_stride) + ", " +
           std::to_string(column_stride);
  }
  return "";
}

void cut(Tensor& tensor, std::int64_t rows) {
  if (tensor.given() && rows <= tensor.shape[0]) tensor.shape[0] = rows;
}

// Behind the last arrival there are no ids.
std::string compare_unused(const DispatchOutput& got, std::int64_t arrivals) {
  if (!got.topk_idx.given()) return "";
  const bool wide = got.handle->topk_idx_64;
  for (std::int64_t at = arrivals * got.handle->num_topk; at < got.topk_idx.numel(); ++at) {
    const std::int64_t id = wide ? got.topk_idx.as<std::int64_t>()[at] : got.topk_idx.as<std::int32_t>()[at];
    if (id != -1) return "topk_idx beyond the arrivals is not -1 at entry " + std::to_string(at);
  }
  return "";
}

}  // namespace

std::string difference(const char* what, const TensorView& got, const Array& expected) {
  return compare(what, to_host(got), expected);
}

DispatchOutput what_came(const DispatchOutput& output) {
  DispatchOutput got = to_host(output);
  if (!got.handle || !has_room_to_spare(*got.handle)) return got;
  Handle h = *got.handle;
  h.num_arrivals = arrivals_that_came(h);
  if (h.layout != OutputLayout::kPadded) h.num_rows = rows_that_came(h);
  for (Tensor* tensor : {&h.src_token, &h.arrival_row, &h.arrival_weights}) cut(*tensor, h.num_arrivals);
  for (Tensor* tensor : {&got.x, &got.scales, &got.topk_weights})
    if (h.layout != OutputLayout::kPadded) cut(*tensor, h.num_rows);
  cut(got.topk_idx, h.num_arrivals);
  for (Tensor& side : got.side) cut(side, h.num_arrivals);
  got.handle = std::make_shared<const Handle>(std::move(h));
  return got;
}

std::string difference(const World& world, int rank, const DispatchOutput& output, bool cached) {
  const DispatchOutput whole = to_host(output), got = what_came(whole);
  const oracle::Dispatched& e = world.expected[rank];
  const std::vector<bool>* written = world.shape.layout == OutputLayout::kPadded ? &e.row_written : nullptr;
  if (!got.handle) return "there is no handle";
  if (got.side.size() != e.side.size()) return "there are " + std::to_string(got.side.size()) + " side tensors";
  std::string side;
  for (std::size_t i = 0; i < e.side.size() && side.empty(); ++i) side = compare("side", got.side[i], e.side[i]);
  return first_of({compare_handle(world, rank, *got.handle, false), compare("x", got.x, e.x, written),
                   compare("scales", got.scales, e.scales, written), compare_scale_strides(world, whole.scales),
                   compare_unused(whole, e.num_arrivals),
                   compare("topk_idx", got.topk_idx, cached ? Array() : e.topk_idx),
                   compare("topk_weights", got.topk_weights, e.topk_weights,
                           world.shape.layout == OutputLayout::kPadded ? written : nullptr),
                   side});
}

std::string difference_bounded(const World& world, int rank, const DispatchOutput& output, std::int64_t max_rows) {
  const DispatchOutput got = to_host(output);
  const oracle::Dispatched& e = world.expected[rank];
  if (!got.handle) return "there is no handle";
  const std::int64_t arrivals = got.handle->num_arrivals;
  if (got.handle->num_rows != max_rows) return "handle.num_rows is " + std::to_string(got.handle->num_rows);
  if (arrivals < e.num_arrivals) return "handle.num_arrivals is " + std::to_string(arrivals);
  std::string message = compare_handle(world, rank, *got.handle, true);
  const auto check = [&](const char* what, const TensorView& view, const Array& expected, std::int64_t first_dim) {
    if (!message.empty()) return;
    if (!same_shape(view, expected, first_dim)) {
      message = std::string(what) + " is " + shape_text(view);
    } else if (expected.given()) {
      message = compare_rows(what, view, expected, expected.shape[0]);
    }
  };
  const bool by_rank = world.shape.layout == OutputLayout::kByRank;
  check("x", got.x, e.x, max_rows);
  check("scales", got.scales, e.scales, max_rows);
  check("topk_idx", got.topk_idx, e.topk_idx, arrivals);
  check("topk_weights", got.topk_weights, e.topk_weights, by_rank ? arrivals : max_rows);
  for (std::size_t i = 0; i < e.side.size(); ++i) check("side", got.side[i], e.side[i], arrivals);
  if (message.empty()) message = compare_unused(got, e.num_arrivals);
  return message;
}

std::string difference(const oracle::Combined& expected, const CombineOutput& output) {
  const CombineOutput got = to_host(output);
  return first_of({compare("combined x", got.x, expected.x),
                   compare("combined topk_weights", got.topk_weights, expected.topk_weights)});
}

}  // namespace deep_ep::test
