# SPDX-License-Identifier: MIT
"""Ranks as threads of the test's process, and the inputs that tests share."""

import threading
from typing import Any, Callable, List, NamedTuple

import deep_ep
import torch


def run_ranks(num_ranks: int, body: Callable[[Any], Any]) -> List[Any]:
    """Runs body(group) on every rank's thread; gives the results in rank order, or the first rank's exception."""
    groups = deep_ep.in_process_group(num_ranks)
    results: List[Any] = [None] * num_ranks
    errors: List[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = body(groups[rank])
        except BaseException as error:  # noqa: B036  (handed to the test's thread)
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


class Tokens(NamedTuple):
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def make_tokens(
    rank: int, num_tokens: int, hidden: int, num_topk: int, num_experts: int, dropped: float = 0.1
) -> Tokens:
    """Distinct experts per token, some selections dropped; the same for the same arguments."""
    random = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn((num_tokens, hidden), generator=random).to(torch.bfloat16)
    scores = torch.rand((num_tokens, num_experts), generator=random)
    topk_idx = scores.topk(num_topk, dim=1).indices
    topk_idx[torch.rand(topk_idx.shape, generator=random) < dropped] = -1
    return Tokens(x, topk_idx, torch.rand((num_tokens, num_topk), generator=random))


def member_of(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    """bool [tokens, ranks]"""
    rank_of = topk_idx // (num_experts // num_ranks)
    return torch.stack([((rank_of == rank) & (topk_idx >= 0)).any(dim=1) for rank in range(num_ranks)], dim=1)


class Received(NamedTuple):
    rows: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    src_token: torch.Tensor
    per_source: List[int]


def expected_rows(rank: int, sources: List[Tokens], num_experts: int, masked_weights: bool = True) -> Received:
    """What rank receives: order (source rank, source token)."""
    local = num_experts // len(sources)
    parts = []
    for tokens in sources:
        here = (tokens.topk_idx >= rank * local) & (tokens.topk_idx < (rank + 1) * local)
        sent = here.any(dim=1).nonzero().flatten()
        ids = torch.where(here, tokens.topk_idx - rank * local, -1)
        weights = torch.where(here, tokens.topk_weights, 0.0) if masked_weights else tokens.topk_weights
        parts.append((tokens.x[sent], ids[sent], weights[sent], sent.to(torch.int32)))
    columns = [torch.cat(column) for column in zip(*parts)]
    return Received(*columns, [part[3].numel() for part in parts])


def dispatch_v1(buffer: Any, tokens: Tokens, num_experts: int, with_topk: bool = True, **more: Any) -> Any:
    """Layout and dispatch, as every V1 user calls them."""
    per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, num_experts)
    if with_topk:
        more.update(topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights)
    return buffer.dispatch(
        more.pop("x", tokens.x),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=member,
        num_tokens_per_expert=per_expert,
        **more,
    )
