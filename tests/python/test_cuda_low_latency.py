# SPDX-License-Identifier: MIT
"""V1's low-latency calls on CUDA tensors: the same bits as on CPU tensors, with and without hooks, and in graphs."""

import pytest
import torch
from deep_ep import Buffer, Error

from gpu import SMALL, moved, needs_gpu, on_both, run_on, same, settled, to_cpu
from ranks import make_tokens
from test_cuda_streams import captured

pytestmark = needs_gpu
RANKS, EXPERTS, HIDDEN, TOPK, MAX_TOKENS = 4, 16, 512, 4, 24
FORMATS = {
    "bf16": dict(use_fp8=False),
    "fp8": dict(),
    "rounded": dict(round_scale=True),
    "ue8m0": dict(round_scale=True, use_ue8m0=True),
}


def opened(group, device, num_tokens=MAX_TOKENS, **options):
    tokens = moved(make_tokens(group.rank(), num_tokens, HIDDEN, TOPK, EXPERTS), device)
    hint = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, group.size(), EXPERTS)
    return tokens, Buffer(group, 0, hint, low_latency_mode=True, device=device, **{**SMALL, **options})


def valid(recv, count):
    """What was received, without what nobody wrote: rows behind each expert's last."""
    here = torch.arange(recv.size(1), device=recv.device) < count.unsqueeze(1)
    rows = recv.contiguous().flatten().view(torch.uint8).view(*recv.shape[:2], -1)
    return torch.where(here.unsqueeze(2), rows, 0)


def dequantised(recv):
    data, scales = recv if isinstance(recv, tuple) else (recv, None)
    if scales is None:
        return data
    if scales.dtype == torch.int32:
        parts = torch.stack(
            [(scales >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1
        )  # exponents, lowest byte first
        scales = (parts << 23).view(torch.float32).flatten(-2)
    wide = scales.repeat_interleave(128, dim=2)[..., : data.size(2)]
    return (data.float() * wide).to(torch.bfloat16)


@pytest.mark.parametrize("hook", [False, True], ids=["at once", "hook"])
@pytest.mark.parametrize("form", FORMATS)
def test_1_10_and_1_11_dispatch_and_combine(form, hook):
    def run(group, device):
        tokens, made = opened(group, device, MAX_TOKENS - group.rank())
        with made as buffer:
            results = []
            for wire in (None, "logfmt10", "fp8"):
                stats = torch.full((EXPERTS // RANKS,), 5, dtype=torch.int32, device=device)
                recv, count, handle, event, receive = buffer.low_latency_dispatch(
                    tokens.x,
                    tokens.topk_idx,
                    MAX_TOKENS,
                    EXPERTS,
                    cumulative_local_expert_recv_stats=stats,
                    return_recv_hook=hook,
                    **FORMATS[form],
                )
                assert event.event is None and (receive is not None) == hook
                if hook:
                    receive()
                y = torch.nan_to_num(dequantised(recv)) * (1 + buffer.rank)
                combined, _, receive = buffer.low_latency_combine(
                    y, tokens.topk_idx, tokens.topk_weights, handle, return_recv_hook=hook, wire=wire
                )
                if hook:
                    receive()
                data, scales = recv if isinstance(recv, tuple) else (recv, None)
                assert scales is None or scales.stride(1) == 1
                info = torch.where(torch.arange(handle[0].size(1), device=device) < count.unsqueeze(1), handle[0], -1)
                results.append(
                    (
                        valid(data, count),
                        None if scales is None else valid(scales, count),
                        count,
                        info,
                        handle[1],
                        stats,
                        combined,
                    )
                )
            return results

    on_both(RANKS, run)


def test_1_11_out_zero_copy_and_selections_taken_back():
    def run(group, device):
        tokens, made = opened(group, device)
        with made as buffer:
            recv, count, handle, _, _ = buffer.low_latency_dispatch(
                tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
            )
            y = torch.nan_to_num(recv)
            ready = buffer.get_next_low_latency_combine_buffer(handle)
            ready.copy_(y)
            out = torch.empty_like(tokens.x)
            first = buffer.low_latency_combine(
                ready, tokens.topk_idx, tokens.topk_weights, handle, zero_copy=True, out=out
            )[0]
            assert first is out
            fewer = tokens.topk_idx.clone()
            fewer[:, 0] = -1
            again = buffer.low_latency_combine(y, fewer, tokens.topk_weights, handle)[0]
            # Other ids where those of a dispatch lay.
            ids = tokens.topk_idx.clone()
            _, _, handle, _, _ = buffer.low_latency_dispatch(tokens.x, ids, MAX_TOKENS, EXPERTS, use_fp8=False)
            if device == "cuda":
                settled()
            at = ids.data_ptr()
            del ids
            others = [fewer.clone() for _ in range(1000)]
            other = next((each for each in others if device == "cpu" or each.data_ptr() == at), None)
            assert other is not None, "torch took this memory for nothing else: the test tests nothing"
            last = buffer.low_latency_combine(y, other, tokens.topk_weights, handle)[0]
            return first, again, last

    for first, again, last in on_both(RANKS, run):
        assert same(again, last) and not same(first, last)


def test_1_10_asynchronous_and_mixed_with_high_throughput():
    def run(group, device):
        tokens, made = opened(group, device)
        with made as buffer:
            outputs = []
            for _ in range(4):
                recv, count, handle, event, _ = buffer.low_latency_dispatch(
                    tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, async_finish=True
                )
                event.current_stream_wait()
                per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)
                normal = buffer.dispatch(
                    tokens.x,
                    num_tokens_per_rank=per_rank,
                    is_token_in_rank=member,
                    num_tokens_per_expert=per_expert,
                    topk_idx=tokens.topk_idx,
                    topk_weights=tokens.topk_weights,
                )
                combined, event, _ = buffer.low_latency_combine(
                    torch.nan_to_num(recv), tokens.topk_idx, tokens.topk_weights, handle, async_finish=True
                )
                with event:
                    pass
                outputs.append((valid(recv, count), normal[0], combined))
            return outputs

    on_both(RANKS, run)


def test_graphs_replay_with_hooks_and_other_ids():
    def step(buffer, tokens):
        recv, count, handle, _, hook = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()
        out, _, hook = buffer.low_latency_combine(
            torch.nan_to_num(recv), tokens.topk_idx, tokens.topk_weights, handle, return_recv_hook=True
        )
        hook()
        return count, out

    def run(group):
        tokens, made = opened(group, "cuda")
        with made as buffer:
            step(buffer, tokens)
            settled()
            group.barrier()
            graph = torch.cuda.CUDAGraph()
            outputs = captured(graph, lambda: step(buffer, tokens))
            group.barrier()
            right = []
            for turn in range(6):
                for static, value in zip(
                    tokens, make_tokens(100 * turn + group.rank(), MAX_TOKENS, HIDDEN, TOPK, EXPERTS)
                ):
                    static.copy_(value)
                graph.replay()
                got = [each.clone() for each in outputs]
                right.append(same(to_cpu(got), to_cpu(list(step(buffer, tokens)))))
            settled()
            group.barrier()
            del graph
            return right

    for right in run_on("cuda", RANKS, run):
        assert all(right), right


def test_wait_statistics_are_refused_on_a_gpu():
    def run(group):
        tokens, made = opened(group, "cuda")
        with made as buffer, pytest.raises(Error, match="wait statistics"):
            waits = torch.zeros(1, dtype=torch.int64, device="cuda")
            buffer.low_latency_dispatch(
                tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, dispatch_wait_recv_cost_stats=waits
            )

    run_on("cuda", 1, run)


def launched(call):
    """Names of the kernels that a call launches, in order."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    names = [each.name for each in sorted(kernels, key=lambda each: each.time_range.start)]
    return [name for name in names if "dispatch" in name or "combine" in name or "notify" in name]


def test_q15_kernels_have_the_names_that_upstreams_profiles_look_for():
    def run(group):
        tokens, made = opened(group, "cuda")
        with made as buffer:
            routing = (tokens.topk_idx, tokens.topk_weights)

            def dispatch(**options):
                made = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, **options)
                if made[4] is not None:
                    made[4]()
                return made

            def combine(**options):
                hook = buffer.low_latency_combine(torch.zeros_like(recv), *routing, handle, **options)[2]
                if hook is not None:
                    hook()

            recv, _, handle, _, _ = dispatch(use_fp8=False)
            at_once = launched(dispatch), launched(combine)
            in_halves = (
                launched(lambda: dispatch(return_recv_hook=True)),
                launched(lambda: combine(return_recv_hook=True)),
            )
            for names, word, launches in zip((*at_once, *in_halves), ("dispatch", "combine") * 2, (1, 1, 2, 2)):
                assert len(names) == launches and len(set(names)) == 1 and f"::{word}" in names[0], names
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)
            normal = buffer.dispatch(
                tokens.x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                topk_idx=tokens.topk_idx,
                topk_weights=tokens.topk_weights,
            )[4]
            # A cached dispatch has nothing to notify anybody of; upstream's profile then reports no time for that.
            names = launched(lambda: buffer.dispatch(tokens.x, handle=normal))
            assert len(names) == 1 and "dispatch" in names[0] and "notify" not in names[0], names

    run_on("cuda", 1, run)
