// SPDX-License-Identifier: MIT
// Low-latency operations that are on their way, as Python holds them.
#pragma once

#include <nanobind/nanobind.h>

#include "calls.h"

namespace deep_ep::python {

/// A low-latency dispatch between its two halves.
class DispatchTicket {
 public:
  DispatchTicket(const Seat& seat, const DispatchInput& input);

  /// Of an output of one block per expert: (x, scales, count, src_info, layout_range), known once the operation is
  /// sent. Their contents are there once it is finished; on a GPU, in the order of its stream.
  nanobind::tuple promised();

  /// Waits for the contents; on a GPU enqueues the rest. Statistics are None or what is added to, of CPU tensors only.
  void finish(const nanobind::object& wait_stats, const nanobind::object& count_stats);

  /// Waits and returns all, as Buffer.dispatch.
  nanobind::tuple receive();

  /// Waits and returns all, in the form of promised().
  nanobind::tuple receive_padded(const nanobind::object& wait_stats, const nanobind::object& count_stats);

 private:
  DispatchOutput wait(const nanobind::object& wait_stats, const nanobind::object& count_stats);

  Seat seat_;  // as it was when the operation began
  Ticket<DispatchOutput> ticket_;
};

/// A low-latency combine between its two halves.
class CombineTicket {
 public:
  CombineTicket(const Seat& seat, const CombineInput& input, const nanobind::kwargs& keywords);

  nanobind::tuple receive(nanobind::object wait_stats);
  /// On a GPU, where the caller gave `out`: enqueues the rest.
  void finish();

 private:
  Seat seat_;            // as it was when the operation began
  nanobind::dict kept_;  // weights, bias and out are used until the end
  nanobind::object out_;
  Ticket<CombineOutput> ticket_;
};

DispatchTicket low_latency_dispatch(const Seat& seat, const nanobind::kwargs& keywords);
CombineTicket low_latency_combine(const Seat& seat, const nanobind::kwargs& keywords);

/// DeepEP's low_latency_dispatch on CPU tensors, in one call: ((x, scales, count, src_info, layout_range), ticket).
/// With a hook the ticket's finish() is still to come; without, the ticket is None.
nanobind::tuple low_latency_dispatch_padded(const Seat& seat, bool with_hook, const nanobind::object& wait_stats,
                                            const nanobind::object& count_stats, const nanobind::kwargs& keywords);

}  // namespace deep_ep::python
