# SPDX-License-Identifier: MIT
"""Sizes that DeepEP's V2 reports, by its formulas. Our buffers take pages as they are used, within `arena_bytes`."""

import math
from typing import Any, Sequence, Tuple, Union

import torch

from .config import align
from .errors import require
from .group import size_of
from .topology import get_logical_domain_size

PAGE = 2 << 20
_MAX_TOPK = 32
_FORWARD_SLACK = 1280


def _item(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype, device="cpu").element_size()


def dispatch_token_bytes(hidden: int, num_topk: int, use_fp8_dispatch: bool) -> int:
    scales = align(4 * -(-hidden // 32), 32) if use_fp8_dispatch else 0
    return align(hidden * (1 if use_fp8_dispatch else 2), 32) + scales + align(8 * num_topk + 4 * (1 + num_topk), 32)


def combine_token_bytes(hidden: int, num_topk: int) -> int:
    return align(2 * hidden, 32) + align(8 * num_topk, 32)


def buffer_size_hint(
    group: Any,
    num_max_tokens_per_rank: int,
    hidden: int,
    num_topk: int = 0,
    use_fp8_dispatch: bool = False,
    allow_hybrid_mode: bool = True,
    allow_multiple_reduction: bool = True,
) -> int:
    """`num_bytes` of a buffer for dispatch and combine of that size."""
    require(4 * -(-hidden // 32) <= hidden, f"hidden is too small for its scales: {hidden}")
    topk, tokens, ranks = num_topk or _MAX_TOPK, num_max_tokens_per_rank, size_of(group)
    nodes, peers = get_logical_domain_size(group, allow_hybrid_mode)
    sent = dispatch_token_bytes(hidden, topk, use_fp8_dispatch)
    back = combine_token_bytes(hidden, topk)
    if nodes == 1:
        dispatch = sent * tokens * ranks
        combine = back * tokens * (min(ranks, topk) if allow_multiple_reduction else topk)
    else:
        forwarded = nodes * (tokens + _FORWARD_SLACK)
        dispatch = sent * (peers * nodes * tokens + tokens + forwarded)
        from_peers = min(peers, topk) if allow_multiple_reduction else topk
        from_nodes = min(nodes, topk) if allow_multiple_reduction else topk
        copies = 1 if allow_multiple_reduction else topk
        combine = back * (from_peers * nodes * tokens + from_nodes * tokens + copies * forwarded)
    return align(max(dispatch, combine), PAGE)


def engram_storage_size_hint(
    num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
) -> Tuple[int, int]:
    """(bytes on the GPU, bytes on the CPU) of a buffer for `engram_write` and `engram_fetch`."""
    entry = align(hidden * _item(dtype), 32)
    return align(entry * num_max_tokens_per_rank, PAGE), align(entry * num_entries, PAGE)


def pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
    """`num_bytes` of a buffer for `pp_send` and `pp_recv`."""
    return align(align(num_max_tensor_bytes, 32) * num_max_inflight_tensors * 4, PAGE)


def agrs_num_max_session_bytes(
    group: Any, shapes: Union[Sequence[int], Sequence[Sequence[int]]], dtype: torch.dtype
) -> int:
    """Bytes of a session that gathers tensors of these shapes, one shape or several."""
    several = shapes if len(shapes) > 0 and not isinstance(shapes[0], int) else [shapes]
    return sum(align(size_of(group) * math.prod(shape) * _item(dtype), 32) for shape in several)  # type: ignore[arg-type,misc]


def theoretical_num_sms(
    ranks: int, num_experts: int, num_topk: int, nvlink_gbs: float, sm_gbs: Tuple[float, float], overlap: bool
) -> int:
    """Upstream's model of a balanced gate inside one NVLink domain: expected distinct ranks of a token."""
    device_sms = 132
    if ranks == 1 or nvlink_gbs == 0:
        return device_sms
    elsewhere = num_experts - num_experts // ranks
    distinct = ranks * (1 - math.comb(elsewhere, num_topk) / math.comb(num_experts, num_topk))
    link = nvlink_gbs / (1 - 1 / ranks)
    sms = max(link / distinct / sm_gbs[0], link / sm_gbs[1])
    count = align(max(4, math.ceil(1.25 * sms)), 2)
    return min(count if overlap else max(count, 64), device_sms)
