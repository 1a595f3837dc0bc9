# SPDX-License-Identifier: MIT
"""An MoE layer in plain torch, the same on one rank as on many: what frameworks' dispatchers must give."""

from typing import List

import torch

from ranks import Tokens, make_tokens

RANKS, EXPERTS, TOPK = 4, 8, 3
LOCAL = EXPERTS // RANKS
COUNTS = (9, 5, 12, 0)  # tokens of each rank; the last has none


def all_tokens(hidden: int, dropped: float = 0.0, counts=COUNTS) -> List[Tokens]:
    return [make_tokens(rank, count, hidden, TOPK, EXPERTS, dropped) for rank, count in enumerate(counts)]


def expert(number: int, x: torch.Tensor) -> torch.Tensor:
    """BF16 rows to BF16 rows. Each element is computed by itself, so that a row's result is the same in any batch."""
    x = x.float()
    return (torch.relu(x * (0.5 + number)) + x.roll(number + 1, dims=-1) * 0.25).to(torch.bfloat16)


def slots(rank: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[rows, slots, hidden]: what rank's experts give for ids of the whole layer; zeros for other ranks' experts."""
    out = x.new_zeros((*ids.shape, x.shape[1]), dtype=torch.bfloat16)
    for number in range(rank * LOCAL, (rank + 1) * LOCAL):
        row, slot = (ids == number).nonzero(as_tuple=True)
        out[row, slot] = expert(number, x[row])
    return out


def whole(tokens: Tokens, x: torch.Tensor = None) -> torch.Tensor:
    """The layer on one rank: the weighted sum over a token's experts in FP32, in the order of its selections, each
    weighted row added without rounding it first, as `low_latency_combine` does it (FP64 holds the product exactly)."""
    x = tokens.x if x is None else x
    rows = sum(slots(rank, x, tokens.topk_idx).double() for rank in range(RANKS))
    total = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(TOPK):
        total = (total + rows[:, slot] * tokens.topk_weights[:, slot, None]).float()
    return total


def by_rank(tokens: Tokens, weigh, x: torch.Tensor = None) -> torch.Tensor:
    """The layer with one BF16 row of partial sums from each rank, added in FP32 in the ranks' order, as `combine` does
    it. weigh(rows [tokens, slots, hidden], weights) gives the partial sum of a rank."""
    x = tokens.x if x is None else x
    total = torch.zeros(x.shape, dtype=torch.float32)
    for rank in range(RANKS):
        partial = weigh(slots(rank, x, tokens.topk_idx), tokens.topk_weights)
        here = (tokens.topk_idx // LOCAL == rank).any(dim=1, keepdim=True)
        total += torch.where(here, partial.float(), 0.0)
    return total.to(torch.bfloat16)


def nearest(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


def truncated(x: torch.Tensor) -> torch.Tensor:
    """FP32 to BF16 as Triton's interpreter does it, which drops the bits that do not fit."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).to(torch.bfloat16)


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor, to_bf16=nearest) -> torch.Tensor:
    """[tokens, slots, hidden] to [tokens, hidden]: the weighted sum in FP32, slot by slot, then BF16."""
    total = torch.zeros((rows.shape[0], rows.shape[2]))
    for slot in range(rows.shape[1]):
        total += rows[:, slot].float() * weights[:, slot, None]
    return to_bf16(total)


def dequantised(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """FP8 rows with a scale for each 128 values."""
    return x.float() * scales.repeat_interleave(128, dim=-1)


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    """Rows as a low-latency dispatch that quantises them delivers them."""
    groups = x.float().unflatten(-1, (-1, 128))
    largest = groups.abs().amax(dim=-1).clamp(min=1e-4)
    most = torch.tensor(448.0)  # a tensor: torch divides a number by a tensor by multiplying with its reciprocal
    rows = (groups * (most / largest)[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return dequantised(rows, largest * most.reciprocal())
