// SPDX-License-Identifier: MIT
// How many SMs an exchange takes, and which of them write where: from what an SM, a link and a GPU's memory move.
#pragma once

#include <algorithm>

namespace deep_ep::plan {

/// Bytes per nanosecond (GB/s). The defaults were measured on H200 with NVLink; docs/performance.md has the tables.
struct Rates {
  int of_sm = 42;             // what one SM writes, wherever it goes
  int of_quantising_sm = 46;  // to all ranks together, codes
  int of_link = 350;          // one direction, both in use
  int of_memory = 2'000;      // written by all SMs of a GPU that read as much
};

/// One rank's place: which of the group's ranks, itself among them, share its GPU.
struct Neighbourhood {
  int near_ranks = 1;
  int far_ranks = 0;  // their rows cross a link
};

/// So many blocks move rows, one to an SM; the first `far` of them write to other GPUs only and the rest to this one.
/// Zero: all of them write everywhere.
struct BlockRoles {
  int moving = 0;
  int far = 0;
};

namespace detail {
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
}  // namespace detail

/// SMs that fill what the rows must pass: the link and, meanwhile, the GPU's own share; or, without a link, this rank's
/// part of the memory. More SMs move nothing faster: beyond a link's rate they only slow each other's writes down.
constexpr BlockRoles full_rate(const Neighbourhood& at, const Rates& rates = {}) {
  if (at.far_ranks == 0) return {detail::ceil_div(rates.of_memory, rates.of_sm * at.near_ranks), 0};
  const int far = detail::ceil_div(rates.of_link, rates.of_sm);
  return {far + detail::ceil_div(far * at.near_ranks, at.far_ranks), far};
}

/// SMs that an exchange takes where nobody names a number.
constexpr int default_sms(const Neighbourhood& at, int most) { return std::clamp(full_rate(at).moving, 1, most); }

/// Roles of a grid's blocks. A block that writes both near and far goes at the pace of the slower, so with SMs enough
/// to fill nearly all of a link each has one role; but rows that are quantised are written by whoever quantised them,
/// and by no more blocks than fill the link with what of theirs crosses it.
constexpr BlockRoles roles_of(int blocks, const Neighbourhood& at, bool quantize, const Rates& rates = {}) {
  const BlockRoles full = full_rate(at, rates);
  if (at.far_ranks == 0) return {blocks, 0};
  if (quantize) {
    const int of_link = rates.of_link * (at.near_ranks + at.far_ranks), of_sm = rates.of_quantising_sm * at.far_ranks;
    return {std::clamp((of_link + of_sm / 2) / of_sm, 1, blocks), 0};
  }
  if (blocks >= full.moving) return full;
  const int far = blocks * full.far / full.moving;
  constexpr int kNearlyPercent = 95;
  const bool fills = far * rates.of_sm * 100 >= rates.of_link * kNearlyPercent;
  return {blocks, fills ? far : 0};
}

}  // namespace deep_ep::plan
