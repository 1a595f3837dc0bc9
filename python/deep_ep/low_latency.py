# SPDX-License-Identifier: MIT
"""V1's low-latency calls. `send` waits for nobody; the hook, or the call itself without one, waits and places the rows."""

import weakref
from typing import Any, Callable, Dict, Optional, Set, Tuple

import torch

from . import _core
from .config import NUM_TICKETS, low_latency_capacity
from .errors import Error, Naming, invalid, require, require_counters, unsupported
from .event import EventOverlap, finished
from .forks import refuse, unannounced
from .session import Session

Hook = Optional[Callable[[], None]]

_BY_TOPK = _core.SumOrder(by_topk=True)
_PADDED = _core.OutputLayout.padded

_OF_DISPATCH = Naming(max_tokens_per_rank="num_max_dispatch_tokens_per_rank")
_OF_COMBINE = Naming(weights="topk_weights")

#: Of forks: the switch, and what counts beside it.
_NVFP4 = ("use_nvfp4", "x_global_scale")
_OVERLAP = tuple(
    "overlap src_signals src_signal_expect_value packed_recv_count comp_signal block_m threshold num_sms".split()
)


class LowLatencyMode(Session):
    """Rows of every expert in a block of fixed size, `[experts here, ranks * max tokens, hidden]`."""

    low_latency_mode: bool
    enable_shrink: bool

    @unannounced
    @_OF_DISPATCH
    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        placement: Any = None,
        **of_forks: Any,
    ) -> Tuple[Any, torch.Tensor, Tuple[Any, ...], EventOverlap, Hook]:
        """Sends each token to each of its experts, with fixed shapes and no wait for counts. Collective.

        `x` is BF16 [tokens, hidden], of `num_max_dispatch_tokens_per_rank` tokens at most, a number equal on all ranks.
        With `use_fp8` rows travel as FP8, one scale per 128 channels; `round_scale` makes scales powers of two,
        `use_ue8m0` packs the exponents of four into an int32. Statistics are added to.

        Returns (rows [experts here, ranks * max tokens, hidden] or (rows, scales), rows per expert, handle, event,
        hook). With `return_recv_hook` contents are there once the hook has run; without it the hook is None. The handle
        is (token on its source rank of each row, (first row << 32 | rows) of each expert and source, max tokens,
        hidden, experts)."""
        if of_forks:
            refuse(self, "low_latency_dispatch", of_forks, _NVFP4, "rows travel as BF16, or as FP8 with use_fp8")
        if isinstance(cumulative_local_expert_recv_stats, bool):  # the first V1 had use_fp8 in this place
            use_fp8, cumulative_local_expert_recv_stats = cumulative_local_expert_recv_stats, None
        core = self._use(x, "x", "low_latency_dispatch")
        shape = (x.size(-1), num_max_dispatch_tokens_per_rank, topk_idx.size(-1), num_experts)
        if shape not in self._fitting[self._on_gpu]:
            core = self._core_for(shape)
        stats = (dispatch_wait_recv_cost_stats, cumulative_local_expert_recv_stats)
        if async_finish or stats[0] is not None or stats[1] is not None:
            self._checked(
                "low_latency_dispatch",
                lambda: self._check_dispatch(async_finish and return_recv_hook, *stats, num_experts, placement),
            )
        keywords: Dict[str, Any] = dict(
            x=x,
            topk_idx=topk_idx,
            num_experts=num_experts,
            max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            placement=placement,
            layout=_PADDED,
            column_major_scales=True,
            fp8=(round_scale, use_ue8m0) if use_fp8 else None,
            mask_silent=self.enable_shrink,
        )
        if self._on_gpu:
            return self._dispatch_on_gpu(keywords, stats[1], async_finish, return_recv_hook)
        made, ticket = core.low_latency_dispatch_padded(return_recv_hook, *stats, **keywords)
        data, scales, count, src_info, layout_range = made
        hook = None if ticket is None else once(_OF_DISPATCH.around(lambda: ticket.finish(*stats)))
        handle = (src_info, layout_range, num_max_dispatch_tokens_per_rank, shape[0], num_experts)
        event = finished(True, x, topk_idx, *made) if async_finish else EventOverlap()
        return ((data, scales) if use_fp8 else data), count, handle, event, hook

    @unannounced
    @_OF_COMBINE
    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[torch.Tensor] = None,
        combine_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        *,
        wire: Optional[str] = None,
        **of_forks: Any,
    ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        """Brings experts' rows, `x` of the shape that dispatch gave, back to their tokens: the sum over k of weight k
        times row k, in FP32, in order of k. Collective. `topk_idx` is that of the dispatch; selections that became -1
        since do not count. `zero_copy`: rows are in the buffer of `get_next_low_latency_combine_buffer`. `wire`: how
        rows cross, "logfmt10" (as `use_logfmt` asks for), "fp8", or as they are; equal on all ranks.

        Returns (sums [tokens, hidden], which are `out` where it is given, event, hook or None)."""
        if of_forks:
            why = "combine sends rows that are complete; return_recv_hook overlaps its second half"
            refuse(self, "low_latency_combine", of_forks, _OVERLAP, why)
        core, wait_stats = self._use(x, "x", "low_latency_combine"), combine_wait_recv_cost_stats

        def check() -> Any:
            if use_logfmt or async_finish or wait_stats is not None:
                self._check_combine(use_logfmt, zero_copy, wire, async_finish and return_recv_hook, wait_stats)
            # Selections that the caller has taken back since the dispatch do not count.
            found = self._handle_of(handle, None if self._on_gpu else topk_idx)
            return found, self._combine_rows(x, handle, zero_copy)

        core_handle, rows = self._checked("low_latency_combine", check)
        keywords: Dict[str, Any] = dict(
            x=rows, weights=topk_weights, order=_BY_TOPK, zero_copy=zero_copy, mask_silent=self.enable_shrink
        )
        if wire or use_logfmt:
            keywords["wire"] = wire or "logfmt10"
        if self._on_gpu:
            return self._combine_on_gpu(keywords, core_handle, topk_idx, out, async_finish, return_recv_hook)
        if return_recv_hook and out is None:
            out = torch.empty((topk_idx.size(0), x.size(-1)), dtype=x.dtype, device="cpu")
        if out is not None:
            keywords["out"] = out
        ticket = core.low_latency_combine(handle=core_handle, at_once=not return_recv_hook, **keywords)
        if return_recv_hook:
            assert out is not None
            return out, EventOverlap(), once(_OF_COMBINE.around(lambda: ticket.receive(wait_stats)))
        combined, _ = ticket.receive(wait_stats)
        event = finished(True, x, topk_idx, topk_weights, combined) if async_finish else EventOverlap()
        return combined, event, None

    def get_next_low_latency_combine_buffer(self, handle: Tuple[Any, ...]) -> torch.Tensor:
        """Where the rows of this handle's `low_latency_combine(.., zero_copy=True)` are to be written. Ask anew for each
        combine: after it, other ranks may still read there. Peers reach this memory, so nothing is copied."""
        src_info, layout_range, _, hidden = handle[:4]
        shape = (src_info.size(0), src_info.size(1), hidden)
        buffers, key = self._combine_buffers, layout_range.data_ptr()
        found = buffers.get(key)
        # One of another shape was for a handle that is gone, whose memory serves this one now.
        if found is None or found.shape != shape:
            buffers.pop(key, None)
            while len(buffers) >= NUM_TICKETS:  # fetched, but never combined
                buffers.pop(next(iter(buffers)))
            found = buffers[key] = self._combine_buffer(shape)
        return found

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: flags carry the number of their operation, and modes mix freely."""
        assert self.low_latency_mode, "clean_low_latency_buffer() needs low_latency_mode=True"
        self._opened()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out of low-latency calls, or takes it back; see `set_masked`."""
        self._require_shrink()
        self._opened().set_masked(rank_to_mask, bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for each rank that is left out and 0 for the others."""
        self._require_shrink()
        masked = self.masked_ranks()
        require(mask_status.numel() == len(masked), f"mask must have {len(masked)} entries: {mask_status.numel()}")
        mask_status.copy_(torch.tensor(masked, dtype=mask_status.dtype, device="cpu"))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes every rank back."""
        self._require_shrink()
        for rank in range(self._num_ranks):
            if self._opened().masked(rank):
                self._opened().set_masked(rank, False)

    # On a GPU -------------------------------------------------------------------------------------------------------

    def _dispatch_on_gpu(
        self, keywords: Dict[str, Any], count_stats: Optional[torch.Tensor], async_finish: bool, with_hook: bool
    ) -> Tuple[Any, torch.Tensor, Tuple[Any, ...], EventOverlap, Hook]:
        """Nothing is waited for on the host: the outputs are known at once and filled in the order of the stream. With a hook
        both halves run on the caller's current stream, else on the communication stream."""
        x, topk_idx = keywords["x"], keywords["topk_idx"]

        def count(counted: torch.Tensor) -> None:
            if count_stats is not None:
                count_stats.add_(counted)

        if with_hook:
            stream = self._current_stream("low_latency_dispatch")
            ticket = self._opened().low_latency_dispatch(**keywords)
            made = ticket.promised()

            def receive() -> None:
                ticket.finish()
                with torch.cuda.stream(stream):
                    count(made[2])

            event, hook = EventOverlap(), once(_OF_DISPATCH.around(receive))
        else:
            with self._call("low_latency_dispatch", None, async_finish) as call:
                ticket = self._opened().low_latency_dispatch(at_once=True, **keywords)
                made = ticket.promised()
                ticket.finish()
                count(made[2])
            event, hook = call.finished(x, topk_idx, count_stats), None
        data, scales, counted, src_info, layout_range = made
        # Weak: while the ids live, nothing else can lie where they do.
        routed_by = weakref.ref(topk_idx), _state_of(topk_idx)
        self.__dict__.setdefault("_routed_by", {})[layout_range.data_ptr()] = routed_by
        handle = (src_info, layout_range, keywords["max_tokens_per_rank"], x.size(1), keywords["num_experts"])
        return (data if scales is None else (data, scales)), counted, handle, event, hook

    def _combine_on_gpu(
        self,
        keywords: Dict[str, Any],
        core_handle: Any,
        topk_idx: torch.Tensor,
        out: Optional[torch.Tensor],
        async_finish: bool,
        with_hook: bool,
    ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        x, weights = keywords["x"], keywords["weights"]
        if out is None:
            out = torch.empty((topk_idx.size(0), x.size(-1)), dtype=x.dtype, device=x.device)
        keywords["out"] = out
        if with_hook:
            self._current_stream("low_latency_combine")
            ticket = self._opened().low_latency_combine(handle=self._without(core_handle, topk_idx), **keywords)
            return out, EventOverlap(), once(_OF_COMBINE.around(ticket.finish))
        with self._call("low_latency_combine", None, async_finish) as call:
            routes = self._without(core_handle, topk_idx)
            self._opened().low_latency_combine(handle=routes, at_once=True, **keywords).finish()
        return out, call.finished(x, topk_idx, weights, out), None

    def _without(self, core_handle: Any, topk_idx: torch.Tensor) -> Any:
        """The routes without the selections that the caller has taken back since the dispatch."""
        ids, state = self.__dict__["_routed_by"].get(core_handle.source_range_ptr, (lambda: None, None))
        if ids() is not None and state == _state_of(topk_idx):
            return core_handle
        return core_handle.with_dst_rank(torch.where(topk_idx < 0, -1, core_handle.dst_rank))

    def _current_stream(self, operation: str) -> Any:
        self._checked(operation, self._require_own_stream)
        return torch.cuda.current_stream(self._device)

    def _no_wait_stats(self) -> None:
        if self._on_gpu:
            raise unsupported("wait statistics of one call are for CPU tensors: see buffer.statistics()")

    # Capacity -------------------------------------------------------------------------------------------------------

    def _plan_low_latency(self, num_rdma_bytes: int) -> None:
        """Slots from the bytes that the caller grants; a call that needs more opens a larger buffer, see `_core_for`."""
        # Shapes of calls that fit as the buffer is, on CPUs and on GPUs.
        self._fitting: Tuple[Set[Any], Set[Any]] = (set(), set())
        self._largest: Tuple[int, ...] = (0, 0, 0)
        # Handed out and not combined yet, by the memory of the handle's layout_range.
        self._combine_buffers: Dict[int, torch.Tensor] = {}
        capacity = _core.LowLatencyCapacity()
        # A GPU's memory is too dear for a guess: there the first call says what it needs.
        if num_rdma_bytes > 0 and not self._on_gpu:
            # The library asks for a shape; one huge token from each rank is this many bytes.
            per_ticket = num_rdma_bytes // self._config.num_tickets
            capacity.max_tokens_per_rank, capacity.num_topk, capacity.side_bytes = 1, 1, 0
            capacity.row_bytes = -(-per_ticket // self._num_ranks)
        self._config.low_latency = capacity

    def _core_for(self, shape: Tuple[int, int, int, int]) -> Any:
        """The C++ buffer, large enough for calls of (hidden, max tokens, top-k, experts). All ranks see the same numbers, so
        all enlarge it together."""
        if not self.low_latency_mode:
            raise invalid("low-latency calls need a buffer made with low_latency_mode=True")
        core, fitting = self._opened(), self._fitting[self._on_gpu]
        reason = core.supports_low_latency(*shape)
        if "Config::low_latency" in reason:
            # At least the largest of each that was ever asked for.
            hidden, max_tokens, num_topk, _ = shape
            self._largest = tuple(map(max, self._largest, (max_tokens, hidden, num_topk)))
            self._config.low_latency = low_latency_capacity(*self._largest)
            fitting.clear()
            del core
            self._reopen()
            core = self._opened()
            reason = core.supports_low_latency(*shape)
        if not reason:
            fitting.add(shape)
        return core  # where it does not fit at all, the library's own checks say why

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_dispatch(self, both: bool, wait_stats: Any, count_stats: Any, num_experts: int, placement: Any) -> None:
        require(not both, "async_finish and return_recv_hook exclude each other")
        if wait_stats is not None:
            self._no_wait_stats()
            require_counters("dispatch_wait_recv_cost_stats", wait_stats, torch.int64, self._num_ranks)
        if count_stats is not None:
            placed = _core.Placement.even(num_experts, self._num_ranks) if placement is None else placement
            slots = placed.num_slots(self._rank)
            require_counters("cumulative_local_expert_recv_stats", count_stats, torch.int32, slots)

    def _check_combine(self, use_logfmt: bool, zero_copy: bool, wire: Any, both: bool, wait_stats: Any) -> None:
        require(not (use_logfmt and zero_copy), "use_logfmt and zero_copy exclude each other")
        require(not (use_logfmt and wire), f"use_logfmt and wire exclude each other: wire is {wire!r}")
        require(not both, "async_finish and return_recv_hook exclude each other")
        if wait_stats is not None:
            require_counters("combine_wait_recv_cost_stats", wait_stats, torch.int64, self._num_ranks)
            self._no_wait_stats()

    def _handle_of(self, handle: Tuple[Any, ...], topk_idx: Optional[torch.Tensor]) -> Any:
        require(
            isinstance(handle, (tuple, list)) and len(handle) >= 2,
            "handle must be the tuple that low_latency_dispatch returned",
        )
        found = _core.handle_of(handle[1], topk_idx)
        require(
            found is not None,
            "handle: its layout_range is not the tensor that low_latency_dispatch returned, or the dispatch's hook has "
            "not run yet",
        )
        return found

    def _combine_buffer(self, shape: Tuple[int, ...]) -> torch.Tensor:
        if not self._on_gpu:
            try:
                return self.allocate(shape, torch.bfloat16)
            except Error:  # the arena is full: this combine copies
                pass
        return torch.empty(shape, dtype=torch.bfloat16, device=self._device)

    def _combine_rows(self, x: torch.Tensor, handle: Tuple[Any, ...], zero_copy: bool) -> torch.Tensor:
        """x itself, or what was written into the buffer that was handed out for this handle."""
        if not self._combine_buffers:
            return x
        written = self._combine_buffers.pop(handle[1].data_ptr(), None)
        if not zero_copy or written is None:
            return x
        require(written.shape == x.shape, f"zero_copy: x must be {list(written.shape)}: {list(x.shape)}")
        return written

    def _require_shrink(self) -> None:
        require(self.enable_shrink, "masks need a buffer made with enable_shrink=True")


def once(receive: Callable[[], Any]) -> Callable[[], None]:
    """A hook: the second call finds nothing to do."""
    pending = [receive]

    def hook() -> None:
        if pending:
            pending.pop()()

    return hook


def _state_of(topk_idx: torch.Tensor) -> Tuple[int, int]:
    """Differs where these are other ids, or were written to; torch does not count writes to inference tensors."""
    return topk_idx.data_ptr(), -1 if topk_idx.is_inference() else topk_idx._version
