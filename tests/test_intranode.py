#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Dispatch and combine of V1 inside a node: checks every mode against torch, then measures."""

import argparse
import itertools
from typing import Any, List, Optional

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils.envs import all_gather, dist_print, init_dist
from deep_ep.utils.math import calc_diff, per_token_cast_back, per_token_cast_to_fp8
from deep_ep.utils.testing import bench

from script_options import parser, start


def routed(args: argparse.Namespace) -> torch.Tensor:
    scores = torch.rand((args.num_tokens, args.num_experts), dtype=torch.float32)
    return scores.topk(args.num_topk, dim=1).indices.to(deep_ep.topk_idx_t)


def check_layout(buffer: Any, topk_idx: torch.Tensor, args: argparse.Namespace) -> Any:
    layout = buffer.get_dispatch_layout(topk_idx, args.num_experts)
    rank_of = topk_idx // (args.num_experts // buffer.group_size)
    member = torch.stack([(rank_of == rank).any(dim=1) for rank in range(buffer.group_size)], dim=1)
    assert torch.equal(layout[3], member)
    assert torch.equal(layout[0], member.sum(dim=0).to(torch.int32))
    assert torch.equal(layout[2], torch.bincount(topk_idx.flatten(), minlength=args.num_experts).to(torch.int32))
    return layout


def check_case(buffer: Any, group: Any, layout: Any, topk: Any, x: Any, with_topk: bool, how: Any) -> None:
    """x holds the rank's number in every row, so that a received row tells where it came from. `how`: whether calls bring an
    event, and whether they are asynchronous."""

    def made(call: Any, *arguments: Any, **keywords: Any) -> Any:
        event = buffer.capture() if how[0] else None
        results = call(*arguments, **keywords, previous_event=event, async_finish=how[1])
        if how[1]:
            results[-1].current_stream_wait()
        return results

    rank = buffer.rank
    common = dict(
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    ids = dict(topk_idx=topk[0], topk_weights=topk[1]) if with_topk else {}
    recv_x, recv_ids, recv_weights, counts, handle, _ = made(buffer.dispatch, x, **common, **ids)
    rows = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
    ends = (handle[0][:, rank] if len(handle) == 6 else handle[-4]).tolist()
    assert rows.size(0) == ends[-1]
    for src, (begin, end) in enumerate(zip([0] + ends[:-1], ends)):
        assert bool((rows[begin:end].float().round() == src).all()), f"rows {begin}..{end} are not of rank {src}"
    all_counts = torch.stack(all_gather(layout[2], group)).sum(dim=0)
    local = all_counts.numel() // buffer.group_size
    assert counts == all_counts[rank * local : (rank + 1) * local].tolist()
    if with_topk:
        for expert, count in enumerate(counts):
            assert int((recv_ids == expert).sum()) == count
        worst = topk[0].size(0) * buffer.group_size
        bounded = made(buffer.dispatch, x, **common, **ids, num_worst_tokens=worst)
        assert bounded[3] == [] and bounded[1].size(0) == worst
        assert torch.equal(bounded[1][: ends[-1]], recv_ids) and bool((bounded[1][ends[-1] :] == -1).all())
        assert torch.equal(bounded[2][: ends[-1]], recv_weights)
    again = made(buffer.dispatch, x, handle=handle)[0]
    again = per_token_cast_back(*again) if isinstance(again, tuple) else again
    assert torch.equal(again, rows)
    combined, weights, _ = made(buffer.combine, rows, handle, topk_weights=recv_weights)
    sent = per_token_cast_back(*x) if isinstance(x, tuple) else x
    fanout = layout[3].sum(dim=1, keepdim=True).float()
    assert calc_diff(combined.float() / fanout, sent) < 5e-6
    assert weights is None or calc_diff(weights, topk[1]) < 1e-9


def measure(buffer: Any, layout: Any, x: Any, args: argparse.Namespace) -> List[str]:
    common = dict(
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    lines = []
    for name, rows in (("FP8", per_token_cast_to_fp8(x)), ("BF16", x)):
        recv_x, *_, handle, _ = buffer.dispatch(rows, **common)
        received = recv_x[0] if isinstance(recv_x, tuple) else recv_x
        size = received.numel() * (1 + 4 / 128 if name == "FP8" else 2)
        seconds = bench(lambda: buffer.dispatch(rows, handle=handle), args.num_warmups, args.num_tests)[0]
        lines.append(f"dispatch {name}: {size / 1e9 / seconds:.2f} GB/s, {seconds * 1e6:.0f} us")
    seconds = bench(lambda: buffer.combine(received, handle), args.num_warmups, args.num_tests)[0]
    lines.append(f"combine BF16: {received.numel() * 2 / 1e9 / seconds:.2f} GB/s, {seconds * 1e6:.0f} us")
    return lines


def run(local_rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank, ranks, group = init_dist(local_rank, num_processes)
    with torch.inference_mode():
        more = {} if args.ranks_per_node is None else dict(ranks_per_node=args.ranks_per_node)
        buffer = deep_ep.Buffer(group, int(2e9), int(1e9) if more else 0, explicitly_destroy=True, **more)
        topk_idx = routed(args)
        topk = (topk_idx, torch.full(topk_idx.shape, float(rank), dtype=torch.float32))
        layout = check_layout(buffer, topk_idx, args)
        x = torch.full((args.num_tokens, args.hidden), float(rank), dtype=torch.bfloat16)
        q, scales = per_token_cast_to_fp8(x)
        cases = itertools.product((False, True), (False, True), (x, (q, scales.t().contiguous().t())), (False, True))
        for with_event, asynchronous, rows, with_topk in cases:
            check_case(buffer, group, layout, topk, rows, with_topk, (with_event, asynchronous))
        dist_print(f"[rank {rank}] all modes are right")
        for line in measure(buffer, layout, torch.randn((args.num_tokens, args.hidden), dtype=torch.bfloat16), args):
            if rank == 0:
                print(line, flush=True)
        buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


def options(description: Optional[str], **changed: int) -> argparse.ArgumentParser:
    defaults = dict(
        num_processes=4, num_tokens=512, hidden=7168, num_topk=8, num_experts=256, num_warmups=3, num_tests=10
    )
    made = parser(description, **{**defaults, **changed})
    made.add_argument("--ranks-per-node", type=int, metavar="N", help="size of a logical node; None: one node")
    return made


if __name__ == "__main__":
    start(run, options(__doc__))
