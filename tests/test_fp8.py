#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""FP8 against BF16: how exact and how fast is a dispatch whose rows are quantised on the way, at several magnitudes."""

import argparse
from typing import Any, Tuple

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import init_dist
from deep_ep.utils.math import calc_diff, per_token_cast_back
from deep_ep.utils.testing import bench

from script_options import parser, start

FORMATS = (
    ("BF16", dict(use_fp8=False)),
    ("FP8, fp32 scales", dict(use_fp8=True)),
    ("FP8, power-of-two scales", dict(use_fp8=True, round_scale=True)),
    ("FP8, UE8M0 scales", dict(use_fp8=True, round_scale=True, use_ue8m0=True)),
)


def round_trip(buffer: Any, x: torch.Tensor, topk: Any, args: argparse.Namespace, options: Any) -> torch.Tensor:
    recv, count, handle, *_ = buffer.low_latency_dispatch(x, topk[0], args.num_tokens, args.num_experts, **options)
    y = torch.zeros((*handle[0].shape, args.hidden), dtype=torch.bfloat16)
    for slot in range(count.numel()):
        n = int(count[slot])
        quantised = isinstance(recv, tuple)
        y[slot, :n] = per_token_cast_back(recv[0][slot, :n], recv[1][slot, :n]) if quantised else recv[slot, :n]
    return buffer.low_latency_combine(y, topk[0], topk[1], handle)[0]


def errors(got: torch.Tensor, x: torch.Tensor) -> Tuple[float, float]:
    """(calc_diff, largest error over the largest value)"""
    return calc_diff(x, got), float((got.float() - x.float()).abs().max() / x.float().abs().max())


def run(local_rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank, ranks, group = init_dist(local_rank, num_processes)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(args.num_tokens, args.hidden, ranks, args.num_experts)
    with torch.inference_mode(), deep_ep.Buffer(group, 0, hint, low_latency_mode=True) as buffer:
        scores = torch.rand((args.num_tokens, args.num_experts), dtype=torch.float32)
        ids = scores.topk(args.num_topk, dim=1).indices.to(deep_ep.topk_idx_t)
        topk = (ids, torch.full(ids.shape, 1 / args.num_topk, dtype=torch.float32))
        for name, options in FORMATS:
            worst = (0.0, 0.0)
            for magnitude in (1e-3, 1.0, 1e3):
                x = torch.randn((args.num_tokens, args.hidden), dtype=torch.bfloat16) * magnitude
                got = errors(round_trip(buffer, x, topk, args, options) / magnitude, x / magnitude)
                worst = (max(worst[0], got[0]), max(worst[1], got[1]))
            assert worst[0] < (9e-4 if options["use_fp8"] else 1e-5) * (4 if "round_scale" in options else 1), (
                name,
                worst,
            )

            def call() -> None:
                buffer.low_latency_dispatch(x, ids, args.num_tokens, args.num_experts, **options)

            mean = bench(call, args.num_warmups, args.num_tests)[0]
            if rank == 0:
                print(
                    f"{name:<26} diff {worst[0]:.1e}  largest error {worst[1]:.1e}  dispatch {mean * 1e6:.0f} us",
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    defaults = dict(
        num_processes=2, num_tokens=64, hidden=7168, num_topk=8, num_experts=32, num_warmups=3, num_tests=20
    )
    start(run, parser(__doc__, **defaults))
