#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Inference time per batch of one MoE layer: low-latency dispatch, experts, combine, as a decoding step does them."""

import argparse
import time
from typing import Any, List

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import init_dist, settle

from script_options import parser, start


def now() -> float:
    settle()
    return time.perf_counter()


def step(buffer: Any, x: torch.Tensor, topk: Any, experts: torch.Tensor, args: argparse.Namespace) -> List[float]:
    """Seconds of dispatch, experts and combine."""
    times = [now()]
    recv, count, handle, _, hook = buffer.low_latency_dispatch(
        x, topk[0], args.num_tokens, args.num_experts, use_fp8=False, return_recv_hook=True
    )
    hook()
    times.append(now())
    if recv.is_cuda:  # counts stay on the GPU
        recv.mul_(experts.unsqueeze(1))
    else:
        for slot in range(count.numel()):
            recv[slot, : int(count[slot])].mul_(experts[slot])
    times.append(now())
    buffer.low_latency_combine(recv, topk[0], topk[1], handle)
    times.append(now())
    return [after - before for before, after in zip(times, times[1:])]


def run(local_rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank, ranks, group = init_dist(local_rank, num_processes)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(args.num_tokens, args.hidden, ranks, args.num_experts)
    with torch.inference_mode(), deep_ep.Buffer(group, 0, hint, low_latency_mode=True) as buffer:
        x = torch.randn((args.num_tokens, args.hidden), dtype=torch.bfloat16)
        scores = torch.rand((args.num_tokens, args.num_experts), dtype=torch.float32)
        weights, ids = scores.softmax(dim=1).topk(args.num_topk, dim=1)
        topk = (ids.to(deep_ep.topk_idx_t), weights.contiguous())
        experts = torch.randn((args.num_experts // ranks, args.hidden), dtype=torch.bfloat16)
        for _ in range(args.num_warmups):
            step(buffer, x, topk, experts, args)
        taken = [step(buffer, x, topk, experts, args) for _ in range(args.num_tests)]
        dist.barrier()
    if rank == 0:
        taken = torch.tensor(taken, dtype=torch.float64, device="cpu")
        total = taken.sum(dim=1).sort().values * 1e6
        parts = (taken.median(dim=0).values * 1e6).tolist()
        routes = f"top-{args.num_topk} of {args.num_experts}"
        print(f"{ranks} ranks, batch {args.num_tokens} per rank, hidden {args.hidden}, {routes}")
        print(f"inference time per batch: median {total[len(total) // 2]:.0f} us, longest {total[-1]:.0f} us")
        print(f"dispatch {parts[0]:.0f} us, experts {parts[1]:.0f} us, combine {parts[2]:.0f} us (medians)", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    defaults = dict(
        num_processes=2, num_tokens=128, hidden=7168, num_topk=8, num_experts=32, num_warmups=3, num_tests=20
    )
    spelled = dict(
        num_processes=("--num-processes", "--num_processes"),
        num_tokens=("--batch_size", "--batch-size"),
        hidden=("--hidden_size", "--hidden-size"),
    )
    start(run, parser(__doc__, spelled, **defaults))
