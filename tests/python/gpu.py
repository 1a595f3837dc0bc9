# SPDX-License-Identifier: MIT
"""Tests on one GPU: ranks are threads, each with a stream of its own; results are compared with those of CPU tensors."""

from typing import Any, Callable, List

import pytest
import torch
from deep_ep import _core

from ranks import Tokens, run_ranks


def _missing() -> str:
    if not _core.has_cuda():
        return "this deep_ep was built without CUDA"
    return "" if torch.cuda.is_available() else "this machine has no GPU that torch can use"


needs_gpu = pytest.mark.skipif(bool(_missing()), reason=_missing())
DEVICES = ("cpu", "cuda")
SMALL = dict(arena_bytes=1 << 26, timeout_secs=20)


def run_on(device: str, num_ranks: int, body: Callable[[Any], Any]) -> List[Any]:
    """body(group) on every rank's thread, where `device` is torch's default; results are moved to the CPU."""

    def run(group: Any) -> Any:
        if device == "cpu":
            return body(group)
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            return to_cpu(body(group))

    return run_ranks(num_ranks, run)


def to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        settled()  # a copy that waits for a kernel may hold up other ranks' launches, for which the kernel waits
        return value.cpu()
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(to_cpu(each) for each in value) if type(value) in (tuple, list) else to_cpu(tuple(value))
    return Tokens(*map(to_cpu, value)) if isinstance(value, Tokens) else value


def settled() -> None:
    """All that is enqueued on the current stream is done."""
    torch.cuda.current_stream().synchronize()


def moved(tokens: Tokens, device: str) -> Tokens:
    return Tokens(*(each.to(device) for each in tokens))


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in nested tuples and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() > 0 else tensor.new_zeros(0)


def on_both(num_ranks: int, body: Callable[[Any, str], Any]) -> List[Any]:
    """body(group, device) with CPU tensors and with CUDA tensors; the results, which must be the same."""
    cpu, cuda = (run_on(device, num_ranks, lambda group, device=device: body(group, device)) for device in DEVICES)
    for rank, (wanted, got) in enumerate(zip(cpu, cuda)):
        assert same(wanted, got), f"rank {rank}: {difference(wanted, got)}"
    return cuda


def difference(wanted: Any, got: Any, path: str = "result") -> str:
    """Where two nested results differ first, for messages."""
    if isinstance(wanted, (tuple, list)) and isinstance(got, (tuple, list)) and len(wanted) == len(got):
        for i, (a, b) in enumerate(zip(wanted, got)):
            if not same(a, b):
                return difference(a, b, f"{path}[{i}]")
    if isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor) and wanted.shape == got.shape:
        where = (wanted != got).nonzero()
        return f"{path} {wanted.dtype} {list(wanted.shape)} differs in {len(where)} places, first {where[:1].tolist()}"
    return f"{path}: {describe(wanted)} on the CPU, {describe(got)} on the GPU"


def describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:200]
