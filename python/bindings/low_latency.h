// SPDX-License-Identifier: MIT
// Low-latency operations that are on their way, as Python holds them.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "calls.h"

namespace deep_ep::python {

/// The small tensors of DeepEP's low_latency_dispatch, which may be given out before its hook has run.
struct SlotTables;

/// A low-latency dispatch between its two halves.
class DispatchTicket {
 public:
  DispatchTicket(const Seat& seat, const DispatchInput& input);
  ~DispatchTicket();
  DispatchTicket(DispatchTicket&&) noexcept;

  /// (x, scales, count, src_info, layout_range), whose contents are there once receive() has run.
  nanobind::tuple prepare();

  /// Waits and finishes. With prepared tensors: fills them and returns the handle. Else: as Buffer.dispatch.
  nanobind::object receive(nanobind::object wait_stats, nanobind::object count_stats);

  /// On a GPU: the outputs, known once the operation is sent, in the form of prepare(); and enqueues the rest of it.
  nanobind::tuple promised();
  void finish();

  /// As receive() without prepared tensors, in the form of prepare().
  nanobind::tuple receive_padded(const nanobind::object& wait_stats, const nanobind::object& count_stats);

 private:
  DispatchOutput wait(const nanobind::object& wait_stats, const nanobind::object& count_stats);

  Seat seat_;  // as it was when the operation began
  Ticket<DispatchOutput> ticket_;
  std::unique_ptr<SlotTables> prepared_;
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
/// With a hook the ticket's receive() is still to come; without, the ticket is None.
nanobind::tuple low_latency_dispatch_padded(const Seat& seat, bool with_hook, const nanobind::object& wait_stats,
                                            const nanobind::object& count_stats, const nanobind::kwargs& keywords);

}  // namespace deep_ep::python
