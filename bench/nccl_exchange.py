#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The exchange as a user writes it without an EP library: permute, NCCL's all_to_all_single, index_add. One process per GPU.

    torchrun --nproc-per-node 2 bench/nccl_exchange.py --json out.json

Rows go once to each rank that hosts one of the token's experts (--copies rank) or once for each selection (--copies expert).
"known" is the time where the counts are known on the host (as with our cached handles), "counted" with their exchange and
the host's wait for it. Combine sums in BF16, in whatever order index_add_ takes: faster and less exact than ours.
Times are those of the slowest rank, by CUDA events, median and 99th percentile of --runs.
"""
import argparse
import datetime
import json
import statistics
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist


class Routes:
    """Which rows go where, for one rank: made once, used by all repetitions."""

    def __init__(self, topk_idx, num_experts, copies):
        ranks = dist.get_world_size()
        target = topk_idx // (num_experts // ranks)  # [tokens, topk]: the rank of each selection
        if copies == "rank":
            wanted = torch.zeros(topk_idx.shape[0], ranks, dtype=torch.bool, device=topk_idx.device)
            wanted.scatter_(1, target, True)
            rank, self.token = wanted.t().nonzero(as_tuple=True)  # by rank, tokens ascending
        else:
            rank, order = target.flatten().sort(stable=True)
            self.token = order // topk_idx.shape[1]
        self.counts = torch.bincount(rank, minlength=ranks)
        self.sent = self.counts.tolist()
        self.received = self.exchange_counts().tolist()

    def exchange_counts(self):
        theirs = torch.empty_like(self.counts)
        dist.all_to_all_single(theirs, self.counts)
        return theirs

    def dispatch(self, x, counted):
        received = self.exchange_counts().tolist() if counted else self.received
        rows = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(rows, x.index_select(0, self.token), received, self.sent)
        return rows

    def combine(self, rows, num_tokens):
        home = rows.new_empty(sum(self.sent), rows.shape[1])
        dist.all_to_all_single(home, rows, self.sent, self.received)
        return rows.new_zeros(num_tokens, rows.shape[1]).index_add_(0, self.token, home)


def measure(function, runs):
    """Microseconds of the slowest rank in each repetition."""
    for _ in range(5):
        function()
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    for i in range(runs):
        dist.barrier()
        begin[i].record()
        function()
        end[i].record()
    torch.cuda.synchronize()
    times = torch.tensor([1e3 * b.elapsed_time(e) for b, e in zip(begin, end)], device="cuda")
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    times = sorted(times.tolist())
    return {"median_us": statistics.median(times), "p99_us": times[min(len(times) - 1, int(0.99 * len(times)))]}


def check(routes, x, num_tokens):
    """Every token comes home as often as it was sent."""
    home = routes.combine(routes.dispatch(torch.ones_like(x), counted=True), num_tokens)
    sent = torch.bincount(routes.token, minlength=num_tokens)
    if not torch.equal(home[:, 0].long(), sent):
        raise SystemExit(f"rank {dist.get_rank()}: rows came home wrong")


def commit():
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--copies", choices=["rank", "expert"], nargs="+", default=["rank", "expert"])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where rank 0 writes the result")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()

    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    torch.manual_seed(2026 + rank)
    results = []
    for num_tokens in args.tokens:
        x = torch.randn(num_tokens, args.hidden, device="cuda").bfloat16()
        topk_idx = torch.rand(num_tokens, args.experts, device="cuda").topk(args.topk).indices
        for copies in args.copies:
            routes = Routes(topk_idx, args.experts, copies)
            check(routes, x, num_tokens)
            rows = routes.dispatch(x, counted=False)
            results.append({
                "tokens": num_tokens, "copies": copies,
                "dispatch_counted": measure(lambda: routes.dispatch(x, counted=True), args.runs),
                "dispatch_known": measure(lambda: routes.dispatch(x, counted=False), args.runs),
                "combine": measure(lambda: routes.combine(rows, num_tokens), args.runs),
            })
            if rank == 0:
                last = results[-1]
                print(f"{num_tokens:6} tokens, once per {copies:6}: dispatch {last['dispatch_counted']['median_us']:7.0f} us counted, "
                      f"{last['dispatch_known']['median_us']:7.0f} us known, combine {last['combine']['median_us']:7.0f} us", flush=True)
    if rank == 0 and args.json:
        report = {"what": "permute + NCCL all_to_all_single + index_add", "gpu": torch.cuda.get_device_name(), "ranks": ranks,
                  "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())), "date": str(datetime.date.today()),
                  "commit": args.commit, "hidden": args.hidden, "topk": args.topk, "experts": args.experts, "runs": args.runs,
                  "clock": "CUDA events, slowest rank", "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
