# SPDX-License-Identifier: MIT
"""Timing of calls, on CPUs by the clock and on GPUs by events and the profiler."""

import os
import time
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist

_FLUSH_BYTES = 256 << 20
_SLEEP_CYCLES = 20_000_000  # ten milliseconds


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
    """Mean seconds of the one kernel whose name contains each of `kernel_names`, 0 where none ran. With
    `num_kernels_per_period`: a list, of its 1st, 2nd .. launch in each call. On CPUs there are no kernels: the call's own
    time stands for them."""
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    fn()
    if os.environ.get("EP_USE_NVIDIA_TOOLS") == "1":  # another profiler is watching
        found: List[Any] = [1.0 if num_kernels_per_period == 1 else [1.0] * num_kernels_per_period] * len(names)
    else:
        wait = _meet(barrier_comm_profiling, barrier)
        measure = _kernel_events if _on_gpu() else _calls
        events = measure(fn, names, num_tests, wait, flush_l2, trace_path)
        found = [_periods(each, num_kernels_per_period) for each in events]
    return found[0] if isinstance(kernel_names, str) else tuple(found)


def _meet(all_ranks: bool, barrier: Optional[Callable[[], Any]]) -> Callable[[], Any]:
    """Before each call. On GPUs every rank's stream first sleeps, so that the call is enqueued by the time all have met."""
    if barrier is None and not (all_ranks and dist.is_initialized()):
        return lambda: None

    def meet() -> None:
        if _on_gpu():
            torch.cuda._sleep(_SLEEP_CYCLES)
        if barrier is not None:
            barrier()
        else:
            dist.all_reduce(torch.ones(1, dtype=torch.float32))

    return meet


def _periods(seconds: List[float], per_call: int) -> Any:
    """The mean; or the means of every `per_call`-th, from the first, the second ..."""
    means = [sum(each) / len(each) if each else 0.0 for each in (seconds[i::per_call] for i in range(per_call))]
    return means[0] if per_call == 1 else means


def _calls(
    fn: Callable[[], Any], names: Sequence[str], num_tests: int, wait: Callable[[], Any], *_unused: Any
) -> List[List[float]]:
    taken = []
    for _ in range(num_tests):
        wait()
        taken.append(_seconds_on_cpu(fn))
    return [taken] * len(names)


def _kernel_events(
    fn: Callable[[], Any],
    names: Sequence[str],
    num_tests: int,
    wait: Callable[[], Any],
    flush_l2: bool,
    trace_path: Optional[str],
) -> List[List[float]]:
    """Of every launch, in the order of time."""
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if flush_l2 else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_tests):
            if cache is not None:
                cache.zero_()
            wait()
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profile.export_chrome_trace(trace_path)
    events = sorted((each for each in profile.events() if each.device_type.name == "CUDA"), key=_begin)
    found = []
    for name in names:
        kernels = [each for each in events if name in each.name]
        different = sorted({each.name for each in kernels})
        assert len(different) <= 1, f"{name} names several kernels: {different}"
        found.append([each.time_range.elapsed_us() / 1e6 for each in kernels])
    return found


def _begin(event: Any) -> float:
    return event.time_range.start
