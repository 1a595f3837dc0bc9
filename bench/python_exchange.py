#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The exchange of bench/host_exchange.cpp through the Python package, beside the C++ program itself and beside the same exchange
written with torch's own collectives: permute, gloo all_to_all_single, permute back. Writes JSON."""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import deep_ep
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from python_workload import Workload, digest_padded, digest_rows, routing, rows

CLOCK = "from the arrival of the last rank at a barrier in shared memory, not timed itself, to the return of the call on the slowest rank"


class Operation(NamedTuple):
    name: str
    low_latency: bool
    before: Callable[[], Any]  # untimed, before each run
    run: Callable[[], Any]
    digest: Callable[[], int]  # of the last run's result


class Clock:
    """Ranks meet in shared memory; the last to come notes the start, each notes its end. Who waits asks as little as C++'s
    barrier does between two yields: the ranks that still work need its core."""

    ARRIVED, ROUND, ENDED, DIGEST = 0, 2, 3, 4  # words of a rank; two for its arrival, in turn
    WORDS = 8

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self.memory = shared_memory.SharedMemory(name)
        self.words = self.memory.buf.cast("q")
        self.mine, self.round = rank * self.WORDS, 0
        self.ranks = range(0, ranks * self.WORDS, self.WORDS)

    def every(self, word: int) -> List[int]:
        return [self.words[rank + word] for rank in self.ranks]

    def _arrived(self) -> int:
        # A rank is at most one round ahead of another, so two words serve.
        return self.ARRIVED + self.round % 2

    def sync(self) -> None:
        words, self.round = self.words, self.round + 1
        words[self.mine + self._arrived()] = time.monotonic_ns()
        words[self.mine + self.ROUND] = self.round
        for rank in self.ranks:
            while words[rank + self.ROUND] < self.round:
                os.sched_yield()

    def time(self, run: Callable[[], Any]) -> int:
        """Nanoseconds until the slowest rank was done. The sums are done outside of them."""
        self.sync()
        run()
        self.words[self.mine + self.ENDED] = time.monotonic_ns()
        start = max(self.every(self._arrived()))
        self.sync()
        return max(self.every(self.ENDED)) - start

    def digests(self, mine: int) -> List[int]:
        self.words[self.mine + self.DIGEST] = mine
        self.sync()
        every = self.every(self.DIGEST)
        self.sync()
        return every

    def close(self) -> None:
        self.words.release()
        self.memory.close()


class Package:
    """The calls of a user of this package."""

    def __init__(self, work: Workload, group: Any) -> None:
        rank = dist.get_rank(group)
        self.work = work
        self.x = rows(work, rank, max(work.tokens, work.ll_tokens))
        self.ids, self.weights = routing(work, rank, work.tokens)
        self.ll_ids, self.ll_weights = routing(work, rank, work.ll_tokens)
        self.ll_x, self.x = self.x[: work.ll_tokens], self.x[: work.tokens]
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(work.ll_tokens, work.hidden, work.ranks, work.experts)
        self.buffer = deep_ep.Buffer(group, 0, hint, low_latency_mode=True)
        self.layout = self.buffer.get_dispatch_layout(self.ids, work.experts)
        self.received = self.dispatch()
        self.staged = self.received[0].clone()
        self.ll_received = self.ll_dispatch(False)
        self.ll_out = torch.empty_like(self.ll_x)
        self.out: Any = None

    def dispatch(self) -> Any:
        per_rank, per_node, per_expert, member, _ = self.layout
        return self.buffer.dispatch(
            self.x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=self.ids,
            topk_weights=self.weights,
        )

    def ll_dispatch(self, use_fp8: bool) -> Any:
        work = self.work
        return self.buffer.low_latency_dispatch(self.ll_x, self.ll_ids, work.ll_tokens, work.experts, use_fp8=use_fp8)

    def ll_combine(self, zero_copy: bool) -> Any:
        """Of rows where the dispatch left them, memory that peers can read."""
        rows_, _, handle = self.ll_received[:3]
        return self.buffer.low_latency_combine(
            rows_, self.ll_ids, self.ll_weights, handle, zero_copy=zero_copy, out=self.ll_out
        )

    def _into_out(self, call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            self.out = call()

        return run

    def forget(self) -> None:
        self.out = None

    def operations(self) -> List[Operation]:
        buffer, handle = self.buffer, self.received[4]

        def first() -> int:
            return digest_rows(self.out[0])

        def padded() -> int:
            data = self.out[0][0] if isinstance(self.out[0], tuple) else self.out[0]
            return digest_padded(data, self.out[1])

        calls = (
            ("dispatch_bf16", self.dispatch, first),
            ("dispatch_bf16_cached", lambda: buffer.dispatch(self.x, handle=handle), first),
            ("combine_bf16_in_place", lambda: buffer.combine(self.received[0], handle), first),
            ("combine_bf16_staged", lambda: buffer.combine(self.staged, handle), first),
            ("ll_dispatch_bf16", lambda: self.ll_dispatch(False), padded),
            ("ll_dispatch_fp8_columns", lambda: self.ll_dispatch(True), padded),
            ("ll_combine_bf16_in_place", lambda: self.ll_combine(True), first),
            ("ll_combine_bf16_staged", lambda: self.ll_combine(False), first),
        )
        return [
            Operation(name, name.startswith("ll_"), self.forget, self._into_out(call), digest)
            for name, call, digest in calls
        ]


class Collectives:
    """The same dispatch and combine with torch alone: rows packed by index, exchanged, added."""

    def __init__(self, package: Package, group: Any) -> None:
        self.package, self.group = package, group
        member = package.layout[3]
        parts = [member[:, rank].nonzero().flatten() for rank in range(member.size(1))]
        self.order, self.sent = torch.cat(parts), [part.numel() for part in parts]
        self.out: Any = None
        self.received = self.dispatch()

    def _exchange(self, rows_: torch.Tensor, sent: List[int], received: List[int]) -> torch.Tensor:
        out = rows_.new_empty((sum(received), *rows_.shape[1:]))
        # As bytes: gloo does not move every dtype.
        width = rows_[0].numel() * rows_.element_size() if rows_.size(0) > 0 else 0
        dist.all_to_all_single(
            out.view(torch.uint8).view(-1, width),
            rows_.view(torch.uint8).view(-1, width),
            received,
            sent,
            group=self.group,
        )
        return out

    def dispatch(self) -> Any:
        package, order = self.package, self.order
        counts = torch.empty(len(self.sent), dtype=torch.int64)
        dist.all_to_all_single(counts, torch.tensor(self.sent), group=self.group)
        self.counts = counts.tolist()
        return tuple(
            self._exchange(each[order], self.sent, self.counts) for each in (package.x, package.ids, package.weights)
        )

    def combine(self) -> Any:
        back = self._exchange(self.received[0], self.counts, self.sent)
        total = torch.zeros(self.package.x.shape, dtype=torch.float32)
        for tokens, part in zip(self.order.split(self.sent), back.split(self.sent)):
            total.index_add_(0, tokens, part.float())
        return (total.to(torch.bfloat16),)

    def operations(self) -> List[Operation]:
        def keep(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                self.out = call()

            return run

        def forget() -> None:
            self.out = None

        calls = (("dispatch_bf16", self.dispatch), ("combine_bf16", self.combine))
        return [Operation(name, False, forget, keep(call), lambda: digest_rows(self.out[0])) for name, call in calls]


def summary(times_ns: List[int]) -> Dict[str, Any]:
    """As bench/measure.h: below 100 repetitions the 99th percentile is the largest."""
    times = sorted(each / 1e3 for each in times_ns)
    return {"median_us": statistics.median(times), "p99_us": times[(len(times) * 99 + 99) // 100 - 1], "n": len(times)}


def used() -> List[float]:
    """As bench/shared_memory.h: what this process used so far, the barrier's yields inside."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return [now.ru_utime * 1e6, now.ru_stime * 1e6, now.ru_minflt, now.ru_nvcsw + now.ru_nivcsw]


def measured(clock: Clock, work: Workload, operation: Operation) -> Dict[str, Any]:
    for _ in range(work.warmup):
        operation.before()
        clock.time(operation.run)
    times, before = [], used()
    for _ in range(work.ll_reps if operation.low_latency else work.reps):
        operation.before()
        times.append(clock.time(operation.run))
    per_call = [(after - start) / len(times) for start, after in zip(before, used())]
    return {
        "name": operation.name,
        "time": summary(times),
        "per_call": dict(zip(("user_us", "system_us", "minor_faults", "context_switches"), per_call)),
        "digest": clock.digests(operation.digest()),
    }


def run_rank(rank: int, work: Workload, names: List[str], board: str, port: int, out: str, with_gloo: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=work.ranks)
    clock = Clock(board, rank, work.ranks)
    package = Package(work, dist.group.WORLD)
    ours = [measured(clock, work, each) for each in package.operations() if each.name in names]
    package.forget()
    gloo = []
    if with_gloo:
        collectives = Collectives(package, dist.group.WORLD)
        less = work._replace(reps=max(3, work.reps // 2), warmup=1)  # it takes ten times as long
        gloo = [measured(clock, less, each) for each in collectives.operations()]
    if rank == 0:
        Path(out).write_text(json.dumps({"package": ours, "gloo": gloo}))
    dist.barrier()
    package.buffer.close()
    clock.close()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def python_round(work: Workload, names: List[str], folder: str, with_gloo: bool) -> Dict[str, Any]:
    memory = shared_memory.SharedMemory(create=True, size=work.ranks * Clock.WORDS * 8)
    memory.buf[:] = bytes(memory.size)
    out = str(Path(folder) / "ranks.json")
    try:
        mp.start_processes(
            run_rank,
            args=(work, names, memory.name, free_port(), out, with_gloo),
            nprocs=work.ranks,
            start_method="forkserver",
        )
    finally:
        memory.close()
        memory.unlink()
    return json.loads(Path(out).read_text())


def cpp_round(program: Path, options: List[str], folder: str) -> Dict[str, Any]:
    out = Path(folder) / "cpp.json"
    command = [str(program), "--no-limits", *options, "--out", str(out)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def joined(rounds: List[List[Dict[str, Any]]]) -> List[Dict[str, Any]]:
    """Each operation with the median of its rounds' medians, which stay readable beside it, and the mean of what it
    used."""
    result = []
    for same in zip(*rounds):
        assert len({tuple(each["digest"]) for each in same}) == 1, f"{same[0]['name']}: rounds differ"
        medians = [each["time"]["median_us"] for each in same]
        time_ = {"median_us": statistics.median(medians), "p99_us": max(each["time"]["p99_us"] for each in same)}
        time_.update(n=sum(each["time"]["n"] for each in same), rounds_us=medians)
        per_call = {key: statistics.mean(each["per_call"][key] for each in same) for key in same[0]["per_call"]}
        result.append({"name": same[0]["name"], "time": time_, "per_call": per_call, "digest": same[0]["digest"]})
    return result


def differing(report: Dict[str, Any]) -> List[str]:
    """Operations whose results are not bit for bit those of the C++ program."""
    digests = {each["name"]: each["digest"] for each in report["cpp"]}
    digests["combine_bf16"] = digests.get("combine_bf16_in_place")
    return [
        f"{kind} {each['name']}"
        for kind in ("package", "gloo")
        for each in report[kind]
        if digests.get(each["name"]) not in (None, each["digest"])
    ]


def measure(program: Path, options: List[str], rounds: int, gloo_rounds: int) -> Dict[str, Any]:
    """C++ and Python in turn, `rounds` times, and gloo in the first of them."""
    parts: Dict[str, List[Any]] = {"cpp": [], "package": [], "gloo": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            cpp = cpp_round(program, options, folder)
            names = [each["name"] for each in cpp["operations"]]
            python = python_round(Workload.of(cpp["workload"]), names, folder, turn < gloo_rounds)
            parts["cpp"].append(cpp["operations"])
            parts["package"].append(python["package"])
            if turn < gloo_rounds:
                parts["gloo"].append(python["gloo"])
    report: Dict[str, Any] = {kind: joined(each) for kind, each in parts.items()}
    report.update(workload=cpp["workload"], clock=CLOCK, rounds=rounds, torch=torch.__version__)
    report["differ"] = differing(report)
    return report


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--program", type=Path, required=True, help="the C++ program, host_exchange of the preset release"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often C++ and Python take turns")
    parser.add_argument(
        "--gloo-rounds", type=int, default=1, help="in how many of them gloo, which takes long, has a turn"
    )
    parser.add_argument("--out", type=Path, help="file for the JSON report; without it: standard output")
    parser.add_argument("more", nargs="*", help="options for the C++ program, after --; Python follows its workload")
    args = parser.parse_args(arguments)
    report = measure(args.program, args.more, args.rounds, args.gloo_rounds)
    text = json.dumps(report, indent=1) + "\n"
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)
    return 1 if report["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
