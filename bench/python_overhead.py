#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What one call through the Python package costs: one token, one rank, so that hardly any data moves. Beside each call the call of
the extension beneath it, and a bare nanobind call that does nothing. Writes JSON, prints a table."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import deep_ep
import torch
from deep_ep import _core

MAX_TOKENS = 16
GOAL_US = 30.0  # for the low-latency calls


class Shape(NamedTuple):
    hidden: int
    topk: int
    experts: int


def times_us(call: Callable[[], Any], reps: int) -> Dict[str, float]:
    for _ in range(max(reps // 10, 20)):
        call()
    taken = []
    for _ in range(reps):
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    taken.sort()
    return {"median_us": taken[reps // 2] / 1e3, "p99_us": taken[(reps * 99 + 99) // 100 - 1] / 1e3, "n": reps}


class Calls:
    """Every call with its arguments; where there is one, the call of the extension that does the work."""

    def __init__(self, shape: Shape) -> None:
        group = deep_ep.in_process_group(1)[0]
        hidden, topk, experts = shape
        self.experts = experts
        self.x = torch.randn((1, hidden), dtype=torch.float32).to(torch.bfloat16)
        self.ids = torch.arange(topk, dtype=torch.int64).view(1, topk)
        self.weights = torch.full((1, topk), 1 / topk, dtype=torch.float32)
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, hidden, 1, experts)
        self.buffer = deep_ep.Buffer(group, 0, hint, low_latency_mode=True)
        self.elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=MAX_TOKENS, hidden=hidden)
        self.layout = self.buffer.get_dispatch_layout(self.ids, experts)

    def dispatch(self) -> Any:
        return self.buffer.dispatch(
            self.x,
            num_tokens_per_rank=self.layout[0],
            is_token_in_rank=self.layout[3],
            num_tokens_per_expert=self.layout[2],
            topk_idx=self.ids,
            topk_weights=self.weights,
        )

    def low_latency_dispatch(self, **options: Any) -> Any:
        made = self.buffer.low_latency_dispatch(self.x, self.ids, MAX_TOKENS, self.experts, **options)
        if made[4] is not None:
            made[4]()
        return made

    def all(self) -> Dict[str, List[Optional[Callable[[], Any]]]]:
        buffer, elastic, core = self.buffer, self.elastic, self.buffer._opened()
        normal, small = self.dispatch(), self.low_latency_dispatch(use_fp8=False)
        grown = elastic.dispatch(self.x, self.ids, self.weights, num_experts=self.experts)
        handle, small_handle = normal[4].core_handle, _core.handle_of(small[2][1])
        routed = dict(x=self.x, topk_idx=self.ids, num_experts=self.experts)
        padded = dict(
            routed, max_tokens_per_rank=MAX_TOKENS, layout=_core.OutputLayout.padded, column_major_scales=True
        )
        back = dict(x=small[0], handle=small_handle, weights=self.weights, order=_core.SumOrder(by_topk=True))
        out = torch.empty_like(self.x)
        return {
            "get_dispatch_layout": [
                lambda: buffer.get_dispatch_layout(self.ids, self.experts),
                lambda: core.dispatch_layout(self.ids, self.experts, None),
            ],
            "dispatch": [self.dispatch, lambda: core.dispatch(topk_weights=self.weights, **routed)],
            "dispatch, cached handle": [
                lambda: buffer.dispatch(self.x, handle=normal[4]),
                lambda: core.dispatch(x=self.x, handle=handle),
            ],
            "combine": [
                lambda: buffer.combine(normal[0], normal[4]),
                lambda: core.combine(x=normal[0], handle=handle),
            ],
            "low_latency_dispatch, BF16": [
                lambda: self.low_latency_dispatch(use_fp8=False),
                lambda: core.low_latency_dispatch(**padded).receive(),
            ],
            "low_latency_dispatch, FP8": [
                lambda: self.low_latency_dispatch(),
                lambda: core.low_latency_dispatch(fp8=(False, False), **padded).receive(),
            ],
            "low_latency_dispatch, BF16, with hook": [
                lambda: self.low_latency_dispatch(use_fp8=False, return_recv_hook=True),
                None,
            ],
            "low_latency_combine": [
                lambda: buffer.low_latency_combine(small[0], self.ids, self.weights, small[2]),
                lambda: core.low_latency_combine(**back).receive(),
            ],
            "low_latency_combine, out=": [
                lambda: buffer.low_latency_combine(small[0], self.ids, self.weights, small[2], out=out),
                lambda: core.low_latency_combine(out=out, **back).receive(),
            ],
            "ElasticBuffer.dispatch": [
                lambda: elastic.dispatch(self.x, self.ids, self.weights, num_experts=self.experts),
                None,
            ],
            "ElasticBuffer.combine": [lambda: elastic.combine(grown[0], grown[3]), None],
        }

    def bare(self) -> Callable[[], Any]:
        core = self.buffer._opened()
        return lambda: core.node_of(0)


def measure(shapes: List[Shape], reps: int) -> Dict[str, Any]:
    report: Dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "goal_us": GOAL_US}
    report["shapes"] = []
    for shape in shapes:
        calls = Calls(shape)
        results = {"shape": shape._asdict(), "bare": times_us(calls.bare(), reps), "calls": []}
        for name, (call, beneath) in calls.all().items():
            assert call is not None
            entry = {"name": name, "time": times_us(call, reps)}
            if beneath is not None:
                entry["beneath"] = times_us(beneath, reps)
            results["calls"].append(entry)
        report["shapes"].append(results)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reps", type=int, default=3000, help="measured calls of each kind")
    parser.add_argument("--out", type=Path, help="file for the JSON report")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = measure([Shape(128, 1, 8), Shape(7168, 8, 8)], args.reps)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    else:
        from python_tables import overhead_text

        print(overhead_text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
