# SPDX-License-Identifier: MIT
"""Gate scores whose load on rank 0 is a given multiple of the other ranks' mean."""

import torch


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float, precise: bool = False
) -> torch.Tensor:
    """float32 [num_tokens, num_experts]"""
    if precise:
        return _assigned_scores(num_tokens, num_experts, num_ranks, num_topk, ratio)
    if ratio == 1:
        return torch.rand((num_tokens, num_experts), dtype=torch.float32)
    low, high = 1.0, 100.0
    for _ in range(20):
        middle = (low + high) / 2
        scores = _scaled_scores(num_tokens, num_experts, num_ranks, middle)
        low, high = (middle, high) if _ratio(scores, num_ranks, num_topk) < ratio else (low, middle)
    return _scaled_scores(num_tokens, num_experts, num_ranks, high)


def _scaled_scores(num_tokens: int, num_experts: int, num_ranks: int, factor: float) -> torch.Tensor:
    scores = torch.rand((num_tokens, num_experts), dtype=torch.float32)
    scores[:, : num_experts // num_ranks] *= factor
    return scores


def _ratio(scores: torch.Tensor, num_ranks: int, num_topk: int) -> float:
    per_rank = scores.size(1) // num_ranks
    chosen = scores.topk(num_topk, dim=1).indices // per_rank
    member = torch.zeros((scores.size(0), num_ranks), dtype=torch.bool, device=scores.device).scatter_(1, chosen, True)
    tokens = member.sum(dim=0).double()
    return (tokens[0] / tokens[1:].mean()).item() if num_ranks > 1 else 1.0


def _assigned_scores(num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> torch.Tensor:
    """Each token takes experts of `groups` distinct ranks in turn; rank 0 is among them as often as `ratio` asks."""
    per_rank = num_experts // num_ranks
    groups = min(num_topk, num_ranks)
    # With t tokens on rank 0, the others share groups * n - t.
    share = ratio * groups / (num_ranks - 1 + ratio) if num_ranks > 1 else 1.0
    with_zero = min(num_tokens, round(min(share, 1.0) * num_tokens))
    scores = torch.rand((num_tokens, num_experts), dtype=torch.float32) * 0.5
    next_rank = 0
    for token in range(num_tokens):
        zero = token * with_zero // num_tokens != (token + 1) * with_zero // num_tokens
        ranks = [0] if zero else []
        while len(ranks) < groups and num_ranks > 1:
            ranks.append(1 + next_rank % (num_ranks - 1))
            next_rank += 1
            if len(set(ranks)) < len(ranks):
                ranks.pop()
                break
        for k in range(num_topk):
            rank, slot = ranks[k % len(ranks)], (token + k // len(ranks)) % per_rank
            scores[token, rank * per_rank + slot] += 1
    return scores
