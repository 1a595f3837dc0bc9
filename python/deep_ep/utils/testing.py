# SPDX-License-Identifier: MIT
"""Timing of calls, on CPUs by the clock and on GPUs by events and the profiler."""

import time
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist

_FLUSH_BYTES = 256 << 20


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.get_default_device().type == "cuda"


def _seconds_on_cpu(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _seconds_on_gpu(fn: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Optional[Callable[[], Any]] = None,
    flush_l2: bool = True,
) -> Tuple[float, float, float]:
    """(mean, shortest, longest) seconds; the first measured call does not count."""
    for _ in range(num_warmups):
        fn()
    on_gpu = _on_gpu()
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if on_gpu and flush_l2 else None
    times: List[float] = []
    for _ in range(num_tests + 1):
        if cache is not None:
            cache.zero_()
        times.append((_seconds_on_gpu if on_gpu else _seconds_on_cpu)(fn))
        if post_fn is not None:
            post_fn()
    kept = times[1:]
    return sum(kept) / len(kept), min(kept), max(kept)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: Union[str, Sequence[str]],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: Optional[str] = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Optional[Callable[[], Any]] = None,
) -> Any:
    """Mean seconds of the kernels whose names contain `kernel_names`. On CPUs there are no kernels: the call's own time
    stands for each of them."""
    wait = barrier or (dist.barrier if barrier_comm_profiling and dist.is_initialized() else lambda: None)
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    fn()
    if _on_gpu():
        found = [_kernel_seconds(fn, name, num_tests, wait, trace_path) for name in names]
    else:
        found = [_mean_with_barrier(fn, num_tests, wait)] * len(names)
    values = [[each / num_kernels_per_period] * num_kernels_per_period for each in found]
    flat = values if num_kernels_per_period > 1 else [each[0] for each in values]
    return flat[0] if isinstance(kernel_names, str) else tuple(flat)


def _mean_with_barrier(fn: Callable[[], Any], num_tests: int, wait: Callable[[], Any]) -> float:
    total = 0.0
    for _ in range(num_tests):
        wait()
        total += _seconds_on_cpu(fn)
    return total / num_tests


def _kernel_seconds(
    fn: Callable[[], Any], name: str, num_tests: int, wait: Callable[[], Any], trace_path: Optional[str]
) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_tests):
            wait()
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profile.export_chrome_trace(trace_path)
    rows = [row for row in profile.key_averages() if name in row.key]
    assert len(rows) <= 1, f"{name} names several kernels: {[row.key for row in rows]}"
    return rows[0].device_time_total / rows[0].count / 1e6 if rows else 0.0
