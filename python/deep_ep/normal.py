# SPDX-License-Identifier: MIT
"""V1's high-throughput calls: dispatch layout, dispatch and combine, inside a node and between nodes."""

from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from . import _core
from ._torch import as_carried, as_given
from .config import DISPATCH_CONFIGS, Config, align
from .errors import Naming, require
from .event import EventOverlap
from .legacy_handle import internode_tuple, intranode_tuple, membership_words, ranks_as_experts, recover
from .session import Session, two_biases

Rows = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


def split(x: Rows) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """(rows, scales or None)"""
    return x if isinstance(x, tuple) else (x, None)


def received_as(data: torch.Tensor, received: torch.Tensor, scales: Optional[torch.Tensor]) -> Rows:
    """Received rows in the form in which they were given."""
    rows = as_given(received, data)
    return rows if scales is None else (rows, scales)


class NormalMode(Session):
    """Rows come in order (source rank, source token), once per rank; combine adds them unweighted in rank order, between
    nodes rounded to the rows' dtype per node first."""

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        placement: Any = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts where this rank's tokens go, by `topk_idx` [tokens, top-k], -1: no selection. Local. Returns tokens
        per rank, int32 [ranks]; per node, int32 [nodes], None inside one node; selections per expert, int32 [experts];
        whether a token goes to a rank, bool [tokens, ranks]; and an event."""
        core = self._use(topk_idx, "topk_idx")
        with self._call("dispatch", previous_event, async_finish) as call:
            per_rank, per_node, per_expert, member = core.dispatch_layout(topk_idx, num_experts, placement)
        per_node = per_node if self._num_nodes > 1 else None
        return per_rank, per_node, per_expert, member, call.finished(topk_idx)

    @Naming(max_rows="num_worst_tokens")
    def dispatch(
        self,
        x: Rows,
        handle: Optional[Tuple[Any, ...]] = None,
        num_tokens_per_rank: Optional[torch.Tensor] = None,
        num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
        is_token_in_rank: Optional[torch.Tensor] = None,
        num_tokens_per_expert: Optional[torch.Tensor] = None,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        placement: Any = None,
    ) -> Tuple[Any, Any, Any, Any, Any, EventOverlap]:
        """Sends each token, once, to every rank that hosts one of its experts. Collective.

        `x` is [tokens, hidden], or (FP8 rows, their scales). Without `handle` the results of `get_dispatch_layout` must
        be given, and ids and weights together or not at all. With the handle of an earlier dispatch, rows go the same
        way and nothing is counted.

        Returns (rows in order of source rank and source token, ids of this rank's experts or -1, weights or 0, list of
        rows per expert here, each rounded up to `expert_alignment`, handle, event); with a handle, None instead of all
        but rows and event. `num_worst_tokens`: outputs have as many rows, those behind the last have ids -1, and the
        list is empty."""
        data, scales = split(x)
        core = self._use(data, "x", "dispatch")
        layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        with self._call("dispatch", previous_event, async_finish) as call:
            routes = self._checked(
                "dispatch",
                lambda: (
                    self._new_routes(data, layout, topk_idx, topk_weights, placement)
                    if handle is None
                    else self._known_routes(handle, topk_idx, topk_weights)
                ),
            )
            if handle is None:
                routes.update(expert_alignment=expert_alignment, max_rows=num_worst_tokens)
            recv_data, recv_scales, recv_idx, recv_weights, side, core_handle = core.dispatch(
                x=as_carried(data), scales=scales, **routes, **self._config_sms(config)
            )
            counts = None
            if handle is None:
                counts = self._expert_counts(core_handle, layout[2], topk_idx, expert_alignment, num_worst_tokens)
        rows = received_as(data, recv_data, recv_scales)
        event = call.finished(data, scales, topk_idx, topk_weights, is_token_in_rank)
        if handle is not None:
            return rows, None, None, None, None, event
        tuple_ = self._handle_tuple(core_handle, is_token_in_rank, side, config)
        return rows, None if topk_idx is None else recv_idx, recv_weights, counts, tuple_, event

    def combine(
        self,
        x: torch.Tensor,
        handle: Tuple[Any, ...],
        topk_weights: Optional[torch.Tensor] = None,
        bias: Any = None,
        config: Optional[Config] = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Brings rows, in the order in which dispatch gave them, back to their tokens and adds them up, unweighted,
        with one `bias` [tokens, hidden] or two. Collective. Returns (sums [tokens, hidden], sums of `topk_weights` or
        None, event)."""
        core = self._use(x, "x", "combine")
        num_topk = None if topk_weights is None else topk_weights.size(-1)
        with self._call("combine", previous_event, async_finish) as call:
            core_handle, biases = self._checked(
                "combine", lambda: (recover(handle, self._rank, self._num_ranks, num_topk), two_biases(bias))
            )
            combined, weights = self._combine_rows_home(
                core, x, core_handle, topk_weights, biases, order=self._rank_order(), **self._config_sms(config)
            )
        return combined, weights, call.finished(x, topk_weights, *biases)

    def internode_dispatch(
        self,
        x: Rows,
        handle: Optional[Tuple[Any, ...]] = None,
        num_tokens_per_rank: Optional[torch.Tensor] = None,
        num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
        is_token_in_rank: Optional[torch.Tensor] = None,
        num_tokens_per_expert: Optional[torch.Tensor] = None,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        expert_alignment: int = 1,
        config: Optional[Config] = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_worst_tokens: int = 0,
    ) -> Tuple[Any, Any, Any, Any, Any, EventOverlap]:
        """`dispatch` for a buffer of several nodes. `config` must be given."""
        assert config is not None, "internode_dispatch needs a config"
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: Tuple[Any, ...],
        topk_weights: Optional[torch.Tensor] = None,
        bias: Any = None,
        config: Optional[Config] = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """`combine` for a buffer of several nodes. `config` must be given."""
        assert config is not None, "internode_combine needs a config"
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    # Parts of dispatch ----------------------------------------------------------------------------------------------

    def _known_routes(self, handle: Any, topk_idx: Any, topk_weights: Any) -> Dict[str, Any]:
        assert topk_idx is None and topk_weights is None, "with a handle, topk_idx and topk_weights must be None"
        return {"handle": recover(handle, self._rank, self._num_ranks, None)}

    def _new_routes(
        self,
        data: torch.Tensor,
        layout: Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]],
        topk_idx: Optional[torch.Tensor],
        topk_weights: Optional[torch.Tensor],
        placement: Any,
    ) -> Dict[str, Any]:
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert = layout
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None, (
            "without a handle, num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert must be given"
        )
        require(data.dim() == 2, f"x must be [tokens, hidden]: it is {list(data.shape)}")
        shape = (data.size(0), self._num_ranks)
        require(
            tuple(is_token_in_rank.shape) == shape and is_token_in_rank.dtype == torch.bool,
            f"is_token_in_rank must be bool {list(shape)}: it is {is_token_in_rank.dtype} {list(is_token_in_rank.shape)}",
        )
        require(
            tuple(num_tokens_per_rank.shape) == (self._num_ranks,),
            f"num_tokens_per_rank must have {self._num_ranks} entries: {list(num_tokens_per_rank.shape)}",
        )
        require(
            (topk_idx is None) == (topk_weights is None),
            "topk_idx and topk_weights must be given together, or neither of them",
        )
        require(
            placement is None or topk_idx is not None,
            "placement needs topk_idx: without it ranks are all that is known",
        )
        side = [membership_words(is_token_in_rank)] if self._num_nodes > 1 else []
        if topk_idx is None:
            # Only the ranks are known: each stands for one expert of its own.
            return dict(topk_idx=ranks_as_experts(is_token_in_rank), num_experts=self._num_ranks, side=side)
        experts = num_tokens_per_expert.size(0)
        return dict(topk_idx=topk_idx, topk_weights=topk_weights, num_experts=experts, placement=placement, side=side)

    def _expert_counts(
        self, core_handle: Any, per_expert: Any, topk_idx: Any, alignment: int, num_worst_tokens: int
    ) -> List[int]:
        if num_worst_tokens > 0:
            return []
        if topk_idx is not None:
            return core_handle.aligned_counts()
        return [align(count, alignment) for count in self._sum_of_counts(per_expert)]

    def _sum_of_counts(self, per_expert: torch.Tensor) -> List[int]:
        """All ranks' counts of this rank's experts, which tokens without ids do not say: one more small exchange."""
        ranks, device = self._num_ranks, per_expert.device
        even = _core.Placement.even(per_expert.size(0), ranks)
        slots = [even.num_slots(rank) for rank in range(ranks)]
        rows = torch.zeros((ranks, align(max(1, *slots), 4)), dtype=torch.int32, device=device)
        for row, counts in zip(rows, per_expert.split(slots)):
            row[: counts.numel()] = counts
        local = slots[self._rank]
        everyone = torch.arange(ranks, dtype=torch.int32, device=device).view(ranks, 1)
        received = self._opened().dispatch(x=rows, topk_idx=everyone, num_experts=ranks)[0]
        return received[:, :local].sum(dim=0).tolist()

    def _handle_tuple(self, core_handle: Any, member: Any, side: List[torch.Tensor], config: Optional[Config]) -> Any:
        channels = self._num_channels(config)
        if self._num_nodes == 1:
            return intranode_tuple(core_handle, member, self._rank, channels)
        return internode_tuple(core_handle, member, side[0], self._rank, channels, self._node_size)

    def _num_channels(self, config: Optional[Config]) -> int:
        if config is None and self._num_ranks in DISPATCH_CONFIGS:
            return type(self).num_sms // 2  # type: ignore[attr-defined]
        return (config or Config()).num_channels

    def _config_sms(self, config: Optional[Config]) -> Dict[str, int]:
        return self._sms(type(self).num_sms if config is None else config.num_sms)  # type: ignore[attr-defined]
