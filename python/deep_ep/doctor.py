# SPDX-License-Identifier: MIT
"""What this machine has for a buffer, what is missing, and whether small exchanges on it give the right bits."""

import os
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional

import torch

from .elastic import ElasticBuffer
from .group import in_process_group

_TOKENS, _HIDDEN, _EXPERTS = 64, 512, 8
_TIMEOUT_SECONDS = 30.0


class Check(NamedTuple):
    """One exchange of two ranks: between whom, and what went wrong (None: every bit was right)."""

    name: str
    problem: Optional[str]
    seconds: float


def _stream_of(device: str) -> ContextManager[Any]:
    """On a GPU, a stream for this thread alone: kernels of ranks on one stream would wait for each other for ever."""
    if not device.startswith("cuda"):
        return nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream())


def _exchange(group: Any, device: str, ranks_per_node: int) -> Optional[str]:
    """Sends each token to two experts, which double it, one on each rank; None where the sums are right to the bit."""
    random = torch.Generator().manual_seed(group.rank())
    x = torch.randn((_TOKENS, _HIDDEN), generator=random).bfloat16().to(device)
    local = torch.randint(_EXPERTS // 2, (_TOKENS, 2), generator=random)
    topk_idx = (local + torch.tensor([0, _EXPERTS // 2])).to(device)
    with ElasticBuffer(
        group,
        num_max_tokens_per_rank=_TOKENS,
        hidden=_HIDDEN,
        ranks_per_node=ranks_per_node,
        device=device,
        arena_bytes=64 << 20,
        num_cpu_timeout_secs=_TIMEOUT_SECONDS,
        num_gpu_timeout_secs=_TIMEOUT_SECONDS,
    ) as buffer:
        rows, _, _, handle, _ = buffer.dispatch(x, topk_idx, num_experts=_EXPERTS)
        y, _, _ = buffer.combine(rows * 2, handle)
        if y.is_cuda:
            # Waits for the kernel without a copy behind it, which would hold up the other rank's launches.
            torch.cuda.current_stream().synchronize()
        wrong = int((y != 4 * x).sum())
    return f"{wrong} of {x.numel()} values are wrong" if wrong else None


def _on_two_ranks(devices: List[str], ranks_per_node: int = 2) -> Optional[str]:
    """The exchange by two threads; the first problem."""
    groups = in_process_group(2)
    problems: List[Optional[str]] = ["it did not end", "it did not end"]

    def run(rank: int) -> None:
        try:
            with _stream_of(devices[rank]):
                problems[rank] = _exchange(groups[rank], devices[rank], ranks_per_node)
        except Exception as error:  # noqa: B902  (a report of all that can go wrong)
            problems[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems[0] or problems[1]


@contextmanager
def _network(provider: str) -> Iterator[None]:
    """Buffers that open meanwhile use this provider between nodes."""
    before = os.environ.get("EP_NETWORK_PROVIDER")
    os.environ["EP_NETWORK_PROVIDER"] = provider
    try:
        yield
    finally:
        if before is None:
            del os.environ["EP_NETWORK_PROVIDER"]
        else:
            os.environ["EP_NETWORK_PROVIDER"] = before


def _timed(name: str, exchange: Callable[[], Optional[str]]) -> Check:
    start = time.monotonic()
    problem = exchange()
    return Check(name, problem, time.monotonic() - start)


def checks(machine: Any) -> Iterator[Check]:
    """Exchanges of two ranks of this process: on the CPU, on each GPU, on each pair of GPUs, and over the network
    that would be chosen between machines."""
    yield _timed("two ranks on the CPU", lambda: _on_two_ranks(["cpu", "cpu"]))
    gpus = machine.gpus if torch.cuda.is_available() else []
    for gpu in gpus:
        own = f"cuda:{gpu.device}"
        yield _timed(f"two ranks on GPU {gpu.device}", lambda: _on_two_ranks([own, own]))
        for peer in (peer for peer in gpu.peers if peer > gpu.device):
            pair = [own, f"cuda:{peer}"]
            yield _timed(f"GPU {gpu.device} with GPU {peer}", lambda: _on_two_ranks(pair))
    if machine.interfaces:
        provider = machine.interfaces[0].provider
        with _network(provider):
            yield _timed(f"two nodes over {provider}", lambda: _on_two_ranks(["cpu", "cpu"], ranks_per_node=1))


def facts(machine: Any) -> Dict[str, Any]:
    """What the machine has, as plain data for JSON."""
    return {**_plain(machine), "torch": torch.__version__}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, (str, int)):
        return value
    return {name: _plain(getattr(value, name)) for name in dir(value) if not name.startswith("_")}
