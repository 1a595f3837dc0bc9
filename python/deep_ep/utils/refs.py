# SPDX-License-Identifier: MIT
"""What dispatch and combine mean, written with torch and collectives of torch.distributed."""

import math
from typing import Any, List, Optional, Tuple

import torch
import torch.distributed as dist

from .envs import get_global_seed


def _all_gather(x: torch.Tensor, group: Any) -> List[torch.Tensor]:
    gathered: List[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, x.cpu(), group=group)
    return [each.to(x.device) for each in gathered]


def dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: Optional[torch.Tensor],
    num_max_tokens_per_rank: int,
    num_experts: int,
    group: Any = None,
) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], torch.Tensor, List[int]]:
    """(rows, local ids or -1, weights as sent, source numbers, rows per source), in order (source rank, token)."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    local = num_experts // ranks
    all_idx, all_x = _all_gather(topk_idx, group), _all_gather(x, group)
    all_weights = None if topk_weights is None else _all_gather(topk_weights, group)
    rows, ids, weights, sources, counts = [], [], [], [], []
    for src in range(ranks):
        here = (all_idx[src] >= rank * local) & (all_idx[src] < (rank + 1) * local)
        tokens = here.any(dim=1).nonzero().flatten()
        rows.append(all_x[src][tokens])
        ids.append(torch.where(here, all_idx[src] - rank * local, -1)[tokens])
        if all_weights is not None:
            weights.append(all_weights[src][tokens])
        sources.append((src * num_max_tokens_per_rank + tokens).to(torch.int32))
        counts.append(tokens.numel())
    joined = torch.cat(weights) if all_weights is not None else None
    return torch.cat(rows), torch.cat(ids), joined, torch.cat(sources), counts


def generate_pre_combine_data(
    src_global_idx: torch.Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int, num_ranks: int = 0
) -> torch.Tensor:
    """bfloat16 [tokens, topk, hidden]: a value that each (source token, selection, channel) can compute."""
    total = (num_ranks or dist.get_world_size()) * num_max_tokens_per_rank * num_topk
    slot = torch.arange(num_topk, device=src_global_idx.device)
    number = src_global_idx.to(torch.int64).unsqueeze(1) * num_topk + slot
    phase = ((number * 131071 % total) + 1).double() / total
    channel = torch.arange(1, hidden + 1, device=src_global_idx.device, dtype=torch.float64)
    return torch.sin(phase.unsqueeze(2) * channel + math.sin(get_global_seed())).to(torch.bfloat16)


def ordered_accumulate(data: torch.Tensor, init: Optional[torch.Tensor] = None) -> torch.Tensor:
    """[n, K, H]: FP32 sums in ascending k, rounded once."""
    total = torch.zeros_like(data[:, 0], dtype=torch.float32) if init is None else init.float().clone()
    for k in range(data.size(1)):
        total += data[:, k].float()
    return total.to(data.dtype)


def _grouped(y: torch.Tensor, group_of: torch.Tensor, num_groups: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sums of each group's selections, at the group's last selection; zeros elsewhere."""
    result, kept = torch.zeros_like(y), torch.full_like(group_of, -1)
    for group in range(num_groups):
        member = group_of == group
        any_here = member.any(dim=1)
        total = ordered_accumulate(torch.where(member.unsqueeze(2), y, torch.zeros_like(y)))
        last = (member * torch.arange(1, y.size(1) + 1, device=y.device)).argmax(dim=1)
        tokens = any_here.nonzero().flatten()
        result[tokens, last[tokens]] = total[tokens]
        kept[tokens, last[tokens]] = group
    return result, kept


def combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: Any = None,
    reduce_in_local: bool = True,
    reduce_in_scaleup: bool = False,
) -> torch.Tensor:
    """[n, K, H] -> [n, H]: optional sums per rank, then per node, each rounded; the rest in ascending k from the biases."""
    ranks = num_scaleout_ranks * num_scaleup_ranks
    rank_of = torch.where(topk_idx >= 0, topk_idx // (num_experts // ranks), -1)
    y = torch.where((topk_idx >= 0).unsqueeze(2), y, torch.zeros_like(y))
    if reduce_in_local:
        y, rank_of = _grouped(y, rank_of, ranks)
    if reduce_in_scaleup:
        node_of = torch.where(rank_of >= 0, rank_of // num_scaleup_ranks, -1)
        y, _ = _grouped(y, node_of, num_scaleout_ranks)
    biases = [each for each in (bias if isinstance(bias, (tuple, list)) else (bias,)) if each is not None]
    start = None
    for each in biases:
        start = each.float() if start is None else start + each.float()
    return ordered_accumulate(y, start)
