# SPDX-License-Identifier: MIT
"""How tensors cross: by torch's exchange table where it has one, else by attributes and capsules, which any version has."""

import contextlib

import deep_ep
import pytest
import torch
from deep_ep import _core, _torch
from torch.utils.dlpack import from_dlpack

from ranks import dispatch_v1, make_tokens, run_ranks

EXPERTS, HIDDEN, TOPK, RANKS = 8, 256, 2, 2


@contextlib.contextmanager
def without_exchange():
    """As in a torch before 2.10."""
    _core.use_torch(from_dlpack, _torch._DTYPES, object)
    try:
        yield
    finally:
        _core.use_torch(from_dlpack, _torch._DTYPES, torch.Tensor)


@pytest.fixture(params=[contextlib.nullcontext, without_exchange], ids=["table", "capsules"])
def way(request):
    with request.param():
        yield


def outputs(group):
    """Of calls whose tensors have every dtype that the library knows."""
    tokens = make_tokens(group.rank(), 12, HIDDEN, TOPK, EXPERTS)
    found = []
    with deep_ep.Buffer(group, 0, 1 << 20, low_latency_mode=True) as buffer:
        for x in (tokens.x, tokens.x.half(), tokens.x.to(torch.float8_e4m3fn), (tokens.x * 8).to(torch.int32)):
            found += dispatch_v1(buffer, tokens._replace(x=x), EXPERTS)[:3]
        found += buffer.get_dispatch_layout(tokens.topk_idx.to(torch.int32), EXPERTS)[:4]
        (data, scales), count, handle, *_ = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 16, EXPERTS)
        valid = [slice(0, rows) for rows in count.tolist()]
        found += [data[slot, rows] for slot, rows in enumerate(valid)]
        found += [scales[slot, rows] for slot, rows in enumerate(valid)]
        x = torch.ones(data.shape, dtype=torch.bfloat16)
        found += buffer.low_latency_combine(x, tokens.topk_idx, tokens.topk_weights, handle)[:1]
    return [each for each in found if each is not None]


def test_both_ways_give_the_same_tensors():
    told = run_ranks(RANKS, outputs)
    with without_exchange():
        asked = run_ranks(RANKS, outputs)
    for mine, other in zip(told, asked):
        assert [(each.dtype, each.shape, each.stride()) for each in mine] == [
            (each.dtype, each.shape, each.stride()) for each in other
        ]
        for a, b in zip(mine, other):
            assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def test_rows_that_are_a_parameter_or_a_part_of_something_are_taken(way):
    group = deep_ep.in_process_group(1)[0]
    whole = torch.arange(4 * HIDDEN, dtype=torch.float32).view(4, HIDDEN).to(torch.bfloat16)
    ids = torch.zeros((2, 1), dtype=torch.int64)
    with deep_ep.Buffer(group) as buffer:
        for x in (torch.nn.Parameter(whole[2:]), whole[2:], whole.clone().requires_grad_()[2:]):
            rows = dispatch_v1(buffer, make_tokens(0, 2, HIDDEN, 1, 1)._replace(x=x, topk_idx=ids), 1)[0]
            assert torch.equal(rows, whole[2:])


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.zeros((2, 1), dtype=torch.float64), "topk_idx has dtype torch.float64"),
        (torch.zeros((2, 1), dtype=torch.int64, device="meta"), "topk_idx is on meta"),
        (torch.zeros((2, 1, 1, 1), dtype=torch.int64), "topk_idx must have 1 to 3 dimensions: it has 4"),
    ],
    ids=["dtype", "device", "dimensions"],
)
def test_tensors_that_cannot_cross_are_named_with_the_reason(ids, says, way):
    with deep_ep.Buffer(deep_ep.in_process_group(1)[0]) as buffer:
        with pytest.raises(deep_ep.Error, match=says):
            buffer._opened().dispatch_layout(ids, 1)
        with pytest.raises((deep_ep.Error, RuntimeError)):
            buffer._opened().dispatch_layout(torch.eye(2).to(torch.int64).to_sparse(), 1)
        with pytest.raises(deep_ep.Error, match="topk_idx must be a tensor: it is str"):
            buffer._opened().dispatch_layout("ids", 1)
        assert buffer.get_dispatch_layout(torch.zeros((2, 1), dtype=torch.int64), 1)[0].tolist() == [2]
