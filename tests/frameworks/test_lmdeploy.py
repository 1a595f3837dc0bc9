# SPDX-License-Identifier: MIT
"""LMDeploy's own token dispatchers, on this library: four processes, CPU tensors. The experts are
those of layer.py."""

import functools
import importlib.util

import pytest
import torch
import torch.distributed as dist

import cpu
from layer import EXPERTS, LOCAL, RANKS, all_tokens, as_fp8, by_rank, dequantised, expert, slots, weighted_sum, whole
from processes import spawn

if importlib.util.find_spec("lmdeploy") is None:
    pytest.skip("LMDeploy is not installed: make framework-test installs it", allow_module_level=True)

HIDDEN = 512
MOST = 128  # tokens of a rank, of all its dispatchers


def run(body, *arguments):
    spawn(functools.partial(_rank, body, arguments), RANKS, preload=("load_lmdeploy",))


def _rank(body, arguments, rank):
    import load_lmdeploy  # noqa: F401
    from lmdeploy.pytorch.backends.cuda.token_dispatcher import DeepEPBuffer

    cpu.patch_torch()
    assert DeepEPBuffer.set_explicitly_destroy()
    body(rank, *arguments)
    assert DeepEPBuffer.destroy()


def make(name, **options):
    from lmdeploy.pytorch.backends.cuda import token_dispatcher

    return getattr(token_dispatcher, name)(dist.group.WORLD, EXPERTS, LOCAL, HIDDEN, torch.bfloat16, **options)


def check_permuting(rank):
    from lmdeploy.pytorch.backends.cuda.token_dispatcher import TokenDispatcherBuilder

    dispatcher = TokenDispatcherBuilder.build(dist.group.WORLD, EXPERTS, LOCAL, HIDDEN, torch.bfloat16)
    tokens = all_tokens(HIDDEN, dropped=0.1)[rank]
    rows, _, _, counts = dispatcher.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights)
    assert int(counts.sum()) == len(rows) > 0
    parts = [expert(rank * LOCAL + e, x) for e, x in enumerate(rows.split(counts.tolist()))]
    got = dispatcher.combine(torch.cat(parts))
    assert torch.equal(got, by_rank(tokens, weighted_sum))


def test_the_dispatcher_that_sorts_rows_by_expert_gives_the_layer_of_one_rank():
    run(check_permuting)


def check_normal(rank, asynchronous):
    dispatcher = make("DeepEPTokenDispatcherNormal", num_max_dispatch_tokens_per_rank=MOST)
    tokens = all_tokens(HIDDEN, dropped=0.1)[rank]
    for quantised in (False, True):
        x = torch.empty_like(tokens.x) if quantised else tokens.x
        given, sent = tokens.x, tokens.x
        if quantised:
            scales = torch.rand((len(x), HIDDEN // 128)) + 0.5
            given = (tokens.x.to(torch.float8_e4m3fn), scales)
            sent = dequantised(*given)
        if asynchronous:
            event = dispatcher.get_buffer().capture()
            x, ids, weights, counts, handle, event = dispatcher.dispatch_normal_async(
                given, tokens.topk_idx, tokens.topk_weights, previous_event=event
            )
            event.current_stream_wait()
        else:
            x, ids, weights, counts = dispatcher.dispatch(given, tokens.topk_idx, tokens.topk_weights)
        assert counts == [-(-int((ids == e).sum()) // 128) * 128 for e in range(LOCAL)]  # to the GEMM's blocks
        x = dequantised(*x) if quantised else x
        ids = torch.where(ids >= 0, ids + rank * LOCAL, -1)
        out = weighted_sum(slots(rank, x, ids), weights)
        if asynchronous:
            got, event = dispatcher.combine_normal_async(out, handle, previous_event=dispatcher.get_buffer().capture())
            event.current_stream_wait()
        else:
            got = dispatcher.combine(out)
        assert torch.equal(got, by_rank(tokens, weighted_sum, sent))
    dispatcher.release()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_normal_dispatcher_gives_the_layer_of_one_rank(asynchronous):
    run(check_normal, asynchronous)


def batched(rank, x, counts):
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    for e, count in enumerate(counts.tolist()):
        out[e, :count] = expert(rank * LOCAL + e, x[e, :count])
    return out


def check_low_latency(rank, hook):
    options = {"num_max_dispatch_tokens_per_rank": MOST, "return_recv_hook": hook}
    dispatcher = make("DeepEPTokenDispatcherLowLatency", **options)
    tokens = all_tokens(HIDDEN, dropped=0.1)[rank]
    (x, scales), ids, weights, counts, _ = dispatcher.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights, EXPERTS)
    out = batched(rank, dequantised(x.value, scales.value), counts)
    got = dispatcher.combine(out, ids, weights)
    assert torch.equal(got, whole(tokens, as_fp8(tokens.x)).to(torch.bfloat16))


@pytest.mark.parametrize("hook", [False, True])
def test_the_low_latency_dispatcher_gives_the_layer_of_one_rank(hook):
    run(check_low_latency, hook)


def check_low_latency_async(rank, asynchronous):
    dispatcher = make("DeepEPTokenDispatcherLowLatency", num_max_dispatch_tokens_per_rank=MOST)
    tokens = all_tokens(HIDDEN)[rank]
    (x, scales), counts, handle, event, hook = dispatcher.dispatch_async(
        tokens.x, tokens.topk_idx, async_finish=asynchronous
    )
    event.current_stream_wait() if asynchronous else hook()
    out = batched(rank, dequantised(x.value, scales.value), counts)
    got, event, hook = dispatcher.combine_async(out, tokens.topk_idx, tokens.topk_weights, handle, asynchronous)
    event.current_stream_wait() if asynchronous else hook()
    assert torch.equal(got, whole(tokens, as_fp8(tokens.x)).to(torch.bfloat16))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_its_asynchronous_calls_give_the_layer_of_one_rank(asynchronous):
    run(check_low_latency_async, asynchronous)


def check_turns(rank):
    """Both dispatchers share one buffer; changing from normal to low-latency cleans it."""
    from lmdeploy.pytorch.backends.cuda.token_dispatcher import DeepEPBuffer, DeepEPMode

    normal = make("DeepEPTokenDispatcherNormal", num_max_dispatch_tokens_per_rank=MOST)
    low_latency = make("DeepEPTokenDispatcherLowLatency", num_max_dispatch_tokens_per_rank=MOST)
    assert normal.get_buffer() is low_latency.get_buffer()
    tokens = all_tokens(HIDDEN)[rank]
    for _ in range(2):
        DeepEPBuffer.set_deepep_mode(DeepEPMode.NORMAL)
        x, ids, weights, _ = normal.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights)
        out = weighted_sum(slots(rank, x, torch.where(ids >= 0, ids + rank * LOCAL, -1)), weights)
        assert torch.equal(normal.combine(out), by_rank(tokens, weighted_sum))
        assert DeepEPBuffer.set_deepep_mode(DeepEPMode.LOW_LATENCY) == (DeepEPMode.LOW_LATENCY, True)
        (x, scales), ids, weights, counts, _ = low_latency.dispatch(*tokens, EXPERTS)
        got = low_latency.combine(batched(rank, dequantised(x.value, scales.value), counts), ids, weights)
        assert torch.equal(got, whole(tokens, as_fp8(tokens.x)).to(torch.bfloat16))


def test_prefill_and_decode_take_turns_on_one_buffer():
    run(check_turns)
