# SPDX-License-Identifier: MIT
"""`HybridEPBuffer`, the API of DeepEP's hybrid-ep branch, as Megatron-LM and torchtitan call it: a dispatch that permutes rows by
expert, a combine that takes them back."""

from typing import Any, NamedTuple, Optional, Tuple

import torch

from . import _core
from .errors import Naming, require
from .session import Session


class HybridHandle(NamedTuple):
    """What combine and later dispatches need. Users look at the last entry only."""

    core: Any
    topk_idx: torch.Tensor
    num_of_experts: int
    tokens_per_expert: torch.Tensor
    overflow_flag: torch.Tensor


class HybridEPBuffer(Session):
    """Construction is collective. Arguments that choose kernels and their SMs are accepted and decide nothing."""

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_of_hybrid_ep_ranks_per_nvlink_domain: Optional[int] = None,
        use_mnnvl: Optional[bool] = None,
        num_sms_dispatch_api: Optional[int] = None,
        num_sms_combine_api: Optional[int] = None,
        num_sms_preprocessing_api: Optional[int] = None,
        num_blocks_permute: Optional[int] = None,
        num_blocks_unpermute: Optional[int] = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = True,
        *,
        arena_bytes: int = 0,
        timeout_secs: float = 100.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(group, num_of_hybrid_ep_ranks_per_nvlink_domain, num_workers)
        self.rank, self.group_size = self._rank, self._num_ranks
        self.hidden_dim, self.num_local_experts, self.use_fp8 = hidden_dim, num_local_experts, use_fp8
        self.max_num_of_tokens_per_rank = max_num_of_tokens_per_rank
        self.num_of_hybrid_ep_ranks_per_nvlink_domain = self._node_size
        self._config.arena_bytes, self._config.timeout_secs = arena_bytes, timeout_secs
        self._open()

    @Naming(max_rows="num_permuted_tokens")
    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        num_of_experts_per_rank: Optional[int] = None,
        num_of_experts: Optional[int] = None,
        use_fp8: Optional[bool] = None,
        routing_map: Optional[torch.Tensor] = None,
        probs: Optional[torch.Tensor] = None,
        scaling_factor: Optional[torch.Tensor] = None,
        num_dispatched_tokens: Optional[int] = None,
        num_permuted_tokens: Optional[int] = None,
        pad_multiple: Optional[int] = None,
        handle: Optional[HybridHandle] = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor], torch.Tensor, HybridHandle]:
        """(rows, probs of the rows, scales of the rows, rows of each expert here with padding, handle). Experts ascending,
        each one's rows in order (source rank, source token), padded with zeros to `pad_multiple`. Routes are a bool map
        [tokens, experts] with probs of its shape, or top-k ids with weights. With `num_permuted_tokens` there are that many
        rows; if more would come, the call is refused, so the overflow flag is always 0."""
        self._use(hidden, "hidden", "dispatch")
        if handle is not None:
            rows, scales, *_ = self._opened().dispatch(x=hidden, scales=scaling_factor, handle=handle.core)
            return rows, None, scales, handle.tokens_per_expert, handle
        local = num_of_experts_per_rank or self.num_local_experts

        def routes() -> Tuple[torch.Tensor, Optional[torch.Tensor], int]:
            require(
                (routing_map is None) != (topk_idx is None),
                "either routing_map or topk_idx must be given, and not both",
            )
            if topk_idx is not None:
                return topk_idx.contiguous(), topk_weights, num_of_experts or local * self._num_ranks
            shape = (hidden.size(0), local * self._num_ranks)
            assert routing_map is not None
            require(
                tuple(routing_map.shape) == shape, f"routing_map must be {list(shape)}: it is {list(routing_map.shape)}"
            )
            return (*from_map(routing_map, probs, width), shape[1])

        width = 0
        if topk_idx is None:  # ranks agree on the number of columns
            width = self._most_of_all(0 if routing_map is None else _most_of_a_row(routing_map))
        ids, weights, experts = self._checked("dispatch", routes)
        rows, scales, _, row_probs, _, core_handle = self._opened().dispatch(
            x=hidden,
            scales=scaling_factor,
            topk_idx=ids,
            topk_weights=None if weights is None else weights.to(torch.float32).contiguous(),
            num_experts=experts,
            layout=_core.OutputLayout.by_expert,
            expert_alignment=pad_multiple or 1,
            max_rows=num_permuted_tokens or 0,
        )
        first_row = core_handle.slot_first_row.to(torch.int64)
        overflow = torch.zeros(1, dtype=torch.int32, device=hidden.device)
        made = HybridHandle(core_handle, ids, experts, first_row[1:] - first_row[:-1], overflow)
        return rows, row_probs, scales, made.tokens_per_expert, made

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: Optional[torch.Tensor] = None,
        handle: HybridHandle,
        num_dispatched_tokens: Optional[int] = None,
        pad_multiple: Optional[int] = None,
        fuse_unpermute_combine: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """(sums of each token's rows, and their probs at home, [tokens, experts])."""
        self._use(hidden, "hidden", "combine")
        tokens, weights = self._opened().combine(
            x=hidden,
            handle=handle.core,
            topk_weights=None if probs is None else probs.to(torch.float32).contiguous(),
            weights_from_owner=True,
            order=self._rank_order(),
        )
        if weights is None:
            return tokens, None
        ids = handle.topk_idx.to(torch.int64)
        # One column more takes what belongs to no expert.
        dense = weights.new_zeros((ids.size(0), handle.num_of_experts + 1))
        dense.scatter_(1, torch.where(ids >= 0, ids, handle.num_of_experts), weights)
        return tokens, dense[:, : handle.num_of_experts]

    def _most_of_all(self, mine: int) -> int:
        """The largest of all ranks' numbers."""
        ranks = self._num_ranks
        row = torch.full((1, 2), mine, dtype=torch.int64, device=self._device)
        everyone = torch.arange(ranks, dtype=torch.int32, device=self._device).view(1, ranks)
        return int(self._opened().dispatch(x=row, topk_idx=everyone, num_experts=ranks)[0].max())


def _most_of_a_row(routing_map: torch.Tensor) -> int:
    return int(routing_map.sum(dim=1).max()) if routing_map.numel() > 0 else 0


def from_map(
    routing_map: torch.Tensor, probs: Optional[torch.Tensor], width: int
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """(ids int64 [tokens, width], ascending, -1 behind the last, and their weights)"""
    experts, width = routing_map.size(1), max(width, 1)
    number = torch.arange(experts, device=routing_map.device)
    ids = torch.where(routing_map.bool(), number, experts).sort(dim=1).values[:, :width].contiguous()
    here = ids < experts
    weights = None if probs is None else torch.where(here, probs.gather(1, ids.clamp(max=experts - 1)), 0.0)
    return torch.where(here, ids, -1), weights
