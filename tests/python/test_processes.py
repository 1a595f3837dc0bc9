# SPDX-License-Identifier: MIT
"""Ranks as processes, over torch.distributed with gloo: the group, a part of it, and DeepEP's pipeline calls."""

import collections
import queue
import types

import pytest
import torch
import torch.distributed as dist
from deep_ep import Buffer, ElasticBuffer, Error, get_logical_domain_size, get_physical_domain_size

from processes import RANKS, spawn
from ranks import dispatch_v1, make_tokens, member_of, run_ranks

EXPERTS, HIDDEN, TOPK = 8, 128, 2


def round_trip(group, rank_in_group, ranks):
    tokens = make_tokens(rank_in_group, 12, HIDDEN, TOPK, EXPERTS)
    with Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True) as buffer:
        assert (buffer.rank, buffer.group_size) == (rank_in_group, ranks)
        recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        combined, home, _ = buffer.combine(recv_x, handle, topk_weights=weights)
        count = member_of(tokens.topk_idx, EXPERTS, ranks).sum(dim=1, keepdim=True)
        assert torch.allclose(combined.float(), tokens.x.float() * count, rtol=2e-2)
        assert torch.equal(home, torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0))
        recv, counts, handle, _, hook = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, 16, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()
        out, _, _ = buffer.low_latency_combine(torch.nan_to_num(recv), tokens.topk_idx, tokens.topk_weights, handle)
        weight = home.sum(dim=1, keepdim=True)
        assert torch.allclose(out.float(), tokens.x.float() * weight, rtol=2e-2, atol=2e-2)


def _whole_group(rank):
    round_trip(dist.group.WORLD, rank, RANKS)
    assert get_physical_domain_size(dist.group.WORLD) == (1, RANKS)
    assert get_logical_domain_size(dist.group.WORLD, allow_hybrid_mode=False) == (1, RANKS)


def test_1_1_a_gloo_group_of_processes():
    spawn(_whole_group)


def _halves(rank):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    round_trip(groups[rank % 2], rank // 2, 2)


def test_2_5_sub_groups_at_once():
    spawn(_halves)


def pipeline_round(buffer, rank):
    buffer.pp_set_config(1 << 12, 2)
    following, before = (rank + 1) % RANKS, (rank - 1) % RANKS
    for i in range(4):
        buffer.pp_send(torch.full((16, 8), 10 * rank + i, dtype=torch.float32), following)
        if i > 0:
            received = torch.empty(16, 8)
            buffer.pp_recv(received, before)
            assert bool((received == 10 * before + i - 1).all())
    last = torch.empty(16, 8)
    buffer.pp_recv(last, before)
    assert bool((last == 10 * before + 3).all())
    buffer.barrier()


def _pipeline(rank):
    with ElasticBuffer(dist.new_group(list(range(RANKS))), 2 << 20) as buffer:
        pipeline_round(buffer, rank)


def test_3_7_pipeline_sends_to_ring_neighbours_arrive_in_order():
    spawn(_pipeline)


class ThreadComm:
    """What of mpi4py's communicators is used, among threads: blobs by (source, destination)."""

    boxes = collections.defaultdict(queue.Queue)

    def __init__(self, group):
        self.group = group
        self.Get_rank, self.Get_size, self.allgather = group.rank, group.size, group.all_gather_object

    def Isend(self, buffer, dest, tag):  # noqa: N802  (mpi4py's names)
        self.boxes[self.Get_rank(), dest].put(bytes(buffer))
        return types.SimpleNamespace(Wait=lambda: None)

    def Recv(self, buffer, source, tag):  # noqa: N802
        buffer[:] = torch.frombuffer(bytearray(self.boxes[source, self.Get_rank()].get(timeout=20)), dtype=torch.uint8)


def test_3_7_pipeline_calls_go_over_an_mpi_communicator_too():
    def body(group):
        with ElasticBuffer(ThreadComm(group), 2 << 20) as buffer:
            pipeline_round(buffer, group.rank())
            with pytest.raises(Error, match="neighbour"):
                buffer.pp_send(torch.zeros(8), (group.rank() + 2) % RANKS)

    run_ranks(RANKS, body)


def test_3_7_pipeline_calls_need_a_group_that_can_send():
    def body(group):
        with ElasticBuffer(group, 2 << 20) as buffer:
            buffer.pp_set_config(1 << 12, 1)
            with pytest.raises(Error, match="process group"):
                buffer.pp_send(torch.zeros(8), (group.rank() + 1) % 2)

    run_ranks(2, body)
