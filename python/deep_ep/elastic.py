# SPDX-License-Identifier: MIT
"""`ElasticBuffer`, the second generation of DeepEP's API."""

from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch

from . import _core, elastic_sizes, row_order
from ._torch import as_carried
from .config import align
from .elastic_fields import Fields
from .engram import EngramMixin
from .errors import Naming, require, require_counters
from .event import EventHandle, EventOverlap
from .gather import GatherMixin
from .group import barrier as group_barrier
from .handle import EPHandle
from .normal import Rows, received_as, split
from .pipeline import PipelineMixin
from .session import Session, two_biases
from .topology import physical_domains


class _Asked(NamedTuple):
    """What a caller of dispatch wants, beside the rows."""

    num_tokens: int
    topk_idx: Any
    stats: Any
    num_experts: Any
    num_max_tokens_per_rank: Optional[int]
    expert_alignment: Optional[int]
    num_sms: int
    num_qps: int
    do_handle_copy: bool
    do_cpu_sync: Optional[bool]
    do_expand: bool
    do_zero_padding: bool
    placement: Any


class ElasticBuffer(EngramMixin, PipelineMixin, GatherMixin, Session):
    """Rows come in order (source rank, source token), as upstream's `deterministic=True`, in every mode. Construction is
    collective. Keyword-only arguments are ours."""

    def __init__(
        self,
        group: Any,
        num_bytes: Optional[int] = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        ranks_per_node: Optional[int] = None,
        arena_bytes: int = 0,
        num_workers: int = 0,
        device: Any = None,
    ) -> None:
        super().__init__(group, ranks_per_node, num_workers, device)
        self.rank_idx, self.num_ranks = self._rank, self._num_ranks
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute, self.deterministic = prefer_overlap_with_compute, deterministic
        self.explicitly_destroy = explicitly_destroy
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.nccl_comm_handle = None
        self.num_rdma_ranks, self.num_nvlink_ranks = physical_domains(self._num_ranks, self._node_size)
        hybrid = allow_hybrid_mode and self.num_rdma_ranks > 1
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx = self._rank // self.num_scaleup_ranks
        self.scaleup_rank_idx = self._rank % self.num_scaleup_ranks
        self.num_allocated_qps = num_allocated_qps or (129 if hybrid else 17)
        self.num_bytes = self._bytes(num_bytes, num_cpu_bytes, hidden, num_topk, use_fp8_dispatch)
        self._cpu_timeout, self._gpu_timeout = float(num_cpu_timeout_secs), float(num_gpu_timeout_secs)
        self._num_sms: Dict[Any, int] = {}
        self._config.arena_bytes = arena_bytes
        self._config.timeout_secs = self._gpu_timeout
        self._open()
        self.runtime: Any = self._core

    def _bytes(
        self, num_bytes: Optional[int], num_cpu_bytes: int, hidden: int, num_topk: int, use_fp8_dispatch: bool
    ) -> int:
        if num_bytes is None:
            require(num_cpu_bytes == 0, f"num_cpu_bytes needs num_bytes: {num_cpu_bytes}")
            require(
                self.num_max_tokens_per_rank > 0 and hidden > 0,
                f"num_bytes, or num_max_tokens_per_rank and hidden, must be given: {num_bytes}, "
                f"{self.num_max_tokens_per_rank}, {hidden}",
            )
            return self.get_buffer_size_hint(
                self.group,
                self.num_max_tokens_per_rank,
                hidden,
                num_topk,
                use_fp8_dispatch,
                self.allow_hybrid_mode,
                self.allow_multiple_reduction,
            )
        page = elastic_sizes.PAGE
        require(
            num_bytes > 0 and num_bytes % page == 0, f"num_bytes must be a positive multiple of {page}: {num_bytes}"
        )
        require(
            0 <= num_cpu_bytes <= num_bytes and num_cpu_bytes % page == 0,
            f"num_cpu_bytes must be a multiple of {page}, at most num_bytes: {num_cpu_bytes}",
        )
        return num_bytes

    # Sizes and small things -----------------------------------------------------------------------------------------

    get_buffer_size_hint = staticmethod(elastic_sizes.buffer_size_hint)
    get_engram_storage_size_hint = staticmethod(elastic_sizes.engram_storage_size_hint)
    get_pp_buffer_size_hint = staticmethod(elastic_sizes.pp_buffer_size_hint)
    get_agrs_num_max_session_bytes = staticmethod(elastic_sizes.agrs_num_max_session_bytes)

    @staticmethod
    def get_agrs_buffer_size_hint(group: Any, num_max_session_bytes: int) -> int:
        """`num_bytes` of a buffer for sessions of that size."""
        return align(num_max_session_bytes, elastic_sizes.PAGE)

    def close(self) -> None:
        self.runtime = None
        super().close()

    def destroy(self) -> None:
        """Ends the buffer; allowed where it was made with `explicitly_destroy`. May be called twice."""
        assert self.explicitly_destroy, "destroy() is for buffers made with explicitly_destroy=True"
        self.close()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Returns when every rank has called it; on GPUs, when all have done what they had enqueued by then."""
        self._opened()
        if self._on_gpu:
            torch.cuda.current_stream(self._device).synchronize()
            self._stream.synchronize()
        group_barrier(self.group)

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream, now."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The stream that operations run on: on CPUs they run in the call itself."""
        return self._comm_stream()

    def get_physical_domain_size(self) -> Tuple[int, int]:
        """(nodes, ranks of a node)"""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> Tuple[int, int]:
        """(scale-out ranks, scale-up ranks): nodes and ranks of a node in hybrid mode, else 1 and all."""
        return self.get_physical_domain_size() if self.allow_hybrid_mode else (1, self._num_ranks)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Upstream's model. It decides nothing here; frameworks pass it on."""
        require(num_scaleout_topk == 0, f"num_scaleout_topk must be 0: {num_scaleout_topk}")
        key = (num_experts, num_topk, rdma_gbs, nvlink_gbs, sm_read_gbs, sm_write_gbs)
        if key not in self._num_sms:
            link = nvlink_gbs or 18 * 26.562 * 0.9
            rates = (sm_read_gbs, sm_write_gbs)
            self._num_sms[key] = elastic_sizes.theoretical_num_sms(
                self._num_ranks, num_experts, num_topk, link, rates, self.prefer_overlap_with_compute
            )
        return self._num_sms[key]

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Upstream's number. It decides nothing here; frameworks pass it on."""
        return min(16 * num_sms + 1 if self.num_scaleout_ranks > 1 else min(num_sms, 9), self.num_allocated_qps)

    # Dispatch -------------------------------------------------------------------------------------------------------

    @Naming(max_rows="do_cpu_sync=False")
    def dispatch(
        self,
        x: Rows,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        num_experts: Optional[int] = None,
        num_max_tokens_per_rank: Optional[int] = None,
        expert_alignment: Optional[int] = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Optional[EPHandle] = None,
        do_handle_copy: bool = True,
        do_cpu_sync: Optional[bool] = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        *,
        placement: Any = None,
    ) -> Tuple[Any, Optional[torch.Tensor], Optional[torch.Tensor], EPHandle, EventOverlap]:
        """Sends each token, once, to every rank that hosts one of its experts. Collective.

        `x` is [tokens, hidden], or (FP8 rows, their scales). With the `handle` of an earlier dispatch rows go the same
        way, `topk_idx` is left out and nothing is counted. `do_cpu_sync=False`: outputs have room for the most that can
        come, and counts are in the handle's tensors only.

        Returns (rows, ids of this rank's experts or -1, weights as sent, handle, event): a row per token, or with
        `do_expand` a row per token and expert, expert by expert, each group rounded up to `expert_alignment`, with
        weights [rows] and None for the ids."""
        data, scales = split(x)
        self._use(data, "x", "dispatch")
        asked = _Asked(
            data.size(0),
            topk_idx,
            cumulative_local_expert_recv_stats,
            num_experts,
            num_max_tokens_per_rank,
            expert_alignment,
            num_sms,
            num_qps,
            do_handle_copy,
            do_cpu_sync,
            do_expand,
            do_zero_padding,
            placement,
        )
        keywords: Dict[str, Any] = dict(
            x=as_carried(data),
            scales=scales,
            topk_weights=topk_weights,
            column_major_scales=use_tma_aligned_col_major_sf,
            mask_topk_weights=False,
        )
        with self._call(
            "dispatch", previous_event, async_with_compute_stream, previous_event_before_epilogue
        ) as streams:
            if handle is None:
                received, handle = self._dispatch_first(keywords, asked)
                streams.results(*received, *handle.tensors())
            else:
                received = self._dispatch_again(keywords, asked, handle)
                streams.results(*received)
        recv_data, recv_scales, recv_idx, recv_weights = received
        event = streams.finished(data, scales, topk_idx, topk_weights, cumulative_local_expert_recv_stats)
        return received_as(data, recv_data, recv_scales), recv_idx, recv_weights, handle, event

    def _check_first(self, asked: "_Asked", max_tokens: int) -> None:
        require(
            asked.num_sms >= 0 and asked.num_qps >= 0,
            f"num_sms and num_qps must not be negative: {asked.num_sms}, {asked.num_qps}",
        )
        require(asked.topk_idx is not None and asked.num_experts is not None, "topk_idx and num_experts must be given")
        require(asked.do_expand or not asked.do_zero_padding, "do_zero_padding needs do_expand")
        require(
            asked.num_tokens <= max_tokens,
            f"x: {asked.num_tokens} tokens are more than num_max_tokens_per_rank: {max_tokens}",
        )
        if asked.stats is not None:
            slots = self._placement(asked.placement, asked.num_experts).num_slots(self._rank)
            require_counters("cumulative_local_expert_recv_stats", asked.stats, torch.int32, slots)

    def _dispatch_first(self, keywords: Dict[str, Any], asked: "_Asked") -> Tuple[Tuple[Any, ...], EPHandle]:
        max_tokens = asked.num_max_tokens_per_rank or self.num_max_tokens_per_rank
        self._checked("dispatch", lambda: self._check_first(asked, max_tokens))
        topk_idx, alignment, expanded = asked.topk_idx, asked.expert_alignment or 1, asked.do_expand
        cpu_sync = asked.do_cpu_sync is None or asked.do_cpu_sync
        num_sms = asked.num_sms or self.get_theoretical_num_sms(asked.num_experts, topk_idx.size(1))
        bound, slots = (
            self._num_ranks * max_tokens,
            self._placement(asked.placement, asked.num_experts).num_slots(self._rank),
        )
        worst_expanded = max(1, align(bound * min(topk_idx.size(1), slots) + (alignment - 1) * slots, alignment))
        if not cpu_sync:
            keywords["max_rows"] = worst_expanded if expanded else max(1, bound)
        data, scales, idx, weights, _, core_handle = self._opened().dispatch(
            **keywords,
            topk_idx=topk_idx,
            num_experts=asked.num_experts,
            placement=asked.placement,
            expert_alignment=alignment,
            layout=_core.OutputLayout.by_expert if expanded else _core.OutputLayout.by_rank,
            timeout_secs=self._cpu_timeout if cpu_sync else self._gpu_timeout,
            **self._sms(num_sms),
        )
        arrivals = core_handle.num_arrivals if cpu_sync else min(bound, core_handle.num_arrivals)
        fields = Fields(core_handle, idx, arrivals, max_tokens, self.num_scaleup_ranks)
        aligned = core_handle.aligned_counts() if cpu_sync else []
        made = EPHandle.of_dispatch(
            fields,
            do_expand=expanded,
            num_experts=asked.num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=max_tokens,
            num_sms=num_sms,
            topk_idx=topk_idx.clone() if asked.do_handle_copy else topk_idx,
            num_recv_tokens=arrivals,
            num_expanded_tokens=sum(aligned) if cpu_sync else worst_expanded,
            num_recv_tokens_per_expert_list=aligned,
        )
        if asked.placement is not None:
            made._routes = core_handle
        if not expanded and self.num_scaleout_ranks > 1 and not self.deterministic:
            order = row_order.by_scaleup_rank(made.recv_src_metadata, max_tokens, self.num_scaleup_ranks)
            made.recv_src_metadata = made.recv_src_metadata[order]
            data, scales, idx, weights = (row_order.taken(each, order) for each in (data, scales, idx, weights))
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            made.make_fields()  # by the graph, anew in each replay
        if asked.stats is not None:
            asked.stats.add_(made.num_unaligned_recv_tokens_per_expert)
        return (data, scales, None if expanded else idx, weights), made

    def _placement(self, placement: Any, num_experts: int) -> Any:
        return _core.Placement.even(num_experts, self._num_ranks) if placement is None else placement

    def _check_again(self, asked: "_Asked", handle: EPHandle) -> Any:
        require(asked.topk_idx is None, "topk_idx must be None with a handle")
        require(asked.stats is None, "cumulative_local_expert_recv_stats must be None with a handle")
        require(not asked.do_cpu_sync, "do_cpu_sync must not be set with a handle")
        for name in ("num_experts", "num_max_tokens_per_rank", "expert_alignment"):
            given, own = getattr(asked, name), getattr(handle, name)
            require(given in (None, own), f"{name} == the handle's: {given} vs {own}")
        require(handle.do_expand or not asked.do_expand, "do_expand: the handle was made without it")
        return handle.core_handle(self._rank, self._num_ranks)

    def _dispatch_again(self, keywords: Dict[str, Any], asked: "_Asked", handle: EPHandle) -> Tuple[Any, ...]:
        core_handle = self._checked("dispatch", lambda: self._check_again(asked, handle))
        side = [] if handle.do_expand else [self._marked_ids(core_handle, handle)]
        data, scales, _, weights, arrived, _ = self._opened().dispatch(
            **keywords, handle=core_handle, side=side, **self._sms(asked.num_sms or handle.num_sms)
        )
        ids = self._local_ids(arrived[0], handle) if arrived else None
        order = None if handle.do_expand else handle.row_order(data.size(0))
        return tuple(row_order.taken(each, order) for each in (data, scales, ids, weights))

    def _marked_ids(self, core_handle: Any, handle: EPHandle) -> torch.Tensor:
        """int64 [tokens, topk]: each selection's expert, and which rank's copy of it was taken; -1 for none."""
        ids, rank = handle.topk_idx.to(torch.int64), core_handle.dst_rank.to(torch.int64)
        return torch.where(rank >= 0, rank * handle.num_experts + ids, -1)

    def _local_ids(self, marked: torch.Tensor, handle: EPHandle) -> torch.Tensor:
        """Those ids beside the rows that came, as slots of this rank, -1 where another rank's copy was taken."""
        placement, experts = handle.placement(self._num_ranks), handle.num_experts
        slots = range(placement.num_slots(self._rank))
        device = marked.device
        slot_of = torch.full((experts + 1,), -1, dtype=handle.topk_idx.dtype, device=device)
        for slot in slots:
            slot_of[placement.expert_at(self._rank, slot)] = slot
        here = marked.div(experts, rounding_mode="floor") == self._rank
        valid = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        here &= torch.arange(marked.size(0), device=device).unsqueeze(1) < valid
        return slot_of[torch.where(here, marked % experts, experts)]

    # Combine --------------------------------------------------------------------------------------------------------

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: Optional[torch.Tensor] = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Brings rows, in the order in which dispatch gave them, back to their tokens and adds them up in the order of
        the selections, with one `bias` [tokens, hidden] or two. Collective. Returns (sums [tokens, hidden], weights as
        their experts' ranks returned them or None, event)."""
        self._use(x, "x", "combine")

        def check() -> Tuple[Any, Any, Any]:
            require(
                topk_weights is None or not handle.do_expand or self.allow_multiple_reduction,
                "topk_weights must be None for expanded rows with allow_multiple_reduction=False",
            )
            core_handle = handle.core_handle(self._rank, self._num_ranks)
            if x.size(0) != core_handle.num_rows:
                core_handle = _cut_to(core_handle, handle, x.size(0))
            return core_handle, two_biases(bias), _in_order(x, topk_weights, handle)

        with self._call(
            "combine", previous_event, async_with_compute_stream, previous_event_before_epilogue
        ) as streams:
            core_handle, biases, (rows, weights) = self._checked("combine", check)
            combined, combined_weights = self._combine_rows_home(
                self._opened(),
                rows,
                core_handle,
                weights,
                biases,
                weights_from_owner=True,
                order=self._order(handle.do_expand),
                **self._sms(num_sms or handle.num_sms),
            )
        return combined, combined_weights, streams.finished(x, topk_weights, *biases, *handle.tensors())

    def _order(self, expanded: bool) -> Any:
        multiple = self.allow_multiple_reduction
        return _core.SumOrder(
            by_topk=True,
            round_per_rank=expanded and multiple,
            round_per_node=multiple and self.num_scaleout_ranks > 1,
        )


def _cut_to(core_handle: Any, handle: EPHandle, num_rows: int) -> Any:
    """The same routes for a caller who kept only so many rows of a bounded dispatch."""
    by_expert, by_rank = handle.psum_num_recv_tokens_per_expert, handle.psum_num_recv_tokens_per_scaleup_rank
    ends = by_expert if handle.do_expand else by_rank
    received = int(ends[-1]) if ends.numel() > 0 else 0
    require(received <= num_rows, f"x: {num_rows} rows are fewer than the {received} that were received")
    return core_handle.with_rows(num_rows)


def _in_order(
    x: torch.Tensor, topk_weights: Optional[torch.Tensor], handle: EPHandle
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Rows as the library gave them, wherever hybrid mode or the caller put them since."""
    order = None if handle.do_expand else handle.row_order(x.size(0))
    if order is None:
        return x, topk_weights
    back = row_order.inverse(order)
    return row_order.taken(x, back), row_order.taken(topk_weights, back)  # type: ignore[return-value]
