# SPDX-License-Identifier: MIT
"""Arithmetic of tests: distances, FP8 casts, hashes, counting."""

from typing import Any, Iterator, Tuple

import torch

GROUP = 128
FP8_MAX = 448.0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def safe_div(a: float, b: float) -> float:
    return 0 if a == 0 and b == 0 else a / b


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """0 for equal tensors: one minus twice the product over the squares, of both shifted by one."""
    a, b = x.double() + 1, y.double() + 1
    return (1 - 2 * (a * b).sum() / (a * a + b * b).sum()).item()


def per_token_cast_to_fp8(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [m, n], float32 scales [m, ceil(n / 128)])"""
    rows, columns = x.shape
    groups = ceil_div(columns, GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, groups * GROUP - columns)).view(rows, groups, GROUP)
    largest = padded.abs().amax(dim=2).clamp(min=1e-4)
    quantised = (padded * (FP8_MAX / largest).unsqueeze(2)).to(torch.float8_e4m3fn)
    return quantised.view(rows, groups * GROUP)[:, :columns].contiguous(), largest / FP8_MAX


def _unpacked(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32: int32 holds four biased exponents, the first in the lowest byte."""
    if scales.dtype != torch.int32:
        return scales.float()
    parts = torch.stack([(scales >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return (parts << 23).contiguous().view(torch.float32).flatten(-2)


def per_token_cast_back(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [m, n]"""
    if q.numel() == 0:
        return q.to(torch.bfloat16)
    rows, columns = q.shape
    factors = _unpacked(scales)[:, : ceil_div(columns, GROUP)].repeat_interleave(GROUP, dim=1)[:, :columns]
    return (q.float() * factors).to(torch.bfloat16)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Each row becomes its distinct non-negative values, descending, then -1."""
    assert x.dim() == 2, "x must be a matrix"
    kept = x.sort(dim=1, descending=True).values
    repeated = torch.zeros_like(kept, dtype=torch.bool)
    repeated[:, 1:] = kept[:, 1:] == kept[:, :-1]
    kept = kept.masked_fill(repeated | (kept < 0), -1).sort(dim=1, descending=True).values
    x.fill_(-1)
    width = min(num_slots, x.size(1))
    x[:, :width] = kept[:, :width]


def create_grouped_scores(scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Scores outside the chosen groups become 0."""
    tokens, experts = scores.shape
    chosen = torch.zeros((tokens, num_groups), dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return (scores.view(tokens, num_groups, -1) * chosen.unsqueeze(-1)).view(tokens, experts)


def _leaves(items: Any) -> Iterator[torch.Tensor]:
    for item in items:
        if isinstance(item, (tuple, list)):
            yield from _leaves(item)
        elif item is not None:
            yield item


def hash_tensor(t: torch.Tensor) -> int:
    """Sum of the bits as int32: the same for any order of the rows."""
    flat = t.contiguous().view(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    return int(flat.view(torch.int32).to(torch.int64).sum().item())


def hash_tensors(*tensors: Any) -> int:
    result = 0
    for tensor in _leaves(tensors):
        result ^= hash_tensor(tensor)
    return result


def count_bytes(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _leaves(tensors))
