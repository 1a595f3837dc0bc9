# SPDX-License-Identifier: MIT
"""Buffers come and go, outputs stay, mistakes and processes end well."""

import gc
import os
import resource
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
import torch
from deep_ep import Buffer, Error, ErrorCode

from ranks import dispatch_v1, make_tokens, run_ranks

EXPERTS, HIDDEN, TOPK = 8, 64, 2


def test_200_buffers_leave_no_memory_and_no_descriptors():
    tokens = make_tokens(0, 4, HIDDEN, TOPK, EXPERTS)

    def cycle(group):
        with Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True) as buffer:
            recv_x, _, _, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
            buffer.combine(recv_x, handle)
            buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 8, EXPERTS, use_fp8=False)

    def state():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(20):
        run_ranks(2, cycle)
    fds, memory = state()
    for _ in range(200):
        run_ranks(2, cycle)
    fds_after, memory_after = state()
    assert fds_after <= fds
    assert memory_after - memory < 32 * 1024  # KiB


def test_outputs_outlive_their_buffer():
    def body(group):
        tokens = make_tokens(group.rank(), 6, HIDDEN, TOPK, EXPERTS)
        with Buffer(group) as buffer:
            recv_x = dispatch_v1(buffer, tokens, EXPERTS)[0]
            before = recv_x.clone()
        del buffer
        gc.collect()
        return torch.equal(recv_x, before)

    assert all(run_ranks(2, body))


def test_several_buffers_and_groups_work_side_by_side():
    def body(group):
        tokens = make_tokens(group.rank(), 6, HIDDEN, TOPK, EXPERTS)
        with Buffer(group) as first, Buffer(group) as second:
            results = [dispatch_v1(buffer, tokens, EXPERTS) for buffer in (first, second, first)]
            combined = [buffer.combine(r[0], r[4])[0] for buffer, r in zip((first, second, first), results)]
        return all(torch.equal(each, combined[0]) for each in combined)

    assert all(run_ranks(2, body))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(6, 7, dtype=torch.bfloat16)), "multiple of 16 bytes"),
        (dict(x=[[1.0]]), "x must be a tensor: it is list"),
        (dict(x=torch.zeros(HIDDEN, dtype=torch.bfloat16)), "x must be [tokens, hidden]"),
        (dict(topk_idx=[[1]]), "topk_idx must be a tensor: it is list"),
        (dict(x=torch.zeros(5, HIDDEN, dtype=torch.bfloat16)), "is_token_in_rank"),
        (dict(x=torch.zeros(HIDDEN, 6, dtype=torch.bfloat16).t()), "contiguous"),
        (dict(topk_weights=torch.zeros(6, 3)), "topk_weights"),
        (dict(topk_weights=torch.zeros(6, TOPK, dtype=torch.float64)), "float64"),
        (dict(topk_weights=torch.zeros(6, TOPK, device="meta")), "topk_weights is on meta"),
        (dict(topk_idx=torch.full((6, TOPK), EXPERTS)), "expert 8"),
        (dict(topk_idx=None), "together"),
        (dict(expert_alignment=0), "expert_alignment"),
        (dict(num_worst_tokens=1), "num_worst_tokens"),
        (dict(is_token_in_rank=torch.zeros(6, 3, dtype=torch.bool)), "is_token_in_rank"),
    ],
)
@pytest.mark.parametrize("everyone", [True, False])
def test_wrong_arguments_name_themselves_and_the_group_goes_on(change, message, everyone):
    def body(group):
        tokens = make_tokens(group.rank(), 6, HIDDEN, TOPK, EXPERTS, dropped=0)
        with Buffer(group, timeout_secs=10) as buffer:
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)
            arguments = dict(
                x=tokens.x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                topk_idx=tokens.topk_idx,
                topk_weights=tokens.topk_weights,
            )
            wrong = everyone or group.rank() == 1
            with pytest.raises(Error) as caught:
                buffer.dispatch(**{**arguments, **(change if wrong else {})})
            assert caught.value.code in (ErrorCode.invalid_argument, ErrorCode.unsupported)
            assert buffer.dispatch(**arguments)[0].size(0) > 0
            return str(caught.value), wrong

    for text, wrong in run_ranks(2, body):
        assert message in text if wrong else "rank 1" in text


def test_a_rank_that_does_not_come_is_named_with_code_and_wait():
    def body(group):
        tokens = make_tokens(group.rank(), 6, HIDDEN, TOPK, EXPERTS)
        with Buffer(group, timeout_secs=0.5) as buffer:
            if group.rank() == 0:
                with pytest.raises(Error, match="rank 0 waited for rank 1") as caught:
                    dispatch_v1(buffer, tokens, EXPERTS)
                group.barrier()
                return caught.value
            group.barrier()

    error = run_ranks(2, body)[0]
    assert error.code == ErrorCode.timeout and (error.wait.rank, error.wait.peer) == (0, 1)
    assert error.wait.phase == "dispatch"


def test_a_program_may_end_in_the_middle_of_everything():
    code = """
        import threading, torch, deep_ep
        groups = deep_ep.in_process_group(2)
        kept = []
        def run(group):
            buffer = deep_ep.Buffer(group, 0, 1 << 20, low_latency_mode=True)
            x = torch.ones(4, 64, dtype=torch.bfloat16)
            kept.append((buffer, buffer.low_latency_dispatch(x, torch.zeros(4, 1, dtype=torch.int64), 8, 2,
                                                             use_fp8=False, return_recv_hook=True)))
        threads = [threading.Thread(target=run, args=(g,)) for g in groups]
        [t.start() for t in threads]; [t.join() for t in threads]
        print("end")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr.strip()) == (0, "end", "")


def waits():
    """name -> a call that waits for the other rank; each gets a buffer, tokens and what one round before gave."""

    def normal(buffer, tokens, made):
        dispatch_v1(buffer, tokens, EXPERTS)

    def combine(buffer, tokens, made):
        buffer.combine(made[0][0], made[0][4])

    def low_latency(buffer, tokens, made):
        buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 8, EXPERTS, use_fp8=False)

    def hook(buffer, tokens, made):
        buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 8, EXPERTS, use_fp8=False, return_recv_hook=True)[4]()

    def low_latency_combine(buffer, tokens, made):
        buffer.low_latency_combine(made[1][0], tokens.topk_idx, tokens.topk_weights, made[1][2])

    def opening(buffer, tokens, made):
        Buffer(buffer.group).close()

    return [normal, combine, low_latency, hook, low_latency_combine, opening]


@pytest.mark.parametrize("wait", waits(), ids=lambda each: each.__name__)
def test_q16_waits_do_not_hold_the_interpreter_lock(wait):
    tokens = make_tokens(0, 6, HIDDEN, TOPK, EXPERTS)
    ticks = []

    def body(group):
        with Buffer(group, 0, 1 << 20, low_latency_mode=True, timeout_secs=20) as buffer:
            low = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 8, EXPERTS, use_fp8=False)
            made = dispatch_v1(buffer, tokens, EXPERTS), low
            if group.rank() == 1:
                for _ in range(20):  # would not run if rank 0 held the lock in its wait
                    ticks.append(time.monotonic())
                    time.sleep(0.001)
            wait(buffer, tokens, made)

    run_ranks(2, body)
    assert len(ticks) == 20


def test_placements_spread_experts_as_the_caller_says():
    import deep_ep

    placement = deep_ep.Placement.from_lists([[2, 0], [1, 3, 0]], 4)

    def body(group):
        ids = torch.tensor([[2, 3], [1, -1], [0, 1]])
        x = torch.arange(3 * HIDDEN).view(3, HIDDEN).to(torch.bfloat16)
        with Buffer(group) as buffer:
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(ids, 4, placement=placement)
            recv_x, recv_ids, _, counts, handle, _ = buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                topk_idx=ids,
                topk_weights=torch.ones(3, 2),
                placement=placement,
            )
            return recv_ids, counts, buffer.combine(recv_x, handle)[0], x, member

    results = run_ranks(2, body)
    assert len(results[0][1]) == 2 and len(results[1][1]) == 3
    assert sum(results[0][1]) + sum(results[1][1]) == 10
    for _, _, combined, x, member in results:
        assert torch.allclose(combined.float(), x.float() * member.sum(dim=1, keepdim=True), rtol=1e-2)


def test_a_closed_buffer_keeps_its_group_no_longer():
    def body(group):
        buffer = Buffer(group)
        assert buffer.group is group
        buffer.close()
        assert buffer.group is None
        return weakref.ref(group)

    (kept,) = run_ranks(1, body)
    gc.collect()
    assert kept() is None
