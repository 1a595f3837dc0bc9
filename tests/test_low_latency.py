#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Low-latency dispatch and combine of V1: checks every format with and without hooks, then measures."""

import argparse
import itertools
from typing import Any

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import all_gather, dist_print, init_dist
from deep_ep.utils.math import calc_diff, hash_tensor, per_token_cast_back
from deep_ep.utils.testing import bench

from script_options import parser, start

FORMATS = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))


def rows_of(recv: Any, slot: int, count: int) -> torch.Tensor:
    if isinstance(recv, tuple):
        return per_token_cast_back(recv[0][slot, :count].contiguous(), recv[1][slot, :count].contiguous())
    return recv[slot, :count]


def dispatch(
    buffer: Any, x: torch.Tensor, topk_idx: torch.Tensor, args: argparse.Namespace, form: Any, hook: bool
) -> Any:
    stats = torch.zeros(args.num_experts // buffer.group_size, dtype=torch.int32)
    made = buffer.low_latency_dispatch(
        x,
        topk_idx,
        args.num_tokens,
        args.num_experts,
        cumulative_local_expert_recv_stats=stats,
        use_fp8=form[0],
        round_scale=form[1],
        use_ue8m0=form[2],
        return_recv_hook=hook,
    )
    if hook:
        made[4]()
    assert torch.equal(stats, made[1])
    return made[:3]


def check_case(buffer: Any, group: Any, data: Any, args: argparse.Namespace, form: Any, hook: bool) -> int:
    x, topk_idx, weights = data
    recv, count, handle = dispatch(buffer, x, topk_idx, args, form, hook)
    everyone = all_gather(topk_idx, group)
    y = torch.zeros((*handle[0].shape, args.hidden), dtype=torch.bfloat16)
    digest = 0
    for slot in range(count.numel()):
        expert, valid = buffer.rank * count.numel() + slot, int(count[slot])
        assert valid == sum(int((ids == expert).sum()) for ids in everyone)
        assert valid == int((handle[1][slot] & 0xFFFFFFFF).sum())
        rows = rows_of(recv, slot, valid)
        y[slot, :valid] = rows
        digest ^= hash_tensor(rows)
        for src in range(buffer.group_size):
            begin, rows_here = int(handle[1][slot, src]) >> 32, int(handle[1][slot, src]) & 0xFFFFFFFF
            # Channel 0 of every row is its rank.
            assert bool(((rows[begin : begin + rows_here, 0].float() - (src - 128)).abs() <= 16 * form[0]).all())
    wanted = x.float() * torch.where(topk_idx >= 0, weights, 0.0).sum(dim=1, keepdim=True)
    for use_logfmt in (False, True):
        out = torch.empty_like(x)
        combined, _, receive = buffer.low_latency_combine(
            y, topk_idx, weights, handle, use_logfmt=use_logfmt, return_recv_hook=hook, out=out
        )
        if hook:
            receive()
        assert combined is out and not bool(combined.isnan().any())
        if not form[1]:
            assert calc_diff(wanted, combined) < (9e-4 if form[0] else 1e-5)
        digest = digest * 3 ^ hash_tensor(combined)
    return digest


def measure(buffer: Any, data: Any, args: argparse.Namespace) -> None:
    x, topk_idx, weights = data
    recv, count, handle = dispatch(buffer, x, topk_idx, args, (True, False, False), False)
    y = torch.zeros((*handle[0].shape, args.hidden), dtype=torch.bfloat16)
    selections = int((topk_idx >= 0).sum())

    def sends() -> None:
        buffer.low_latency_dispatch(x, topk_idx, args.num_tokens, args.num_experts)

    def returns() -> None:
        buffer.low_latency_combine(y, topk_idx, weights, handle)

    def returns_encoded() -> None:
        buffer.low_latency_combine(y, topk_idx, weights, handle, use_logfmt=True)

    for name, call, size in (
        ("dispatch FP8", sends, args.hidden + args.hidden // 128 * 4 + 16),
        ("combine BF16", returns, 2 * args.hidden),
        ("combine LogFMT", returns_encoded, args.hidden * 10 // 8 + args.hidden // 128 * 4),
    ):
        mean, shortest, _ = bench(call, args.num_warmups, args.num_tests)
        if buffer.rank == 0:
            gbs = size * selections / 1e9 / mean
            print(f"{name}: {gbs:.2f} GB/s, mean {mean * 1e6:.0f} us, shortest {shortest * 1e6:.0f} us", flush=True)


def run(local_rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank, ranks, group = init_dist(local_rank, num_processes)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(args.num_tokens, args.hidden, ranks, args.num_experts)
    buffer = deep_ep.Buffer(
        group, 0, hint, low_latency_mode=True, num_qps_per_rank=args.num_experts // ranks, explicitly_destroy=True
    )
    with torch.inference_mode():
        scores = torch.randn((args.num_tokens, args.num_experts), dtype=torch.float32)
        topk_idx = scores.topk(args.num_topk, dim=1).indices.to(deep_ep.topk_idx_t)
        topk_idx.view(-1)[torch.randperm(topk_idx.numel())[:10]] = -1
        weights = torch.randn(topk_idx.shape, dtype=torch.float32).abs()
        x = torch.full((args.num_tokens, args.hidden), float(rank - 128), dtype=torch.bfloat16)
        x[:, -128:] = torch.arange(args.num_tokens).to(torch.bfloat16).view(-1, 1)
        data = (x, topk_idx, weights)
        digests = [
            [
                check_case(buffer, group, data, args, form, hook)
                for form, hook in itertools.product(FORMATS, (False, True))
            ]
            for _ in range(2)
        ]
        assert digests[0] == digests[1], "two runs gave different bits"
        dist_print(f"[rank {rank}] all formats are right")
        measure(buffer, data, args)
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    defaults = dict(
        num_processes=4, num_tokens=32, hidden=7168, num_topk=8, num_experts=64, num_warmups=5, num_tests=20
    )
    start(run, parser(__doc__, **defaults))
